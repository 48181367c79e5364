"""One convolution as an ONNX graph of its own, dense or in a form: what is timed in ``layer_times``.

The nodes are those that an export gives: a Conv for each step; of the gauge form Conv, Conv, Concat, Gather
and Add; of the reduced form Gather, Mul, Slice, Add and Concat. The weight form is the dense convolution, to
which it folds. The weights are arbitrary, for the time does not depend on them. Every graph has a bias, as a
convolution has with its BatchNorm folded into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..costs import ConvShape, output_size
from ..errors import InputError
from ..passes.records import ConvRecord
from ..recipe import DENSE
from ..structures import FORMS, Ranks, Step

__all__ = ["Geometry", "geometry_of", "layer_graph"]

Size = tuple[int, int]

_OPSET, _IR = 18, 10


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What the time of a convolution depends on, whatever its name.

    Attributes:
        in_channels, out_channels, kernel_size, stride, dilation, groups: its options.
        padding: top, left, bottom and right, in pixels.
        input_size: (H, W). batch: the number of images.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size
    padding: tuple[int, int, int, int]
    dilation: Size
    groups: int
    input_size: Size
    batch: int

    @property
    def shape(self) -> ConvShape:
        """The shape for ``structures``."""
        return ConvShape(self.in_channels, self.out_channels, self.kernel_size, self.groups, bias=True)


def geometry_of(record: ConvRecord) -> Geometry:
    """The geometry of a convolution at its first call.

    Raises:
        InputError: when the record has no sizes.

    >>> from torch import nn, zeros
    >>> from fxbasis.passes.numbering import number_convs
    >>> record = number_convs(nn.Conv2d(3, 8, 3, padding="same"), zeros(2, 3, 16, 16))[0]
    >>> geometry_of(record).padding, geometry_of(record).batch
    ((1, 1, 1, 1), 2)
    """
    if record.input_size is None or record.output_size is None:
        raise InputError(
            f"{record} has no sizes, so it cannot be timed; number it with example inputs that call it: "
            "number_convs(model, example)"
        )
    images = (record.elements or 0) // (record.out_channels * prod(record.output_size) * (record.calls or 1))
    return Geometry(
        in_channels=record.in_channels,
        out_channels=record.out_channels,
        kernel_size=record.kernel_size,
        stride=record.stride,
        padding=_padding(record, record.input_size, record.output_size),
        dilation=record.dilation,
        groups=record.groups,
        input_size=record.input_size,
        batch=max(1, images),
    )


def _padding(record: ConvRecord, before: Size, after: Size) -> tuple[int, int, int, int]:
    """The record's own; of a word, or a class that pads by itself, the least that gives its output."""
    options = (record.kernel_size, record.stride)
    given = record.padding
    if not isinstance(given, str) and output_size(before, *options, given, record.dilation) == after:
        return (*given, *given)
    needed = []
    for axis in (0, 1):
        reach = record.dilation[axis] * (record.kernel_size[axis] - 1) + 1
        needed.append(max(0, (after[axis] - 1) * record.stride[axis] + reach - before[axis]))
    (top, left), (height, width) = (part // 2 for part in needed), needed
    return top, left, height - top, width - left


def layer_graph(geometry: Geometry, form: str, ranks: Ranks) -> bytes:
    """An ONNX model with the input (batch, in_channels, H, W) and one layer.

    Args:
        geometry: the convolution.
        form: a key of ``structures.FORMS``, or ``"dense"``.
        ranks: of the form; not looked at for the dense layer and the weight form.
    """
    from onnx import TensorProto, helper

    shape, graph = geometry.shape, _Graph(geometry)
    if form in (DENSE, "weight"):
        channels = (shape.in_channels, shape.out_channels, shape.kernel_size, shape.groups)
        steps: tuple[Step, ...] = (Step("conv", *channels, (True, True)),)
    else:
        steps = FORMS[form].steps(shape, ranks)
    for step in steps:
        graph.add(step, last=step is steps[-1])
    size: list[int | str] = [geometry.batch, geometry.in_channels, *geometry.input_size]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, size)
    size = [geometry.batch, geometry.out_channels, "height", "width"]
    made = helper.make_tensor_value_info(graph.value, TensorProto.FLOAT, size)
    whole = helper.make_graph(graph.nodes, form, [given], [made], graph.weights)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    return bytes(model.SerializeToString())


