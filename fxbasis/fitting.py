"""The numbers of a form: one fit of a convolution's weight, as the weights of its steps by name.

The matrix forms are one factorisation W ~ A V of the weight, seen as a matrix (``bases``), and differ in what
its rows and columns are: filters and their weights (output, gauge, weight), input channels and what follows
from them (input), or what lies before and behind the cut between the axes (spatial). The tensor forms
come from ``tensor_bases`` and ``cp``, the reduced form from ``coding``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bases import Decomposition, decompose
from .coding import encode_groups
from .cp import cp
from .gauge import Gauge, regauge
from .recipe import LayerPlan
from .structures import Ranks
from .tensor_bases import tt, tucker2

__all__ = ["Unfolding", "fit", "gauge_factors", "named", "unfoldings"]


@dataclass(frozen=True)
class Unfolding:
    """One cut of a weight between its axes, for one rank of a form.

    Attributes:
        energies: (g, min(rows, columns)), squared singular values of each group's matrix, largest first.
        rows, columns: the shape of that matrix.
    """

    energies: Tensor
    rows: int
    columns: int


def unfoldings(weight: Tensor, groups: int, form: str) -> tuple[Unfolding, ...]:
    """The matrices whose ranks the form cuts, by their singular values; cp and reduced have none.

    Args:
        weight: (out_channels, in_channels / groups, K_h, K_w), real and finite.
        groups: of the form (the weight form has one for a depthwise convolution).
        form: a key of ``structures.FORMS``.
    """
    blocks = weight.detach().to("cpu", torch.float64).reshape(groups, -1, *weight.shape[1:])
    if form in ("cp", "cp4", "reduced"):
        return ()
    if form in _TENSOR_FORMS:
        axes = blocks.permute(0, 2, 3, 4, 1)  # (g, I, K_h, K_w, O)
        matrices = [axes.flatten(1, cut).flatten(2) for cut in ((1, 3) if form == "tucker2" else (1, 2, 3))]
    else:
        matrices = [_matrix(blocks, form)]
    return tuple(_unfolding(matrix) for matrix in matrices)


def _unfolding(matrix: Tensor) -> Unfolding:
    groups, rows, columns = matrix.shape
    return Unfolding(decompose(matrix.flatten(0, 1), groups, "svd").energies, rows, columns)


def fit(
    weight: Tensor, plan: LayerPlan, moment: Tensor | None = None, metric: Tensor | None = None
) -> dict[str, Tensor]:
    """The weights of the steps by name, ``"basis.weight"`` and so on, in float64, from one decomposition.

    Args:
        weight: (out_channels, in_channels / groups, K_h, K_w), real and finite.
        plan: form, method and ranks.
        moment: (g, q, q), of the patches; of the reduced form the code then is for their outputs.
        metric: (C, C), of the outputs; of the reduced form its diagonal weighs their errors.
    """
    groups = plan.steps[-1].groups
    blocks = weight.detach().to("cpu", torch.float64).reshape(groups, -1, *weight.shape[1:])
    ranks = tuple(rank // groups for rank in plan.ranks)
    if plan.form in _TENSOR_FORMS:
        return named(_TENSOR_FORMS[plan.form](blocks, ranks, plan.method), plan)
    if plan.form == "reduced":
        return _reduced(blocks.flatten(2), plan, ranks, moment, metric)
    return sliced(decomposed(weight, plan), weight, plan)


def decomposed(weight: Tensor, plan: LayerPlan) -> Decomposition:
    """The decomposition of a form of two dense steps, for every rank."""
    groups = plan.steps[-1].groups
    blocks = weight.detach().to("cpu", torch.float64).reshape(groups, -1, *weight.shape[1:])
    return decompose(_matrix(blocks, plan.form).flatten(0, 1), groups, plan.method)


def _tucker2(blocks: Tensor, ranks: Ranks, method: str) -> tuple[Tensor, ...]:
    return tucker2(blocks, (ranks[0], ranks[1]), method)


def _cp(blocks: Tensor, ranks: Ranks, _: str) -> tuple[Tensor, ...]:
    return cp(blocks, ranks[0])


def _cp4(blocks: Tensor, ranks: Ranks, _: str) -> tuple[Tensor, ...]:
    return cp(blocks, ranks[0], 4)


def _tt(blocks: Tensor, ranks: Ranks, method: str) -> tuple[Tensor, ...]:
    return tt(blocks, (ranks[0], ranks[1], ranks[2]), method)


_TENSOR_FORMS = {"tucker2": _tucker2, "cp": _cp, "cp4": _cp4, "tt": _tt}


def named(factors: tuple[Tensor, ...], plan: LayerPlan) -> dict[str, Tensor]:
    """The blocks (g, out, in, k_h, k_w) by the names of the steps; ranks that carry nothing are zeros."""
    groups, found = plan.groups, {}
    for step, factor in zip(plan.steps, factors, strict=True):
        sizes = (step.out_channels // groups, step.in_channels // step.groups)
        made = factor.new_zeros(groups, *sizes, *step.kernel_size)
        made[:, : factor.shape[1], : factor.shape[2]] = factor
        found[f"{step.name}.weight"] = made.flatten(0, 1)
    return found


def _matrix(blocks: Tensor, form: str) -> Tensor:
    """The weight as (g, rows, columns): rows are input channels, filters and columns of taps, or filters."""
    groups, filters, channels, _, width = blocks.shape
    if form == "input":
        return blocks.transpose(1, 2).reshape(groups, channels, -1)
    if form == "spatial":
        return blocks.permute(0, 1, 4, 2, 3).reshape(groups, filters * width, -1)
    return blocks.reshape(groups, filters, -1)


def sliced(decomposition: Decomposition, weight: Tensor, plan: LayerPlan) -> dict[str, Tensor]:
    """The weights of the steps at the plan's rank, from what ``decomposed`` gives."""
    groups, (height, width) = plan.steps[-1].groups, weight.shape[2:]
    filters, rank = weight.shape[0] // groups, plan.rank // groups
    found = decomposition.factors(rank)
    if plan.form == "input":
        taps = found.basis.reshape(groups, rank, filters, height, width).transpose(1, 2)
        return {"basis.weight": found.composition.mT, "composition.weight": taps}
    if plan.form == "spatial":
        taps = found.composition.reshape(groups, filters, width, rank).transpose(2, 3)
        return {"basis.weight": found.basis, "composition.weight": taps}
    if plan.form == "gauge":
        return gauge_factors(regauge(found.composition, found.basis))
    return {"basis.weight": found.basis, "composition.weight": found.composition}


