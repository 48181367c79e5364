"""Where a CP decomposition begins: the largest components of a weight's slices, without an iteration.

All modes but the two longest are turned to their principal axes and index slices; the singular vectors of the
slices are components, prod / max (O, I, taps) in all, which add up to the weight exactly. The R largest are a
start for rank R, so one decomposition serves every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bases import decompose
from .errors import SelectionError
from .input_moments import weighed
from .tensor_bases import checked, leading

__all__ = ["components", "modes_of", "principal", "unit_norm"]


def modes_of(shape: Sequence[int], factors: int) -> tuple[int, ...]:
    """The modes of the tensor of a block (O, I, K_h, K_w) that has so many factors."""
    if factors not in (3, 4):
        raise SelectionError(f"factors={factors!r} is not known; choose 3, or 4 to split the taps")
    out, into, height, width = shape
    return (out, into, height * width) if factors == 3 else (out, into, height, width)


def unit_norm(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Each group over its norm, and the norms (g, 1, 1)."""
    scale = blocks.flatten(1).norm(dim=1)[:, None, None]
    return blocks / torch.where(scale > 0, scale, 1.0)[..., None, None], scale


def principal(weight: Tensor, rank: int, factors: int = 3) -> list[Tensor]:
    """The largest components of a weight's slices, largest first, so that smaller ranks are its beginning.

    In the metric that ``cp`` fits in.

    Args:
        weight: blocks (g, O, I, K_h, K_w), each of which is scaled to norm 1.
        rank: how many, (g, R, size) for each mode.
        factors: 3 or 4.

    >>> [tuple(factor.shape) for factor in principal(torch.randn(1, 8, 4, 3, 3), 10)]
    [(1, 10, 8), (1, 10, 4), (1, 10, 9)]
    """
    blocks = checked(weight, rank=rank)
    modes = modes_of(blocks.shape[1:], factors)
    return components(weighed(unit_norm(blocks)[0]).reshape(-1, *modes), rank)


def components(tensor: Tensor, rank: int) -> list[Tensor]:
    """The ``rank`` largest components of the slices of (g, *modes), the shortest modes being indices."""
    order = sorted(range(1, tensor.ndim), key=lambda mode: tensor.shape[mode])
    core, axes = tensor.permute(0, *order), []
    for place in range(1, tensor.ndim - 2):
        moved = core.movedim(place, 1)
        axes.append(leading(moved.flatten(2), moved.shape[1]))
        core = (axes[-1].mT @ moved.flatten(2)).view_as(moved).movedim(1, place)
    slices = math.prod(core.shape[:-2])
    svd = decompose(core.reshape(slices * core.shape[-2], -1, 1, 1), slices, "svd")
    depth, row = svd.energies.shape[1], torch.arange(len(tensor))[:, None]
    chosen = svd.energies.reshape(len(tensor), -1).argsort(descending=True, stable=True)[:, :rank]
    places, level = _unravelled(chosen // depth, core.shape[1:-2]), chosen % depth
    found = [axis.mT[row, place] for axis, place in zip(axes, places, strict=True)]
    index = (row, *places, level)
    found.append(svd.composition.reshape(*core.shape[:-1], depth).mT[index])
    found.append(svd.basis.reshape(*core.shape[:-2], depth, -1)[index])
    return [found[order.index(mode)] for mode in range(1, tensor.ndim)]


def _unravelled(flat: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Indices of each axis; torch.unravel_index would import sympy, which takes seconds."""
    found: list[Tensor] = []
    for size in reversed(shape):
        found.insert(0, flat % size)
        flat = flat // size
    return found