class _Graph:
    """The nodes and weights of a chain, while it grows; ``value`` is the name of its last output."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.value = "input"

    def add(self, step: Step, *, last: bool) -> None:
        """The nodes of one more step."""
        if step.sums is not None:
            self._gathered(step)
            return
        before, made = self.value, step.out_channels - step.copies
        if made:
            weight = self._weight("weight", step, (made, step.in_channels // step.groups, *step.kernel_size))
            bias = [self._weight("bias", step, (made,))] if last and not step.copies else []
            self._node("Conv", [before, weight, *bias], step, **self._options(step))
        if step.copies:
            self._node("Concat", [before, self.value] if made else [before], step, axis=1)
            order = np.arange(step.out_channels, dtype=np.int64)[::-1]
            self._node("Gather", [self.value, self._tensor(f"{step.name}.order", order)], step, axis=1)
            self._node("Add", [self.value, self._weight("bias", step, (step.out_channels, 1, 1))], step)

    def _gathered(self, step: Step) -> None:
        """Copies and sums of two, each scaled, in another order."""
        before, filters, sums = self.value, step.out_channels, step.sums or 0
        self._scaled("first", before, step, filters)
        if sums:
            self._node("Slice", [self.value, *self._range(step, 0, filters - sums)], step, "copies")
            copies = self.value
            self._node("Slice", [f"{step.name}.first", *self._range(step, filters - sums, filters)], step)
            firsts = self.value
            self._scaled("second", before, step, sums)
            self._node("Add", [firsts, self.value], step, "sums")
            self._node("Concat", [copies, self.value], step, axis=1)
        order = np.arange(filters, dtype=np.int64)[::-1]
        self._node("Gather", [self.value, self._tensor(f"{step.name}.order", order)], step, axis=1)
        self._node("Add", [self.value, self._weight("bias", step, (filters, 1, 1))], step)

    def _scaled(self, name: str, before: str, step: Step, count: int) -> None:
        indices = np.arange(count, dtype=np.int64) * 7 % step.in_channels
        self._node(
            "Gather", [before, self._tensor(f"{step.name}.{name}.of", indices)], step, f"{name}.at", axis=1
        )
        self._node("Mul", [self.value, self._weight(f"{name}.by", step, (count, 1, 1))], step, name)

    def _range(self, step: Step, start: int, end: int) -> list[str]:
        names = (f"{step.name}.{start}.{end}.{what}" for what in ("starts", "ends", "axes"))
        return [
            self._tensor(name, np.array([value])) for name, value in zip(names, (start, end, 1), strict=True)
        ]

    def _options(self, step: Step) -> dict[str, Any]:
        """Stride, padding and dilation on the axes of the step."""
        geometry, axes = self.geometry, step.axes
        pads = [pad if mine else 0 for pad, mine in zip(geometry.padding, axes * 2, strict=True)]
        strides, dilations = (
            [value if mine else 1 for value, mine in zip(values, axes, strict=True)]
            for values in (geometry.stride, geometry.dilation)
        )
        return {"group": step.groups, "strides": strides, "pads": pads, "dilations": dilations}

    def _node(self, kind: str, inputs: list[str], step: Step, name: str = "", **options: Any) -> None:
        from onnx import helper

        self.value = f"{step.name}.{name or kind}"
        self.nodes.append(helper.make_node(kind, inputs, [self.value], **options))

    def _weight(self, kind: str, step: Step, shape: tuple[int, ...]) -> str:
        return self._tensor(f"{step.name}.{kind}", np.resize(_NOISE, shape))

    def _tensor(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name


_NOISE = np.random.default_rng(0).uniform(-0.1, 0.1, 1 << 12).astype(np.float32)
