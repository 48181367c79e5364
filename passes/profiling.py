"""``profile``: the work of each layer, counted from the operations that ran, beside the closed form.

Counting convention: MACs, one for each multiply-add of a convolution or matrix product, for the example
inputs as given (batch included); FLOPs = 2 x MACs. Elementwise work (but the copies and sums of the reduced
form), normalisation, pooling and bias additions are not counted; every operation that ran and was not counted
is listed in ``uncounted``.

The count comes from ``counting`` and knows nothing of layers, forms or ranks; the formula comes from
``costs`` and knows nothing of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from ..costs import dense_macs, dense_params
from ..forms import BasisConv2d
from ..recipe import LayerPlan
from ..running import ExampleInputs, batch_size, copy_to_run
from ..structures import break_even_rank
from ..tables import aligned
from .base import MACS, FxPass
from .counting import MacCounter, count_macs
from .numbering import ConvRecord, conv_layers, number_convs

__all__ = ["LayerProfile", "Profile", "ProfilePass", "profile"]


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One layer: MACs for the whole batch, parameters, and elements of the outputs it makes.

    Attributes:
        number: the convolution's number; None for another layer.
        name, kind, shape, form, ranks: what it is; shape is that of its dense weight; form is ``dense``
            and without ranks for a convolution left alone.
        macs_before, params_before, activations_before: of the dense layer, by the closed form.
        macs, params: of the layer as it is, by the closed form.
        counted: MACs counted from the operations that ran.
        activations: elements of all its outputs, the basis convolution's included.
        break_even_rank: R*, below which its form (the output form, if dense) is cheaper than dense; None for
            forms with several ranks.
        note: why it is left dense, or a remark.
    """

    number: int | None
    name: str
    kind: str
    shape: tuple[int, ...]
    form: str
    ranks: tuple[int, ...]
    macs_before: int
    macs: int
    counted: int
    params_before: int
    params: int
    activations_before: int
    activations: int
    break_even_rank: float | None
    note: str


