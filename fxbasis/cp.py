"""CP decomposition of a convolution's weight into separable convolutions: tensors in, tensors out.

A weight comes as blocks (g, O, I, K_h, K_w), as in ``tensor_bases``, and leaves as the weights of a chain
of convolutions with R channels in each group; the middle ones are depthwise, (g, R, 1, k_h, k_w):

    3 factors  (g, R, I, 1, 1), depthwise (g, R, 1, K_h, K_w), (g, O, R, 1, 1)
    4 factors  (g, R, I, 1, 1), depthwise (g, R, 1, K_h, 1), depthwise (g, R, 1, 1, K_w), (g, O, R, 1, 1)

A block is the sum over r of the outer products of column r of A (O, R), of B (I, R) and of one table of
taps (K, R) for each depthwise factor. R may exceed O and I. A first fit needs no iteration: all modes but
the two longest are turned to their principal axes and index slices; the singular vectors of the slices are
components, prod / max (O, I, taps) in all, which add up to W exactly. The R largest are a start.

From there, alternating least squares. The product of W with a fixed B serves the new A and the new taps,
that with a fixed A the new B and the new taps: two large products are a sweep. And:

* A sweep starts from extrapolated factors, N + beta (N - last N); where the error rose it is dropped and
  beta is cut (Ang, Cohen, Gillis, Hien 2019). On nine trained 3x3 layers, with a ridge of 0.003, 10 sweeps
  reached the error of 16 to 21 plain ones, 25 that of 71 to 121, 50 that of 173 to 353.
* Components that cancel each other and grow (Phan et al. 2020) are held down by a ridge on the Gram
  matrices. It shrinks with the squared relative error, so that it does not stand in the way of an exact fit.
* Sweeps run in float32 while the relative error is above ``COARSE``; the end is float64.
* The error is weighed by ``input_moments``, the correlations in all sweeps, the sums in a last step for A.
  That costs some hundredths of the norm of the error, and saves more of the outputs' error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cp_effort import default_starts, default_sweeps
from .cp_starts import components, modes_of, unit_norm
from .input_moments import RECTIFIED, root, weighed
from .tensor_bases import checked

__all__ = ["cp", "largest_cp"]

COARSE = 1e-2  # relative error below which float32 will not do
PATIENCE = 3  # sweeps without progress that end a fit


def largest_cp(shape: Sequence[int], factors: int = 3) -> int:
    """The rank from which on ``cp`` fits an (O, I, K_h, K_w) block exactly: prod(modes) / max(modes).

    That is min(Q min(I, O), I O) for three factors and min(Q min(I, O), I O min(K_h, K_w)) for four.

    >>> largest_cp((64, 32, 3, 3)), largest_cp((4, 1, 3, 3)), largest_cp((4, 1, 3, 3), factors=4)
    (288, 4, 9)
    """
    modes = modes_of(shape, factors)
    return math.prod(modes) // max(modes)


def cp(
    weight: Tensor,
    rank: int,
    factors: int = 3,
    *,
    sweeps: int | None = None,
    starts: int | None = None,
    tolerance: float = 1e-5,
    ridge: float = 0.01,
    seed: int = 0,
    first: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """CP of rank R: 1x1, depthwise K_h x K_w (or K_h x 1 and 1 x K_w), 1x1.

    Args:
        weight: blocks (g, O, I, K_h, K_w).
        rank: R, components in each group; from ``largest_cp`` on the fit is exact and not iterated.
        factors: 3, or 4 to split the depthwise factor.
        sweeps: at most so many from each start; ``None``: ``default_sweeps``.
        starts: the first one from singular vectors, others random; each group keeps its best fit. ``None``:
            ``default_starts``.
        tolerance: stop after three sweeps in which no group's error fell by this part of itself.
        ridge: over the mean diagonal of a Gram matrix, at a relative error of 1.
        seed: of the random starts; the global generator is not touched.
        first: ``principal`` of the same weight, to take the first start from; otherwise it is computed.

    Every component has the same norm in all factors.

    >>> weight = torch.randn(2, 8, 4, 3, 3)
    >>> [tuple(block.shape) for block in cp(weight, 10)]
    [(2, 10, 4, 1, 1), (2, 10, 1, 3, 3), (2, 8, 10, 1, 1)]

    Raises:
        SelectionError: for a rank that is none, or a number of factors other than 3 and 4.
        InputError: for a weight that cannot be decomposed.
    """
    blocks = checked(weight, rank=rank)
    shape, largest = blocks.shape[1:], largest_cp(blocks.shape[1:], factors)
    modes, (unit, scale) = modes_of(shape, factors), unit_norm(blocks)
    if rank >= largest or sum(size > 1 for size in modes) < 3:  # exact, or a matrix, and its SVD
        found = [factor.mT for factor in components(unit.reshape(-1, *modes), min(rank, largest))]
    else:
        most = default_sweeps(shape, rank) if sweeps is None else sweeps
        many = default_starts(len(blocks), shape, rank) if starts is None else starts
        found = _weighed(unit, modes, rank, _Options(most, many, tolerance, ridge, seed), first)
    out, into, *taps = (factor * scale ** (1 / len(found)) for factor in _balanced(found))
    sizes = [shape[2:]] if factors == 3 else [(shape[2], 1), (1, shape[3])]
    depthwise = [tap.mT.reshape(len(tap), -1, 1, *size) for tap, size in zip(taps, sizes, strict=True)]
    chain = (into.mT[..., None, None], *depthwise, out[..., None, None])
    return tuple(block.contiguous() for block in chain)


@dataclass(frozen=True)
class _Options:
    sweeps: int
    starts: int
    tolerance: float
    ridge: float
    seed: int


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same components with one norm in all factors; a component that vanishes is zero in all."""
    norms = torch.stack([factor.norm(dim=1, keepdim=True) for factor in factors])
    mean = norms.log().mean(0).exp()
    scales = mean / torch.where(norms > 0, norms, 1.0)
    return [factor * scale for factor, scale in zip(factors, scales, strict=True)]


