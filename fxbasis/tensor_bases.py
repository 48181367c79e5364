"""Tensor bases of a convolution's weight, Tucker-2 and tensor train: tensors in, tensors out.

A weight comes as blocks of shape (g, O, I, K_h, K_w), one for each group, O = C/g and I = c/g; every block
is decomposed apart, all with the same ranks, in float64. What comes back are blocks of the weights of a
chain of convolutions, in the order in which they run; a block of shape (g, out, in, k_h, k_w) is an
ordinary (grouped) convolution. With Q = K_h K_w:

    tucker2  (g, R1, I, 1, 1), (g, R2, R1, K_h, K_w), (g, O, R2, 1, 1)
    tt       (g, r1, I, 1, 1), (g, r2, r1, K_h, 1), (g, r3, r2, 1, K_w), (g, O, r3, 1, 1)

CP, whose middle factors are depthwise, is in ``cp``. A rank above its largest is taken as the largest,
where the fit is exact. "svd" goes by the norm of the error; all its factors are orthonormal, but for the core
of Tucker-2 and the last of the train. "als" weighs the error by ``input_moments``: the correlations in all
sweeps, the sums in a last step for the last factor. Where the text says "leading vectors", they are
eigenvectors of the Gram matrix of an unfolding (of its triangular factor, where it is tall), which is exact
at full rank and resolves singular values down to about 1e-8 of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError, SelectionError
from .input_moments import last_factor, unweighed, weighed

__all__ = ["METHODS", "checked", "largest_tt", "largest_tucker2", "leading", "tt", "tucker2"]

METHODS = ("als", "svd")


def checked(weight: Tensor, **ranks: int) -> Tensor:
    """The blocks in float64 on the CPU, after a look at them and at the ranks.

    Raises:
        InputError: for a weight that is not five-dimensional, is empty, or has values that are not finite.
        SelectionError: for a rank that is not a positive whole number.
    """
    if weight.ndim != 5 or weight.numel() == 0:
        shape = tuple(weight.shape)
        raise InputError(f"a weight of shape {shape} has no blocks; pass one of (g, O, I, K_h, K_w)")
    if not bool(weight.isfinite().all()):
        raise InputError("the weight has values that are not finite; repair or leave out this layer")
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise SelectionError(f"{name}={rank!r} is not a rank; pass a whole number from 1 upwards")
    return weight.detach().to("cpu", torch.float64)


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The (g, n, rank) leading left singular vectors of (g, n, m), orthonormal; rank <= min(n, m)."""
    if matrix.shape[1] > matrix.shape[2]:
        tall, triangle = torch.linalg.qr(matrix)
        return torch.matmul(tall, leading(triangle, rank))
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors
    return vectors.flip(-1)[..., :rank]


def largest_tucker2(shape: Sequence[int]) -> tuple[int, int]:
    """The ranks (R1, R2) from which on the fit of an (O, I, K_h, K_w) block is exact.

    >>> largest_tucker2((64, 3, 3, 3))
    (3, 27)
    """
    out, into, height, width = shape
    return min(into, out * height * width), min(out, into * height * width)


def largest_tt(shape: Sequence[int]) -> tuple[int, int, int]:
    """The ranks (r1, r2, r3) from which on the fit of an (O, I, K_h, K_w) block is exact.

    >>> largest_tt((64, 16, 3, 3))
    (16, 48, 64)
    """
    out, into, height, width = shape
    return min(into, height * width * out), min(into * height, width * out), min(into * height * width, out)