@dataclass(frozen=True)
class Profile:
    """Work and size of a model, layer by layer. Prints as a table.

    Attributes:
        layers: convolutions in the order of their numbers, then every other layer with counted work.
        batch: samples in the example inputs, over which MACs and activations are summed.
        params, params_before: of the whole model, shared ones once.
        uncounted: how often each operation ran that is not counted.
    """

    layers: tuple[LayerProfile, ...]
    batch: int
    params: int
    params_before: int
    uncounted: Counter[str]

    @property
    def macs(self) -> int:
        """MACs of the model as it is, by the closed forms."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_before(self) -> int:
        """MACs of the model with every convolution dense."""
        return sum(layer.macs_before for layer in self.layers)

    @property
    def counted(self) -> int:
        """MACs counted from the operations that ran."""
        return sum(layer.counted for layer in self.layers)

    @property
    def convs(self) -> tuple[LayerProfile, ...]:
        """The numbered convolutions."""
        return tuple(layer for layer in self.layers if layer.number is not None)

    @property
    def conv_ratio(self) -> float:
        """MACs of all convolutions as they are over those of the dense ones; 1 without any."""
        before = sum(layer.macs_before for layer in self.convs)
        return sum(layer.macs for layer in self.convs) / before if before else 1.0

    @property
    def disagreements(self) -> tuple[LayerProfile, ...]:
        """Layers whose count is not their formula; empty in every case that is understood."""
        return tuple(layer for layer in self.layers if layer.counted != layer.macs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: totals, one dict for each layer, and what was not counted."""
        totals = ("macs_before", "macs", "counted", "conv_ratio", "params_before", "params", "batch")
        return {
            "unit": "MACs (FLOPs = 2 x MACs), whole batch",
            **{name: getattr(self, name) for name in totals},
            "layers": [asdict(layer) for layer in self.layers],
            "uncounted": dict(self.uncounted),
        }

    def table(self, tablefmt: str = "simple") -> str:
        """The layers as text; ``tablefmt`` is one of tabulate's, for example ``"github"``."""
        rows = [_row(layer) for layer in self.layers]
        return aligned(rows, _HEADERS, left=("name", "kind", "form", "note"), tablefmt=tablefmt)

    def __str__(self) -> str:
        lines = [self.table(), "", self.summary()]
        if self.uncounted:
            parts = ", ".join(f"{name} x{count}" for name, count in self.uncounted.most_common())
            lines.append(f"not counted: {parts}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Totals in one line, with the convention."""
        agree = "formula = count" if not self.disagreements else "FORMULA DIFFERS FROM COUNT"
        return (
            f"MACs {self.macs_before:,} -> {self.macs:,} ({_ratio(self.macs, self.macs_before)}; "
            f"convolutions {self.conv_ratio:.3f}; batch {self.batch}; FLOPs = 2 x MACs; {agree}), parameters "
            f"{self.params_before:,} -> {self.params:,} ({_ratio(self.params, self.params_before)})"
        )


_HEADERS = (
    *("#", "name", "kind", "weight", "form", "rank", "R*", "MACs before", "MACs formula", "MACs counted"),
    *("ratio", "params before", "params", "note"),
)


def _ratio(after: int, before: int) -> str:
    return f"{after / before:.3f}" if before else "-"


def _row(layer: LayerProfile) -> list[str]:
    return [
        "" if layer.number is None else str(layer.number),
        layer.name,
        layer.kind,
        "x".join(map(str, layer.shape)),
        layer.form,
        ", ".join(map(str, layer.ranks)),
        "" if layer.break_even_rank is None else f"{layer.break_even_rank:.1f}",
        f"{layer.macs_before:,}",
        f"{layer.macs:,}",
        f"{layer.counted:,}",
        _ratio(layer.macs, layer.macs_before),
        f"{layer.params_before:,}",
        f"{layer.params:,}",
        layer.note,
    ]


def profile(model: nn.Module, example_inputs: ExampleInputs) -> Profile:
    """Count the work of a model on the example inputs, before and after compression.

    The model runs once in eval() on a copy; it is not touched.

    Args:
        model: any nn.Module, compressed or not.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        InputError: when the model fails on the inputs.

    >>> import torch
    >>> found = profile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8))
    >>> found.macs, found.counted, found.params, dict(found.uncounted)
    (7776, 7776, 224, {'aten.relu': 1})
    """
    copied = copy_to_run(model)
    table = number_convs(copied, example_inputs)
    counter = count_macs(copied, example_inputs)
    layers = [_conv_profile(record, layer, counter) for record, layer in _with_layers(table, copied)]
    scopes = {scope for found in conv_layers(copied).items() for scope in _scopes(*found)}
    layers += _others(copied, counter, scopes)
    params = sum(parameter.numel() for parameter in copied.parameters())
    saved = sum(layer.params_before - layer.params for layer in layers)
    return Profile(tuple(layers), batch_size(example_inputs), params, params + saved, counter.uncounted)


class ProfilePass(FxPass):
    """Run the graph on example inputs and write the counted MACs into ``node.meta[MACS]`` of each node."""

    def __init__(self, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.example_inputs = example_inputs

    def change(self, graph_module: fx.GraphModule) -> int:
        """Count each node; counts those whose MACs were missing or different."""
        before = [node.meta.get(MACS) for node in graph_module.graph.nodes]
        copied = copy_to_run(graph_module)
        count_macs(copied, self.example_inputs)
        pairs = zip(graph_module.graph.nodes, copied.graph.nodes, strict=True)
        for node, counted in pairs:
            node.meta[MACS] = counted.meta[MACS]
        return sum(old != node.meta[MACS] for old, node in zip(before, graph_module.graph.nodes, strict=True))


def _with_layers(table: Any, model: nn.Module) -> Iterator[tuple[ConvRecord, nn.Conv2d | BasisConv2d]]:
    return zip(table, conv_layers(model).values(), strict=True)


def _conv_profile(record: ConvRecord, layer: nn.Conv2d | BasisConv2d, counter: MacCounter) -> LayerProfile:
    scopes, outputs = _scopes(record.name, layer), record.elements or 0
    plan = layer.plan if isinstance(layer, BasisConv2d) else None
    between = scopes[1:-1] if plan and plan.called else []
    return LayerProfile(
        number=record.index,
        name=record.name,
        kind="Conv2d",
        shape=(record.out_channels, record.in_channels // record.groups, *record.kernel_size),
        form=plan.form if plan else "dense",
        ranks=plan.ranks if plan else (),
        macs_before=outputs // record.out_channels * dense_macs(record.shape, (1, 1)),
        macs=record.macs or 0,
        counted=sum(counter.macs[scope] for scope in scopes),
        params_before=dense_params(record.shape),
        params=record.params,
        activations_before=outputs,
        activations=outputs + sum(counter.activations[scope] for scope in between),
        break_even_rank=_break_even(record, plan),
        note=plan.reason if plan else record.reason,
    )


def _break_even(record: ConvRecord, plan: LayerPlan | None) -> float | None:
    """R* of its form, of the output form for a layer left alone."""
    if plan is None or record.output_size is None or record.input_size is None:
        return record.shape.break_even_rank
    sums = plan.ranks[1] if plan.form == "reduced" else 0
    return break_even_rank(plan.form, plan.shape, record.output_size, record.input_size, sums)


def _scopes(name: str, layer: nn.Conv2d | BasisConv2d) -> list[str]:
    """The layer and its steps."""
    steps = layer.plan.steps if isinstance(layer, BasisConv2d) else ()
    inside = f"{name}." if name else ""  # the model itself may be the layer
    return [name, *(inside + step.name for step in steps)]


def _others(model: nn.Module, counter: MacCounter, scopes: set[str]) -> list[LayerProfile]:
    """Layers with counted work outside of the given scopes: linear layers, functional calls."""
    found = []
    for scope, macs in counter.macs.items():
        if scope in scopes:
            continue
        module = model.get_submodule(scope)
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        elements = counter.activations[scope]
        found.append(
            LayerProfile(
                number=None,
                name=scope or "(top level)",
                kind=type(module).__name__,
                shape=tuple(next((p.shape for p in module.parameters(recurse=False)), ())),
                form="-",
                ranks=(),
                macs_before=macs,
                macs=macs,
                counted=macs,
                params_before=own,
                params=own,
                activations_before=elements,
                activations=elements,
                break_even_rank=None,
                note="counted only",
            )
        )
    return found
