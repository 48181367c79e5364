"""Bases of a convolution's weight: tensors in, tensors out; no nn.Module, no graph.

A weight of shape (C, c/g, K_h, K_w) is seen as g matrices W of shape (C/g, q), one for each group. A
basis of rank R_g is a pair of factors with W ~ A V: the composition A (C/g, R_g) and the basis
V (R_g, q), whose rows are filters. Every method makes one decomposition per layer and slices it for
each rank. All arithmetic is float64.

    svd          A = U sqrt(s), V = sqrt(s)^-1 U^T W: the best fit of each rank (Eckart-Young), balanced
    eigen        the same fit with orthonormal rows of V, as BasisConv does it (arXiv 1906.04509)
    qr           column-pivoted QR of W^T: V is a true subset of the filters, chosen greedily
    random       V orthonormal and random, A the projection on it: BasisConv from scratch (arXiv 1906.04509)
    qr-unpivoted plain QR of W^T as arXiv 2408.06024 describes it: the span of the first R filters in
                 storage order; no rank-revealing property, kept for replication

``svd`` and ``eigen`` come from the eigenvectors of the Gram matrix on the smaller side of W, W W^T or
W^T W. The Gram matrix squares the condition number: singular values below about 1e-8 of the largest are
not resolved, which leaves the fit unharmed, since W is projected on the eigenvectors found (in exact
arithmetic and to 1e-15 here, a complete set of them reproduces W), and costs a third of an SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from .errors import SelectionError

__all__ = ["METHODS", "Decomposition", "Factors", "decompose"]


@dataclass(frozen=True)
class Factors:
    """One fit: ``composition`` (g, C/g, R_g) times ``basis`` (g, R_g, q), float64."""

    composition: Tensor
    basis: Tensor


@dataclass(frozen=True)
class Decomposition:
    """Factors of every rank of one weight.

    Attributes:
        composition: (g, C/g, m) where m = min(C/g, q); its first R_g columns serve rank R_g.
        basis: (g, m, q); its first R_g rows serve rank R_g.
        energies: (g, m), what each component takes off the squared error; their tail is what is left.
        chosen: (g, C/g), for a basis that is a subset of the filters: their order of choice.
    """

    composition: Tensor
    basis: Tensor
    energies: Tensor
    chosen: Tensor | None = None

    def factors(self, rank: int) -> Factors:
        """The factors with ``rank`` basis filters in each group."""
        composition, basis = self.composition[:, :, :rank], self.basis[:, :rank]
        if self.chosen is not None:
            composition = _interpolation(composition, self.chosen, self.energies)
        return Factors(composition, basis)

    def relative_error(self, rank: int) -> float:
        """Frobenius norm of W - A V over that of W; 0 for a zero weight."""
        total = float(self.energies.sum())
        tail = float(self.energies[:, rank:].sum())
        return (max(tail, 0.0) / total) ** 0.5 if total > 0 else 0.0


def _projection(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal factors (A, V, energies) of W, largest energy first, by the smaller Gram matrix."""
    tall = weight.shape[1] > weight.shape[2]
    gram = weight.mT @ weight if tall else weight @ weight.mT
    energies, vectors = torch.linalg.eigh(gram)
    energies, vectors = energies.flip(-1).clamp(min=0.0), vectors.flip(-1)
    if tall:
        return weight @ vectors, vectors.mT, energies
    return vectors, vectors.mT @ weight, energies


def _scales(energies: Tensor) -> Tensor:
    """Singular values, with 1 where they vanish, to divide by."""
    singular = energies.sqrt()
    floor = singular[:, :1] * 1e-7
    return torch.where(singular > floor, singular, torch.ones_like(singular))


def _svd(weight: Tensor) -> Decomposition:
    composition, basis, energies = _projection(weight)
    root = _scales(energies).sqrt()
    if weight.shape[1] > weight.shape[2]:
        return Decomposition(composition / root[:, None, :], basis * root[:, :, None], energies)
    return Decomposition(composition * root[:, None, :], basis / root[:, :, None], energies)


def _eigen(weight: Tensor) -> Decomposition:
    composition, basis, energies = _projection(weight)
    if weight.shape[1] <= weight.shape[2]:
        scale = _scales(energies)
        composition, basis = composition * scale[:, None, :], basis / scale[:, :, None]
    return Decomposition(composition, basis, energies)


def _qr_unpivoted(weight: Tensor) -> Decomposition:
    q, r = torch.linalg.qr(weight.mT)
    return Decomposition(r.mT.contiguous(), q.mT.contiguous(), r.square().sum(-1))


def _random(weight: Tensor) -> Decomposition:
    generator = torch.Generator().manual_seed(0)
    groups, _, size = weight.shape
    basis = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis).Q.mT.contiguous()
    composition = weight @ basis.mT
    return Decomposition(composition, basis, composition.square().sum(1))


def _qr(weight: Tensor) -> Decomposition:
    triangles, bases, energies, orders = [], [], [], []
    for block in weight:
        r, order = scipy.linalg.qr(block.T.numpy(), mode="r", pivoting=True)
        size = min(block.shape)
        r, chosen = torch.from_numpy(r[:size].copy()), torch.from_numpy(order).long()
        triangles.append(r.T)
        bases.append(block[chosen[:size]])
        energies.append(r.square().sum(-1))
        orders.append(chosen)
    return Decomposition(
        torch.stack(triangles), torch.stack(bases), torch.stack(energies), torch.stack(orders)
    )


def _interpolation(triangle: Tensor, chosen: Tensor, energies: Tensor) -> Tensor:
    """The composition over the first ``rank`` chosen filters: identity rows for these, T for the rest.

    With W^T P = Q R the others are R_11^-1 R_12; directions whose pivot vanishes are left out.
    """
    groups, filters, rank = triangle.shape
    composition = triangle.new_zeros(groups, filters, rank)
    for group in range(groups):
        pivots = triangle[group, :rank].diagonal().abs()
        sound = max(1, int((pivots > pivots[0] * 1e-12).sum()))
        if pivots[0] > 0:
            corner, rest = triangle[group, :sound, :sound], triangle[group, rank:, :sound]
            solved = torch.linalg.solve_triangular(corner, rest, upper=False, left=False)
            composition[group, chosen[group, rank:], :sound] = solved
        composition[group, chosen[group, :rank], torch.arange(rank)] = 1.0
    return composition


METHODS: dict[str, Callable[[Tensor], Decomposition]] = {
    "svd": _svd,
    "qr": _qr,
    "qr-unpivoted": _qr_unpivoted,
    "eigen": _eigen,
    "random": _random,
}


def decompose(weight: Tensor, groups: int = 1, method: str = "svd") -> Decomposition:
    """One decomposition of a convolution's weight, to be sliced for every rank.

    Args:
        weight: (C, c/g, K_h, K_w), real and finite, any floating dtype and device.
        groups: g; the blocks of C/g filters are decomposed apart.
        method: a key of ``METHODS``.

    >>> weight = torch.randn(8, 3, 3, 3)
    >>> fit = decompose(weight).factors(8)
    >>> bool(((fit.composition @ fit.basis).reshape(8, 3, 3, 3) - weight).abs().max() < 1e-6)
    True

    Raises:
        SelectionError: for a method that does not exist.
    """
    if method not in METHODS:
        raise SelectionError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    matrix = weight.detach().to("cpu", torch.float64)
    return METHODS[method](matrix.reshape(groups, weight.shape[0] // groups, -1))