def _reduced(
    rows: Tensor, plan: LayerPlan, ranks: Ranks, moment: Tensor | None, metric: Tensor | None
) -> dict[str, Tensor]:
    """Atoms and code of the filters (g, C/g, q); copies stand first, then sums, both in their order."""
    groups, filters, _ = rows.shape
    images = rows if moment is None else rows @ moment
    weights = None if metric is None else metric.diagonal().reshape(groups, filters)
    codes = encode_groups(images @ rows.mT, ranks[0], ranks[1] / filters, plan.method, weights)
    shift = ranks[0] * torch.arange(groups)[:, None]
    first = (torch.stack([code.first for code in codes]) + shift).flatten()
    second = torch.stack([code.second for code in codes])
    second = torch.where(second < 0, -1, second + shift).flatten()
    u, v = (torch.cat([getattr(code, name) for code in codes]) for name in "uv")
    places = (second >= 0).to(torch.uint8).argsort(stable=True)
    sums = places[groups * (filters - ranks[1]) :]
    return {
        "basis.weight": torch.stack([code.atoms for code in codes]) @ rows,
        "composition.weight": torch.cat([u[places], v[sums]]),
        "composition.first": first[places],
        "composition.second": second[sums],
        "composition.order": places.argsort(),
    }


def gauge_factors(gauge: Gauge) -> dict[str, Tensor]:
    """The weights of the gauge form by name.

    Copies stand first, group by group, then the combinations; each output knows its place among them.
    """
    groups, made = gauge.rows.shape[0], gauge.rest.shape[1]
    filters = gauge.rows.shape[1] + made
    first = filters * torch.arange(groups)[:, None]
    places = torch.cat([(first + gauge.rows).flatten(), (first + gauge.rest).flatten()])
    mixing = gauge.mixing.flatten(0, 1)
    return {"basis.weight": gauge.basis, "composition.weight": mixing, "composition.order": places.argsort()}
