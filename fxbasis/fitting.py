"""The numbers of a form: one fit of a convolution's weight, as the weights of its steps by name.

The matrix forms are one factorisation W ~ A V of the weight, seen as a matrix (``bases``), and differ in what
its rows and columns are: filters and their weights (output, gauge, weight), input channels and what follows
from them (input), or what lies before and behind the cut between the axes (spatial).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bases import decompose
from .recipe import LayerPlan

__all__ = ["fit"]


def fit(weight: Tensor, plan: LayerPlan) -> dict[str, Tensor]:
    """The weights of the steps by name, ``"basis.weight"`` and so on, in float64, from one decomposition.

    Args:
        weight: (out_channels, in_channels / groups, K_h, K_w), real and finite.
        plan: form, method and ranks.
    """
    groups = plan.steps[-1].groups
    blocks = weight.detach().to("cpu", torch.float64).reshape(groups, -1, *weight.shape[1:])
    return _matrix_fit(blocks, plan, plan.ranks[0] // groups)


def _matrix_fit(blocks: Tensor, plan: LayerPlan, rank: int) -> dict[str, Tensor]:
    groups, filters, channels, height, width = blocks.shape
    if plan.form == "input":
        rows = blocks.transpose(1, 2).reshape(groups, channels, -1)
    elif plan.form == "spatial":
        rows = blocks.permute(0, 1, 4, 2, 3).reshape(groups, filters * width, -1)
    else:
        rows = blocks.reshape(groups, filters, -1)
    found = decompose(rows.flatten(0, 1), groups, plan.method).factors(rank)
    if plan.form == "input":
        taps = found.basis.reshape(groups, rank, filters, height, width).transpose(1, 2)
        return {"basis.weight": found.composition.mT, "composition.weight": taps}
    if plan.form == "spatial":
        taps = found.composition.reshape(groups, filters, width, rank).transpose(2, 3)
        return {"basis.weight": found.basis, "composition.weight": taps}
    return {"basis.weight": found.basis, "composition.weight": found.composition}
