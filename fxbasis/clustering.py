"""Filters told apart by their Gram matrix: which of them span the others, which of them lie together.

G (O, O) holds the inner products of O filters, in the weight or in any metric of the layer's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["agglomerate", "pivoted_filters"]


def pivoted_filters(gram: Tensor, rank: int) -> Tensor:
    """The filters (R,) that a pivoted Cholesky factorisation of G takes first: greedy, near the best span.

    >>> gram = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
    >>> pivoted_filters(gram, 2)
    tensor([1, 2])
    """
    left, factor = gram.diagonal().clone(), gram.new_zeros(len(gram), rank)
    floor, chosen = 1e-12 * float(left.max()), torch.zeros(rank, dtype=torch.long)
    for step in range(rank):
        pivot = chosen[step] = left.argmax()
        if left[pivot] > floor:
            column = gram[:, pivot] - factor[:, :step] @ factor[pivot, :step]
            factor[:, step] = column / left[pivot].sqrt()
            left = (left - factor[:, step].square()).clamp(min=0.0)
        left[chosen[: step + 1]] = -1.0
    return chosen


def _merging_costs(products: Tensor, sizes: Tensor, scaled: bool, one: Tensor) -> Tensor:
    """What it costs to give the clusters ``one`` and each of the others one atom: (..., O).

    Plain: Ward's n m / (n + m) |p - q|^2. Scaled: the smaller eigenvalue of the 2 x 2 Gram matrix.
    """
    squares, cross = products.diagonal(), products[one]
    mine = squares[one][..., None]
    if scaled:
        return 0.5 * (mine + squares - ((mine - squares).square() + 4 * cross.square()).sqrt())
    weight = sizes[one][..., None] * sizes / (sizes[one][..., None] + sizes)
    return weight * (mine + squares - 2 * cross)


def _merged(products: Tensor, sizes: Tensor, scaled: bool, i: int, j: int) -> tuple[float, float]:
    """The coefficients of clusters i and j in the atom of their union."""
    if not scaled:
        share = float(sizes[i] / (sizes[i] + sizes[j]))
        return share, 1.0 - share
    pair = torch.tensor([i, j])
    top = torch.linalg.eigh(products[pair][:, pair])[1][:, 1]
    return float(top[0]), float(top[1])


def agglomerate(gram: Tensor, rank: int, scaled: bool) -> tuple[Tensor, Tensor]:
    """Atoms (R, O) of the R clusters left after merging two at a time, and each filter's cluster (O,).

    The two clusters merged are those that cost the least, each with one atom for all its filters: their
    mean (Ward 1963) or, ``scaled``, the line nearest to their two atoms.

    >>> filters = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    >>> agglomerate(filters @ filters.T, 2, scaled=True)[1]
    tensor([0, 1, 0])
    """
    products, atoms = gram.clone(), torch.eye(len(gram), dtype=gram.dtype)
    sizes, owner = gram.new_ones(len(gram)), torch.arange(len(gram))
    costs = _merging_costs(products, sizes, scaled, owner).fill_diagonal_(torch.inf)
    least, nearest = costs.min(dim=1)
    for _ in range(len(gram) - rank):
        i = int(least.argmin())
        j = int(nearest[i])
        x, y = _merged(products, sizes, scaled, i, j)
        atoms[i] = x * atoms[i] + y * atoms[j]
        products[i] = x * products[i] + y * products[j]
        products[:, i] = x * products[:, i] + y * products[:, j]
        sizes[i] += sizes[j]
        gone = costs[i].isinf()
        owner[owner == j] = i
        fresh = _merging_costs(products, sizes, scaled, torch.tensor(i)).masked_fill(gone, torch.inf)
        costs[i] = costs[:, i] = fresh
        costs[j] = costs[:, j] = torch.inf
        stale = (nearest == i) | (nearest == j)
        stale[[i, j]] = True
        least, nearest = torch.where(fresh < least, fresh, least), nearest.where(fresh >= least, i)
        least[stale], nearest[stale] = costs[stale].min(dim=1)
    kept, owner = torch.unique(owner, return_inverse=True)
    return atoms[kept], owner
