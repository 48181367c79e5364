"""Every form of one layer at equal work: ranks, MACs, parameters and the work of a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from .costs import ConvShape, dense_macs, dense_params
from .errors import SelectionError
from .export.layer_times import time_ratio
from .passes.numbering import number_convs
from .passes.ranking import check_ratio, ranks_by_cost
from .structures import FORMS, Ranks, form_macs, form_params, saved_activations, training_macs
from .tables import aligned

__all__ = ["FormCost", "FormTable", "form_table"]


@dataclass(frozen=True, kw_only=True)
class FormCost:
    """What one form of the layer costs, for one image; ratios are to the dense layer.

    Attributes:
        form, ranks: what it is; ``dense`` has no ranks.
        macs, params: of a forward pass, and of its weights.
        macs_ratio, params_ratio: the same over the dense ones.
        training_ratio: MACs of a forward and backward pass over those of the dense layer.
        saved_ratio: what autograd keeps for the backward pass over the same of the dense layer.
        largest: the ranks at which the form is exact.
        time_ratio: the measured time over that of the dense layer; None where nothing was timed.
    """

    form: str
    ranks: Ranks
    macs: int
    params: int
    macs_ratio: float
    params_ratio: float
    training_ratio: float
    saved_ratio: float
    largest: Ranks
    time_ratio: float | None = None


@dataclass(frozen=True)
class FormTable:
    """The costs of every form; prints as a table."""

    shape: ConvShape
    size: tuple[int, int]
    ratio: float
    rows: tuple[FormCost, ...]

    def __iter__(self) -> Iterator[FormCost]:
        return iter(self.rows)

    def __str__(self) -> str:
        shape, (height, width) = self.shape, self.size
        kernel = "x".join(map(str, shape.kernel_size))
        head = f"{shape.in_channels} -> {shape.out_channels} channels, {kernel}, stride 1, {height}x{width}"
        measured = self.rows[0].time_ratio is not None
        rows = [_row(row) for row in self.rows]
        over = any(_part(row) > self.ratio for row in self.rows[1:])
        table = aligned(rows, (*_HEADERS, "time ratio") if measured else _HEADERS, left=("form",))
        return (
            f"{head}: the largest ranks at or under {self.ratio:g} of the MACs (weight: of the weights)"
            f"{', or the smallest where none are' * over}\n\n"
            f"{table}\n\nMACs of one image (FLOPs = 2 x MACs); training: forward and backward, with the "
            "gradient of the input; saved: the activations that autograd keeps for it.\n"
            f"{_MEASURED if measured else _NOT_MEASURED}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"unit": "MACs of one image", "forms": [asdict(row) for row in self.rows]}


_HEADERS = ("form", "rank", "exact at", "MACs", "ratio", "params", "ratio", "training ratio", "saved ratio")


_NOT_MEASURED = "Work is not time and not accuracy: `fxbasis compress` measures the one, your data the other."
_MEASURED = (
    "Time: measured in ONNX Runtime, 1 thread, one image. It says nothing of accuracy: your data does."
)


def _row(row: FormCost) -> list[str]:
    ranks, largest = (", ".join(map(str, found)) for found in (row.ranks, row.largest))
    ratios = (row.macs_ratio, row.params_ratio, row.training_ratio, row.saved_ratio)
    macs, params, *training = (f"{ratio:.3f}" for ratio in ratios)
    time = [] if row.time_ratio is None else [f"{row.time_ratio:.3f}"]
    return [row.form, ranks, largest, f"{row.macs:,}", macs, f"{row.params:,}", params, *training, *time]


def _part(row: FormCost) -> float:
    """What the ranks bound: its MACs, or its weights, over the dense ones."""
    return row.params_ratio if FORMS[row.form].saves == "params" else row.macs_ratio


def form_table(
    shape: ConvShape, size: tuple[int, int], macs_ratio: float = 0.5, *, measured: bool = False
) -> FormTable:
    """Every form of a layer with stride 1 at the largest ranks of at most ``macs_ratio`` of its MACs.

    Args:
        shape: the layer.
        size: height and width of its input and output.
        macs_ratio: in (0, 1]. The weight form, which saves none at inference, has that part of the weights.
        measured: time each form, too, as ``measure_layer`` does.

    Raises:
        SelectionError: for a ratio that is none.

    >>> table = form_table(ConvShape(64, 64, (3, 3)), (56, 56))
    >>> [(row.form, row.ranks) for row in table][1:4]
    [('output', (28,)), ('gauge', (30,)), ('weight', (28,))]
    """
    check_ratio("macs_ratio", macs_ratio)
    if min(size) < 1:
        raise SelectionError(f"a layer of {size[0]}x{size[1]} has no positions; pass sizes from 1")
    channels = (shape.in_channels, shape.out_channels, shape.kernel_size)
    padding = (shape.kernel_size[0] // 2, shape.kernel_size[1] // 2)
    conv = nn.Conv2d(*channels, padding=padding, groups=shape.groups, bias=shape.bias, device="meta")
    record = replace(number_convs(conv)[0], output_size=size, input_size=size)
    rows = [_dense(shape, size)]
    for name, form in FORMS.items():
        rows.append(_cost(name, shape, size, ranks_by_cost(record, macs_ratio, form.saves, name)))
    if measured:
        rows = [replace(row, time_ratio=time_ratio(record, row.form, row.ranks)) for row in rows]
    return FormTable(shape, size, macs_ratio, tuple(rows))


def _dense(shape: ConvShape, size: tuple[int, int]) -> FormCost:
    return FormCost(
        form="dense",
        ranks=(),
        macs=dense_macs(shape, size),
        params=dense_params(shape),
        macs_ratio=1.0,
        params_ratio=1.0,
        training_ratio=1.0,
        saved_ratio=1.0,
        largest=(),
    )


def _cost(form: str, shape: ConvShape, size: tuple[int, int], ranks: Ranks) -> FormCost:
    macs, params = form_macs(form, shape, ranks, size, size), form_params(form, shape, ranks)
    dense = dense_macs(shape, size)
    return FormCost(
        form=form,
        ranks=ranks,
        macs=macs,
        params=params,
        macs_ratio=macs / dense,
        params_ratio=params / dense_params(shape),
        training_ratio=training_macs(form, shape, ranks, size, size) / (3 * dense),
        saved_ratio=saved_activations(form, shape, ranks, size, size) / (shape.in_channels * math.prod(size)),
        largest=FORMS[form].largest_ranks(shape),
    )