def tucker2(
    weight: Tensor, ranks: tuple[int, int], method: str = "als", *, sweeps: int = 20, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker decomposition in the two modes of channels: 1x1, K_h x K_w between few channels, 1x1.

    Args:
        weight: blocks (g, O, I, K_h, K_w).
        ranks: (R1, R2), channels after the first and after the second convolution.
        method: "svd", the leading vectors of both unfoldings (higher-order SVD), or "als", which starts
            there and renews each side for the other one (HOOI).
        sweeps: "als" stops after so many rounds,
        tolerance: or when the energy that is left out falls by less than this part of all energy.

    >>> weight = torch.randn(2, 8, 4, 3, 3)
    >>> [tuple(block.shape) for block in tucker2(weight, (3, 5))]
    [(2, 3, 4, 1, 1), (2, 5, 3, 3, 3), (2, 8, 5, 1, 1)]

    Raises:
        SelectionError: for a method that does not exist or ranks that are none.
        InputError: for a weight that cannot be decomposed.
    """
    if method not in METHODS:
        raise SelectionError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    blocks = checked(weight, R1=ranks[0], R2=ranks[1])
    first, second = _tucker_ranks(ranks, blocks.shape[1:])
    iterated = method == "als" and (first, second) != largest_tucker2(blocks.shape[1:])
    tensor = (weighed(blocks) if iterated else blocks).flatten(3).transpose(2, 3)  # (g, O, Q, I)
    outer, inner = leading(tensor.flatten(2), second), leading(tensor.flatten(1, 2).mT, first)
    if iterated:
        outer, inner = _hooi(tensor, outer, inner, sweeps, tolerance)
    core = (outer.mT @ (tensor @ inner[:, None]).flatten(2)).reshape(len(blocks), second, -1, first)
    core = core.transpose(2, 3).reshape(len(blocks), second, first, *blocks.shape[3:])
    if iterated:
        core = unweighed(core)
        outer = last_factor(blocks, outer, torch.einsum("gsryx,gir->gsiyx", core, inner))
    return inner.mT[..., None, None].contiguous(), core.contiguous(), outer[..., None, None].contiguous()


def _tucker_ranks(ranks: tuple[int, int], shape: Sequence[int]) -> tuple[int, int]:
    """The ranks that a core can have: none above its largest, nor above Q times the other."""
    taps, largest = shape[2] * shape[3], largest_tucker2(shape)
    first = min(ranks[0], largest[0], min(ranks[1], largest[1]) * taps)
    return first, min(ranks[1], largest[1], first * taps)


def _hooi(
    tensor: Tensor, outer: Tensor, inner: Tensor, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Higher-order orthogonal iteration on (g, O, Q, I): each side is the best one for the other."""
    total, before = tensor.square().sum(), tensor.new_zeros(())
    for _ in range(sweeps):
        core = (outer.mT @ tensor.flatten(2)).reshape(*outer.mT.shape[:2], *tensor.shape[2:])  # (g, R2, Q, I)
        inner = leading(core.flatten(1, 2).mT, inner.shape[2])
        core = tensor @ inner[:, None]  # (g, O, Q, R1)
        outer = leading(core.flatten(2), outer.shape[2])
        energy = (outer.mT @ core.flatten(2)).square().sum()
        if bool(energy - before <= tolerance * total):
            break
        before = energy
    return outer, inner


def tt(
    weight: Tensor, ranks: tuple[int, int, int], method: str = "als", *, sweeps: int = 5
) -> tuple[Tensor, ...]:
    """Tensor train over (I, K_h, K_w, O): 1x1, K_h x 1, 1 x K_w, 1x1.

    Args:
        weight: blocks (g, O, I, K_h, K_w).
        ranks: (r1, r2, r3), channels after the first, second and third convolution.
        method: "svd", successive leading vectors (TT-SVD), or "als", which starts there and renews every
            core for the others, to and fro; on a ResNet-20 at half its MACs that takes
            0.2 to 2 % of the error off.
        sweeps: of "als".

    >>> weight = torch.randn(1, 8, 4, 3, 5)
    >>> [tuple(block.shape[1:]) for block in tt(weight, (3, 6, 7))]
    [(3, 4, 1, 1), (6, 3, 3, 1), (7, 6, 1, 5), (8, 7, 1, 1)]

    Raises:
        SelectionError: for a method that does not exist or ranks that are none.
        InputError: for a weight that cannot be decomposed.
    """
    if method not in METHODS:
        raise SelectionError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    blocks = checked(weight, r1=ranks[0], r2=ranks[1], r3=ranks[2])
    possible = _tt_ranks(ranks, blocks.shape[1:])
    iterated = method == "als" and possible != largest_tt(blocks.shape[1:])
    tensor = (weighed(blocks) if iterated else blocks).permute(0, 2, 3, 4, 1)
    cores = _tt_svd(tensor, possible)
    for _ in range(sweeps if iterated else 0):
        cores = _tt_sweep(tensor, cores)
    first, down, across, last = (core.permute(0, 3, 1, 2) for core in cores)  # (g, next, rank, mode)
    down, across, last = down[..., None], across[:, :, :, None], last.transpose(1, 3)
    if iterated:
        down, across = unweighed(down), unweighed(across)
        rest = torch.einsum("gtsx,gsry,gri->gtiyx", across[..., 0, :], down[..., 0], first[:, :, 0])
        last = last_factor(blocks, last[..., 0], rest)[..., None]
    chain = (first.mT[..., None], down, across, last[..., None])
    return tuple(block.contiguous() for block in chain)


def _tt_ranks(ranks: tuple[int, int, int], shape: Sequence[int]) -> tuple[int, int, int]:
    """The ranks that a train can have: none above its largest, nor above a mode times its neighbour."""
    (out, into, height, width), (first, second, third) = shape, ranks
    third = min(third, out)
    second = min(second, third * width)
    first = min(first, second * height, into)
    second = min(second, first * height)
    return first, second, min(third, second * width)


def _tt_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Cores (g, rank, mode, next rank) of (g, I, K_h, K_w, O); all but the last are orthonormal."""
    cores, rest, rank = [], tensor, 1
    for mode, following in zip(tensor.shape[1:], ranks, strict=False):
        rest = rest.reshape(len(tensor), rank * mode, -1)
        vectors = leading(rest, following)
        cores.append(vectors.reshape(len(tensor), rank, mode, following))
        rest, rank = vectors.mT @ rest, following
    return [*cores, rest[..., None]]


def _tt_sweep(tensor: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """Every core renewed for orthonormal others, from the last to the first and back."""
    cores = list(cores)
    for place in (3, 2, 1):
        best = _tt_core(tensor, cores, place).flatten(2)
        cores[place] = torch.linalg.qr(best.mT).Q.mT.reshape(cores[place].shape)
    for place in (0, 1, 2):
        best = _tt_core(tensor, cores, place).flatten(1, 2)
        cores[place] = torch.linalg.qr(best).Q.reshape(cores[place].shape)
    return [*cores[:3], _tt_core(tensor, cores, 3)]


def _tt_core(tensor: Tensor, cores: list[Tensor], place: int) -> Tensor:
    """The best core at a place: the tensor against the orthonormal cores on its left and on its right."""
    rest = tensor.flatten(1)
    for core in cores[:place]:
        frame = core.flatten(1, 2)
        rest = frame.mT @ rest.reshape(len(tensor), frame.shape[1], -1)
    for core in reversed(cores[place + 1 :]):
        frame = core.flatten(2)
        rest = rest.reshape(len(tensor), -1, frame.shape[2]) @ frame.mT
    return rest.reshape(cores[place].shape)
