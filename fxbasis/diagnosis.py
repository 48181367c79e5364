"""``doctor``: what a compression would meet in a model, before any work.

Which parts become graphs, which stay Python and where in the source the obstacle is; which convolutions can
be rewritten and which cannot and why; the rank below which each is cheaper; and how far the work of the whole
model can fall. Nothing is decomposed, and no time is measured: it falls less than MACs do.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from torch import nn

from .errors import FxBasisWarning
from .passes.numbering import conv_layers, number_convs
from .passes.profiling import profile
from .passes.ranking import ranks_by_size
from .passes.records import NO_GAIN, OK, UNSUPPORTED, ConvRecord, ConvTable
from .passes.rewriting import weight_flaw
from .passes.tracing import Part, parts_of, trace
from .running import ExampleInputs
from .tables import aligned

__all__ = ["Diagnosis", "doctor"]

SIZES = (0.75, 0.5, 0.25)
"""Fractions of the filters for which the work is foretold."""


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found. Prints as one table with what must be known about it.

    Attributes:
        model: its class. parts: which submodules are graphs, and which stay Python and why.
        convs: every convolution with its status and reason; calls of F.conv2d in ``convs.functional``.
        macs: of the whole model on the example inputs, whole batch, everything that is counted.
        outlook: for each size in ``SIZES``, and for the smallest rank under the key ``"floor"``: MACs of the
            whole model under ``layers="all"`` over those of the dense one.
    """

    model: str
    parts: tuple[Part, ...]
    convs: ConvTable
    macs: int
    outlook: dict[str, float]

    @property
    def python_parts(self) -> tuple[Part, ...]:
        """The parts that stay Python."""
        return tuple(part for part in self.parts if not part.graph)

    def part_of(self, name: str) -> Part:
        """The innermost part that holds a convolution."""
        holding = [p for p in self.parts if not p.name or f"{name}.".startswith(f"{p.name}.")]
        return max(holding, key=lambda part: len(part.name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        convs = [
            asdict(record)
            | {"graph": self.part_of(record.name).graph, "break_even_rank": record.shape.break_even_rank}
            for record in self.convs
        ]
        return {
            "model": self.model,
            "parts": [asdict(part) for part in self.parts],
            "convs": convs,
            "functional": [asdict(call) for call in self.convs.functional],
            "macs": self.macs,
            "outlook": self.outlook,
        }

    def __str__(self) -> str:
        table = "\n".join([self._convs(), *map(str, self.convs.functional)])
        sections = [table, self._counts(), self._traced()]
        if self.python_parts:
            rows = [[part.name or "(the model)", part.reason] for part in self.python_parts]
            sections.append(aligned(rows, ["stays Python", "obstacle"], left=["stays Python", "obstacle"]))
        return "\n\n".join([*sections, self._outlook()])

    def _convs(self) -> str:
        headers = ["#", "name", "weight", "of all MACs", "runs in", "R*", "at 0.5", "verdict"]
        rows = [self._row(record) for record in self.convs]
        return aligned(rows, headers, left=["name", "weight", "runs in", "verdict"])

    def _row(self, record: ConvRecord) -> list[str]:
        shape = record.shape
        weight = (record.out_channels, record.in_channels // record.groups, *record.kernel_size)
        return [
            str(record.index),
            record.name,
            "x".join(map(str, weight)),
            f"{(record.macs or 0) / self.macs:.1%}" if self.macs else "-",
            "graph" if self.part_of(record.name).graph else "Python",
            "-" if record.status == UNSUPPORTED else f"{shape.break_even_rank:.1f}",
            f"{ranks_by_size(record, 0.5)[0] / shape.break_even_rank:.2f}" if record.status == OK else "-",
            f"{record.status}: {record.reason}" if record.reason else record.status,
        ]

    def _counts(self) -> str:
        found = Counter(record.status for record in self.convs)
        counts = ", ".join(f"{count} {status}" for status, count in found.most_common())
        return (
            f"{len(self.convs)} convolutions: {counts or 'none'}. R* is the break-even rank;\n"
            '"at 0.5" is the work of the layer with half as many basis convolutions as filters, over its own.'
        )

    def _traced(self) -> str:
        graphs = sum(part.graph for part in self.parts)
        if not self.python_parts:
            both = "equal to the model in train() and in eval()"
            reason = self.parts[0].reason
            return f"{self.model} is one torch.fx graph, " + (
                f"equal to the model in eval(); in train() its own Python runs: {reason}."
                if reason
                else f"{both}."
            )
        whole = "is a graph with parts that stay" if self.parts[0].graph else "stays"
        return f"{self.model} {whole} Python; {graphs} graphs in all, equal to what they stand for."

    def _outlook(self) -> str:
        if not any(record.status == OK for record in self.convs):
            return "No convolution can gain: there is nothing to compress."
        sizes = ", ".join(f"{self.outlook[str(size)]:.2f} at size={size}" for size in SIZES)
        return (
            f'Work of the whole model under layers="all", over {self.macs:,} MACs: {sizes}; never below '
            f"{self.outlook['floor']:.2f}.\nTime falls less than work, and accuracy is not looked at here: "
            "`fxbasis compress` measures the one, your data the other."
        )


def doctor(model: nn.Module, example_inputs: ExampleInputs) -> Diagnosis:
    """Look at a model before any work: parts, convolutions, obstacles, break-even ranks, what can be gained.

    Args:
        model: any nn.Module; it is not touched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        TraceError: when the model cannot be copied.
        LayerError: when a lazy convolution has no weight yet.
        InputError: when the model fails on the example inputs.

    >>> import torch
    >>> found = doctor(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)), torch.zeros(1, 3, 8, 8))
    >>> [record.status for record in found.convs], [part.graph for part in found.parts], found.macs
    (['ok', 'ok'], [True], 24768)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxBasisWarning)  # what they say stands in the parts
        traced = trace(model, example_inputs)
    table = _with_flaws(number_convs(traced, example_inputs), traced)
    macs = profile(traced, example_inputs).macs
    outlook = {str(size): _ratio(table, macs, size) for size in SIZES} | {"floor": _ratio(table, macs, 1)}
    return Diagnosis(type(model).__name__, parts_of(traced), table, macs, outlook)


def _with_flaws(table: ConvTable, traced: nn.Module) -> ConvTable:
    """The table, in which a weight that compress refuses for its values is not ok."""
    layers, records = conv_layers(traced), []
    for record in table:
        asked = record.status in (OK, NO_GAIN)
        flaw = weight_flaw(cast(nn.Conv2d, layers[record.name])).partition("; ")[0] if asked else ""
        records.append(replace(record, status=UNSUPPORTED, reason=flaw) if flaw else record)
    return ConvTable(records, table.functional)


def _ratio(table: ConvTable, macs: int, size: float) -> float:
    """MACs after over before, with each layer left dense that would not be cheaper."""
    saved = 0.0
    for record in table:
        if record.status == OK:
            part = ranks_by_size(record, size)[0] / record.shape.break_even_rank
            saved += (record.macs or 0) * max(0.0, 1.0 - part)
    return 1.0 - saved / macs if macs else 1.0