def _weighed(
    unit: Tensor, modes: tuple[int, ...], rank: int, options: _Options, first: Sequence[Tensor] | None
) -> list[Tensor]:
    """The fit of blocks (g, O, I, K_h, K_w) by the error of outputs that ``input_moments`` gives."""
    tensor, roots = weighed(unit).reshape(-1, *modes), [root(size) for size in unit.shape[3:]]
    first = components(tensor, rank) if first is None else first
    start = [factor[:, :rank].mT.contiguous() for factor in first]
    both = torch.kron(*roots)
    found, error = _search(tensor, start, options)
    ones = torch.linalg.solve(both, both.new_ones(len(both)))
    found = _refitted(tensor, found, ones, options.ridge * error.square())
    taps = zip([both] if len(modes) == 3 else roots, found[2:], strict=True)
    return [*found[:2], *(torch.linalg.solve(matrix, tap) for matrix, tap in taps)]


def _search(tensor: Tensor, start: list[Tensor], options: _Options) -> tuple[list[Tensor], Tensor]:
    """Least squares from every start; each group keeps its best one, which ends in float64."""
    generator, groups = torch.Generator().manual_seed(options.seed), len(tensor)
    shapes = [(options.starts - 1, 1, *factor.shape[1:]) for factor in start]  # one for all groups
    drawn = [torch.randn(shape, generator=generator).double() for shape in shapes]
    start = [
        torch.cat([factor, more.expand(-1, groups, -1, -1).flatten(0, 1)])
        for factor, more in zip(start, drawn, strict=True)
    ]
    many = tensor.float().repeat(options.starts, *[1] * (tensor.ndim - 1))
    unknown = many.new_full((len(many), 1, 1), math.inf)
    found, errors, used = _descend(many, start, unknown, options.sweeps, options, COARSE)
    best = errors.view(-1, groups).argmin(0) * groups + torch.arange(groups)
    left = options.sweeps - used if bool((errors[best] < COARSE).any()) else 0
    # float32 cannot tell how small a small error is: begin from the largest that it can be
    error = errors[best].clamp(min=COARSE)
    return _descend(tensor, [factor[best] for factor in found], error, max(left, 1), options)[:2]


def _refitted(tensor: Tensor, factors: list[Tensor], ones: Tensor, ridge: Tensor) -> list[Tensor]:
    """A once more, with the filters' sums; (taps,) ``ones`` is what sums over the taps."""
    _, into, *taps = factors
    kernel = _kernel(taps)
    sums = into.sum(1, keepdim=True) * (ones @ kernel)[:, None]  # (g, 1, R), of every component
    rows = _views(tensor)[0] @ into  # (g, taps O, R)
    target = (rows.reshape(*kernel.shape[:2], -1, kernel.shape[2]) * kernel[:, :, None]).sum(1)
    target = target + RECTIFIED * (tensor.flatten(3) @ ones).sum(2)[..., None] * sums
    gram = (into.mT @ into) * _gram(taps)
    return [_solved(gram + RECTIFIED * sums.mT * sums, target, ridge), into, *taps]


