"""A plan judged by time: what measures slower than dense stays dense, a rank just above a step is named."""

from __future__ import annotations

import warnings
from dataclasses import replace

from .errors import FxBasisWarning
from .export.layer_times import threads_text, time_ratio
from .passes.ranking import cost_ratio, groups_of, rounded_down
from .passes.records import ConvRecord, ConvTable
from .progress import progress
from .recipe import DENSE, LayerPlan, Plan
from .structures import Ranks

__all__ = ["BLOCK", "SHARE", "without_slower"]

BLOCK = 16
"""Channels of a group that ONNX Runtime computes at once with AVX-512; the rank after that begins a block."""

SHARE = 0.05
"""A rank lies just above a step where the last multiple of ``BLOCK`` saves this much more time than MACs."""


def without_slower(plan: Plan, table: ConvTable, threads: int = 1) -> Plan:
    """The plan without the layers that measure slower than dense in ONNX Runtime; warns of each of them.

    A layer that stays rewritten is warned of where its rank lies just above a step of the time. The weight
    form, which folds to the dense layer, and layers that are not called are not timed.

    Args:
        plan: what is to be rewritten.
        table: the records of the same model, with sizes.
        threads: of one run.

    Raises:
        ExportError: for threads that mean nothing.
    """
    pairs = list(zip(plan, table, strict=True))
    layers = tuple(_judged(layer, record, threads) for layer, record in progress(pairs, "timing"))
    return Plan(layers, plan.forecast)


def _judged(layer: LayerPlan, record: ConvRecord, threads: int) -> LayerPlan:
    if not layer.called or record.input_size is None:
        return layer
    ratio = time_ratio(record, layer.form, layer.ranks, threads)
    lower = _last_block(layer, record)
    found = ratio if lower == layer.ranks else time_ratio(record, layer.form, lower, threads)
    what = f"{layer}: rank {_text(layer.ranks)} of the {layer.form} form"
    measured = f"measured {ratio:.2f} times dense in ONNX Runtime, {threads_text(threads)}"
    better = f"pass rank {_text(lower)}, which measured {found:.2f}"
    if round(ratio, 2) > 1:
        remedy = better if found < 1 else "keep_if_slower=True (--keep-if-slower) rewrites it all the same"
        _warn(f"{what} {measured}, so it stays dense; {remedy}")
        dense = replace(layer, form=DENSE, method="", ranks=(), fixed_basis=False, effective=False)
        return replace(dense, reason=measured)
    macs = cost_ratio(record, lower, layer.form) / cost_ratio(record, layer.ranks, layer.form)
    if found / ratio < macs - SHARE:
        _warn(f"{what} lies just above a step: it {measured}; {better}")
    return layer


def _last_block(layer: LayerPlan, record: ConvRecord) -> Ranks:
    """The ranks down to the last multiple of a block; those below the first stay."""
    return rounded_down(record, layer.ranks, BLOCK * groups_of(record, layer.form), layer.form)


def _text(ranks: Ranks) -> str:
    return ", ".join(map(str, ranks))


def _warn(text: str) -> None:
    warnings.warn(text, FxBasisWarning, stacklevel=8)
