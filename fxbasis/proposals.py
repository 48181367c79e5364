"""What could stand in the place of each convolution: forms and ranks, their costs, their fits to data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .compositions import GaugeComposition, ReducedComposition
from .datafit import DIRECT, SHORT, Kept, fit_to_data, short_fits
from .factors import folded
from .passes.ranking import ranks_by_cost, rounded_down
from .passes.records import NO_GAIN, OK, ConvRecord
from .recipe import LayerPlan
from .statistics import LayerStatistics
from .structures import FORMS, form_macs, form_params

__all__ = ["PROPOSED", "Proposal", "excluded", "proposals_of", "shift_of", "step_weights"]

PROPOSED = ("cp", "gauge", "spatial", "cp4", "tucker2", "input", "tt", "reduced", "output")
"""Every form that can be the best one; weight cannot: its work is dense's, its parameters are output's."""
RATIOS = (0.1, 0.15, 0.22, 0.3, 0.4, 0.52, 0.67, 0.85)
EDGES = ((64, 16), (8, 4))
"""Pairs of a least number of channels and the step that ranks lie on from there: ONNX Runtime takes 16
channels together (8 without AVX-512), and misses its fast depthwise kernels where 4 does not divide them."""


@dataclass(frozen=True)
class Proposal:
    """One form and rank for one layer; its costs are those of all calls, for the example inputs' batch.

    ``ratio`` is its MACs over those of the dense layer.
    """

    layer: LayerPlan
    macs: int
    params: int
    ratio: float


def excluded(record: ConvRecord) -> str:
    """Why nothing is proposed for a convolution; empty where something is."""
    if record.status not in (OK, NO_GAIN) or record.groups == record.out_channels > 1:
        return record.reason or record.status
    if record.prepares or record.effective:
        return "its class does more than a Conv2d: no fit to data is known"
    if record.macs is None or not record.calls:
        return "never called"
    return ""


def proposals_of(record: ConvRecord, forms: Sequence[str] = PROPOSED, multiple: int = 1) -> list[Proposal]:
    """Every form at ranks from a tenth of the layer's MACs up, cheaper than dense, each once.

    ``multiple`` divides every rank; a layer too small for that has no proposals. Ranks that it leaves free
    lie on ``EDGES``.
    """
    found: dict[tuple[str, tuple[int, ...]], Proposal] = {}
    for form in dict.fromkeys(_for_kernel(record, form) for form in forms):
        for ratio in RATIOS:
            ranks = ranks_by_cost(record, ratio, "macs", form)
            ranks = rounded_down(record, ranks, multiple if multiple > 1 else _edge(record, ranks), form)
            made = _proposal(record, form, ranks)
            whole = all(rank % multiple == 0 for rank in ranks)
            if whole and made.macs < (record.macs or 0):
                found.setdefault((form, ranks), made)
    return list(found.values())


def _edge(record: ConvRecord, ranks: tuple[int, ...]) -> int:
    """What ranks are rounded to, without losing more of them than the group's number makes necessary."""
    fitting = (step for least, step in EDGES if min(ranks) >= math.lcm(step, record.groups) // step * least)
    return next(fitting, 1)


def _for_kernel(record: ConvRecord, form: str) -> str:
    """A 1x1 kernel has no taps to split: chains are the output form then, and gauge is cheaper."""
    chains = ("cp", "cp4", "spatial", "tucker2", "input", "tt")
    return "gauge" if record.kernel_size == (1, 1) and form in chains else form


def _proposal(record: ConvRecord, form: str, ranks: tuple[int, ...]) -> Proposal:
    layer = record.decided(form=form, method=FORMS[form].methods[0], ranks=ranks)
    macs = sum(
        form_macs(form, record.shape, ranks, size, before, batch) for batch, size, before in record.sizes
    )
    return Proposal(layer, macs, form_params(form, record.shape, ranks), macs / (record.macs or 1))


def step_weights(
    proposals: Sequence[Proposal],
    weight: Tensor,
    statistics: LayerStatistics | None,
    kept: Kept | None = None,
    *,
    with_mean: bool,
) -> list[dict[str, Tensor]]:
    """The steps' weights, fitted to the data where there are statistics, otherwise to the weight alone.

    Args:
        proposals: all of one layer.
        weight: of that layer, float64.
        statistics: of that layer, or None.
        kept: decompositions that serve all ranks of the layer; filled here.
        with_mean: whether a constant can be added to its outputs.
    """
    layers = [proposal.layer for proposal in proposals]
    kept = {} if kept is None else kept
    if statistics is None:
        return short_fits(weight, layers, kept)
    begun = [layer for layer in layers if layer.form not in DIRECT]
    starts = {layer.key: start for layer, start in zip(begun, short_fits(weight, begun, kept), strict=True)}
    moment = statistics.covariance if with_mean else statistics.moment
    return [
        fit_to_data(weight, layer, moment, statistics.metric, starts.get(layer.key), SHORT, kept)
        for layer in layers
    ]


def shift_of(proposal: Proposal, weight: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Folded minus dense weight, float64."""
    layer = proposal.layer
    if layer.form in _COMPOSITIONS:
        weights = {**weights, "composition.weight": _dense_composition(layer, weights)}
    return folded(layer, weights) - weight.detach().double()


_COMPOSITIONS: dict[str, type[GaugeComposition | ReducedComposition]] = {
    "gauge": GaugeComposition,
    "reduced": ReducedComposition,
}


def _dense_composition(layer: LayerPlan, weights: Mapping[str, Tensor]) -> Tensor:
    """The weight of the 1x1 convolution with the same function as a composition that is none."""
    made = _COMPOSITIONS[layer.form](layer.steps[-1], torch.empty(0, dtype=torch.float64), bias=False)
    state = made.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, part in state.items():
            part.copy_(weights[f"composition.{name}"].reshape(part.shape))
    return made.dense_weight().detach()