def _descend(
    tensor: Tensor, start: list[Tensor], error: Tensor, sweeps: int, options: _Options, enough: float = 0.0
) -> tuple[list[Tensor], Tensor, int]:
    """At most so many extrapolated sweeps: factors, their relative errors (g, 1, 1), the sweeps taken."""
    views, total = _views(tensor), tensor.flatten(1).double().square().sum(1)[:, None, None]
    kept = ahead = [factor.to(tensor.dtype) for factor in _balanced(start)]
    error = error.to(tensor.dtype)
    beta, limit = torch.full_like(error, 0.5), torch.ones_like(error)
    idle = used = 0
    while used < sweeps and idle < PATIENCE and not bool((error < enough).all()):
        ridge = options.ridge * error.clamp(max=1.0).square()
        step = torch.where(error.isinf(), 0.0, beta)
        found, gain = _sweep(views, ahead, kept, step, ridge)
        reached = (total - gain).clamp(min=0.0).sqrt().to(tensor.dtype)
        idle = 0 if bool((reached < error * (1 - options.tolerance)).any()) else idle + 1
        risen = ~(reached <= error)  # or is not a number
        beyond = [new + step * (new - old) for new, old in zip(found, kept, strict=True)]
        kept = [torch.where(risen, old, new) for new, old in zip(found, kept, strict=True)]
        ahead = [torch.where(risen, old, new) for new, old in zip(beyond, kept, strict=True)]
        limit = torch.where(risen, beta, (limit * 1.01).clamp(max=1.0))
        beta = torch.where(risen, beta / 1.5, torch.minimum(beta * 1.05, limit))
        error, used = torch.where(risen, error, reached), used + 1
    return [factor.double() for factor in kept], error.double(), used


def _views(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(g, O, I, *taps) as (g, taps O, I) and (g, taps I, O): taps times the first side by the other."""
    taps_last = tensor.flatten(3)
    return taps_last.permute(0, 3, 1, 2).flatten(1, 2), taps_last.permute(0, 3, 2, 1).flatten(1, 2)


def _sweep(
    views: tuple[Tensor, Tensor], ahead: list[Tensor], kept: list[Tensor], step: Tensor, ridge: Tensor
) -> tuple[list[Tensor], Tensor]:
    """New factors, and what they take off the squared error, (g, 1, 1)."""
    _, into, *taps = ahead
    out, taps, _ = _renewed(views[0], into, taps, ridge)
    out = out + step * (out - kept[0])
    taps = [tap + step * (tap - old) for tap, old in zip(taps, kept[2:], strict=True)]
    into, taps, gain = _renewed(views[1], out, taps, ridge)
    return [out, into, *taps], gain


def _renewed(
    view: Tensor, fixed: Tensor, taps: list[Tensor], ridge: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The other side, then the taps, by least squares for a fixed side; and their gain as in ``_sweep``."""
    kernel, gram = _kernel(taps), fixed.mT @ fixed
    products = (view @ fixed).reshape(*kernel.shape[:2], -1, kernel.shape[2])  # (g, taps, n, R)
    side = _solved(gram * _gram(taps), (products * kernel[:, :, None]).sum(1), ridge)
    gram, taps = gram * (side.mT @ side), list(taps)
    sizes = [tap.shape[1] for tap in taps]
    grid = (products * side[:, None]).sum(2).reshape(len(side), *sizes, -1)
    for place, tap in enumerate(taps):
        others = taps[:place] + taps[place + 1 :]
        target = grid.movedim(1 + place, 1).reshape(*tap.shape[:2], -1, tap.shape[2])
        target = (target * _kernel(others)[:, None]).sum(2) if others else target.squeeze(2)
        normal = gram * _gram(others) if others else gram
        taps[place] = _solved(normal, target, ridge)
    fit = (target.double() * taps[-1]).sum((1, 2), keepdim=True)
    return side, taps, 2 * fit - (normal.double() * _gram(taps[-1:])).sum((1, 2), keepdim=True)


def _kernel(taps: list[Tensor]) -> Tensor:
    """The tables (g, K, R) of the modes of taps as one (g, taps, R)."""
    return taps[0] if len(taps) == 1 else (taps[0][:, :, None] * taps[1][:, None]).flatten(1, 2)


def _gram(tables: list[Tensor]) -> Tensor:
    """The Gram matrix (g, R, R) of the components that the tables span together."""
    grams = [table.mT @ table for table in tables]
    return grams[0] if len(grams) == 1 else grams[0] * grams[1]


def _solved(gram: Tensor, target: Tensor, ridge: Tensor) -> Tensor:
    """X (g, n, R) of X (G + ridge) = target; the ridge grows where rounding makes G indefinite.

    A block whose G has overflowed gets some answer, and ``_descend`` drops the sweep for its error.
    """
    finite = gram.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype)
    gram = torch.where(finite, gram, identity)
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    size = torch.finfo(gram.dtype)
    shift = mean * (ridge + 4 * size.eps) + size.tiny
    lower, info = torch.linalg.cholesky_ex(gram + shift * identity)
    while bool(info.any()):
        shift = shift * 10
        lower, info = torch.linalg.cholesky_ex(gram + shift * identity)
    return torch.cholesky_solve(target.mT, lower).mT
