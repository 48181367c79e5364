"""What is known of each convolution of a model: a table of records that prints, and goes into CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

from ..costs import ConvShape, dense_macs
from ..files import write_whole
from ..recipe import LayerPlan
from ..tables import aligned
from .watching import FunctionalConv

__all__ = ["COMPRESSED", "DEPTHWISE", "NO_GAIN", "OK", "UNSUPPORTED", "ConvRecord", "ConvTable"]

OK = "ok"
NO_GAIN = "no gain at any rank"
UNSUPPORTED = "unsupported"
DEPTHWISE = "depthwise: a group of one filter has no smaller basis"
COMPRESSED = "compressed"


@dataclass(frozen=True, kw_only=True)
class ConvRecord:
    """One convolution.

    Attributes:
        index: its number, from 1. name: its first qualified name.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: its options.
        output_size, input_size: (H, W) of its first call; None without inputs or when it is never called.
        macs: multiply-adds of all calls for the example inputs, batch included; None without inputs.
        params: weights and biases. order: position of its first call, from 1. calls: how many calls.
        status: ``ok``, ``no gain at any rank``, ``unsupported`` or ``compressed``; reason: why.
        effective: its own class computes its kernel from the stored weight (weight standardisation).
        prepares: its own class prepares the input (pads by itself).
        elements: of the outputs of all calls, batch included; None without inputs.
        sizes: of each call the batch, output (H, W) and input (H, W).
    """

    index: int
    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    bias: bool
    output_size: tuple[int, int] | None
    macs: int | None
    params: int
    order: int | None
    calls: int | None
    status: str
    reason: str
    effective: bool = False
    prepares: bool = False
    input_size: tuple[int, int] | None = None
    elements: int | None = None
    sizes: tuple[tuple[int, tuple[int, int], tuple[int, int]], ...] = ()

    @property
    def shape(self) -> ConvShape:
        """The shape for the closed forms of ``costs``."""
        return ConvShape(self.in_channels, self.out_channels, self.kernel_size, self.groups, self.bias)

    def decided(self, **decision: Any) -> LayerPlan:
        """The line of a plan for it; dense unless the decision has a form."""
        return LayerPlan(
            number=self.index,
            name=self.name,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            groups=self.groups,
            **decision,
        )

    def each_call(self) -> list[ConvRecord]:
        """A record of every call alone, with its sizes; MACs as of a dense layer."""
        return [
            replace(
                self,
                output_size=size,
                input_size=before,
                macs=dense_macs(self.shape, size, batch),
                calls=1,
                elements=batch * self.out_channels * size[0] * size[1],
                sizes=((batch, size, before),),
            )
            for batch, size, before in self.sizes
        ]

    def __str__(self) -> str:
        weight = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return f"conv {self.index} ({self.name}), weight {weight}"


class ConvTable(Sequence[ConvRecord]):
    """The records of one model, by position: ``table[0]`` is convolution number 1. Prints as a table.

    Attributes:
        functional: convolutions that no module makes, when inputs were given; they have no number.
    """

    def __init__(self, records: Sequence[ConvRecord], functional: Sequence[FunctionalConv] = ()) -> None:
        self._records = tuple(records)
        self.functional = tuple(functional)

    @overload
    def __getitem__(self, index: int) -> ConvRecord: ...
    @overload
    def __getitem__(self, index: slice) -> ConvTable: ...
    def __getitem__(self, index: int | slice) -> ConvRecord | ConvTable:
        return ConvTable(self._records[index]) if isinstance(index, slice) else self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[ConvRecord]:
        return iter(self._records)

    def __str__(self) -> str:
        headers: tuple[str, ...] = ("#", "name", "in", "out", "kernel", "stride", "groups", "output")
        headers += ("calls", "MACs", "params", "status")
        table = aligned([_row(record) for record in self], headers, left=("name", "status"))
        return "\n".join([table, *map(str, self.functional)])

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns by name, each a list of one plain value for each convolution."""
        rows = [asdict(record) for record in self]
        return {field.name: [row[field.name] for row in rows] for field in fields(ConvRecord)}

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV with a header line, whole or not at all."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(ConvRecord)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in self)
        write_whole(path, text.getvalue().encode())


def _row(record: ConvRecord) -> list[str]:
    status = f"{record.status}: {record.reason}" if record.reason else record.status
    return [
        str(record.index),
        record.name,
        str(record.in_channels),
        str(record.out_channels),
        "x".join(map(str, record.kernel_size)),
        "x".join(map(str, record.stride)),
        str(record.groups),
        "x".join(map(str, record.output_size)) if record.output_size else "-",
        "-" if record.calls is None else str(record.calls),
        "-" if record.macs is None else f"{record.macs:,}",
        f"{record.params:,}",
        status,
    ]
