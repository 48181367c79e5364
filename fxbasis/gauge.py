"""The gauge form: the same product A V with a basis of its own output filters; tensors in, tensors out.

A fit W ~ A V of rank R keeps its value under any invertible R x R matrix between the factors. With the
R rows I of A for which A_I is invertible,

    A V = (A A_I^-1) (A_I V) = [Id; T] (A V)_I

so R of the O outputs are copies of the new basis A_I V, which costs nothing, and only the others are
composed, by T (O-R, R). Nothing is lost: the gauge form costs R (q + O - R) multiplications a pixel
where the composition costs R (q + O), below the dense O q for every R < min(O, q).

The rows are those of a column-pivoted QR of (A V)^T, then exchanged one by one while a coefficient of T
exceeds ``limit``: each exchange multiplies the volume |det A_I| by that coefficient, so the exchanges
end (maxvol; Goreinov, Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin 2010, "How to find a good
submatrix"). Coefficients near 1 at most are what fp16 and int8 need.

Where A V has a numerical rank r below R, r rows carry the product, R - r further rows fill the basis up,
and T has zeros in their columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from .errors import InputError, SelectionError

__all__ = ["Gauge", "regauge"]

_RANK_FLOOR = 1e-13  # a pivot below this fraction of the first is rounding


@dataclass(frozen=True)
class Gauge:
    """A product A V of rank R whose basis filters are R of its own O rows, for each of g groups.

    Attributes:
        rows: (g, R) long, the filters that are the basis, in the order of ``basis``.
        rest: (g, O-R) long, the other filters, ascending.
        mixing: T (g, O-R, R) float64; filter ``rest[i]`` is ``T[i]`` times the basis.
        basis: (g, R, q) float64, the rows ``rows`` of A V.
    """

    rows: Tensor
    rest: Tensor
    mixing: Tensor
    basis: Tensor

    def composition(self) -> Tensor:
        """The dense composition (g, O, R): identity rows at ``rows``, T at ``rest``."""
        groups, rank = self.rows.shape
        found = self.mixing.new_zeros(groups, rank + self.rest.shape[1], rank)
        index = torch.arange(groups)[:, None]
        found[index, self.rows, torch.arange(rank)] = 1.0
        found[index, self.rest] = self.mixing
        return found


def _coordinates(composition: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of A V in an orthonormal basis of their span, (O, r), in pivoted order, and that order (O,)."""
    triangle = scipy.linalg.qr(basis.T.numpy(), mode="r")[0][: min(basis.shape)]
    r, order = scipy.linalg.qr(triangle @ composition.T.numpy(), mode="r", pivoting=True)
    pivots = torch.from_numpy(r.diagonal().copy()).abs()
    rank = int((pivots > pivots[0] * _RANK_FLOOR).sum())
    return torch.from_numpy(r[:rank].T.copy()), torch.from_numpy(order).long()


def _mixing(points: Tensor, order: Tensor) -> Tensor:
    """T (O-r, r) with points[order[r:]] = T points[order[:r]]."""
    rank = points.shape[1]
    chosen, others = points[order[:rank]], points[order[rank:]]
    return torch.linalg.solve(chosen, others, left=False) if rank and len(others) else others


def _exchange(points: Tensor, limit: float) -> Tensor:
    """An order (O,) of the points (O, r) whose first r give coefficients of at most ``limit``."""
    rank = points.shape[1]
    order = torch.arange(len(points))
    mixing = _mixing(points, order)
    while mixing.numel():
        position = int(mixing.abs().argmax())
        row, column = divmod(position, rank)
        pivot = mixing[row, column].clone()
        if pivot.abs() <= limit:
            break
        order[[column, rank + row]] = order[[rank + row, column]]
        # T' = T - (T e_j + e_i) (e_i^T T - e_j^T) / T_ij
        left, right = mixing[:, column].clone(), mixing[row].clone()
        left[row] += 1.0
        right[column] -= 1.0
        mixing -= torch.outer(left / pivot, right)
    return order


def _gauge(composition: Tensor, basis: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, rest, T and basis of one group."""
    filters, rank = composition.shape
    points, pivoted = _coordinates(composition, basis)
    order, sound = _exchange(points, limit), points.shape[1]
    rows, others = order[:rank], order[rank:]
    others = others[pivoted[others].argsort()]
    mixing = composition.new_zeros(filters - rank, rank)
    mixing[:, :sound] = _mixing(points, torch.cat([rows[:sound], others]))
    rows, others = pivoted[rows], pivoted[others]
    return rows, others, mixing, composition[rows] @ basis


def regauge(composition: Tensor, basis: Tensor, limit: float = 1.05) -> Gauge:
    """The product A V written exactly over R of its own O rows.

    Args:
        composition: A (g, O, R), R at most O, real and finite, any floating dtype and device.
        basis: V (g, R, q).
        limit: above 1, the largest coefficient that T may have; the smaller, the more exchanges.

    >>> composition, basis = torch.randn(1, 8, 3).double(), torch.randn(1, 3, 27).double()
    >>> found = regauge(composition, basis)
    >>> found.rows.shape, found.rest.shape, found.mixing.shape
    (torch.Size([1, 3]), torch.Size([1, 5]), torch.Size([1, 5, 3]))
    >>> torch.allclose(found.composition() @ found.basis, composition @ basis)
    True

    Raises:
        InputError: where the factors do not fit each other or are not finite.
        SelectionError: for a limit that is not above 1.
    """
    a, v = (factor.detach().to("cpu", torch.float64) for factor in (composition, basis))
    shapes = f"composition {tuple(a.shape)} and basis {tuple(v.shape)}"
    if a.ndim != 3 or v.ndim != 3 or a.shape[::2] != v.shape[:2] or a.shape[1] < a.shape[2]:
        raise InputError(f"{shapes} do not fit; pass (g, O, R) and (g, R, q) with R at most O")
    if not (a.isfinite().all() and v.isfinite().all()):
        raise InputError(f"{shapes} hold values that are not finite; pass finite factors")
    if not limit > 1:
        raise SelectionError(f"limit={limit!r} lets the exchanges run on; pass a number above 1, as 1.05")
    parts = [_gauge(left, right, limit) for left, right in zip(a, v, strict=True)]
    return Gauge(*(torch.stack(part) for part in zip(*parts, strict=True)))
