"""``profile``: the work of each layer, counted from the operations that ran, beside the closed form.

Counting convention: MACs, one for each multiply-add of a convolution or matrix product, for the example
inputs as given (batch included), of one forward pass, or of a training step (forward and backward, without
the optimizer's); FLOPs = 2 x MACs. Elementwise work (but the copies and sums of the reduced
form), normalisation, pooling and bias additions are not counted; every operation that ran and was not counted
is listed in ``uncounted``.

The count comes from ``counting`` and knows nothing of layers, forms or ranks; the formula comes from
``costs`` and knows nothing of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..arguments import check_flags
from ..copying import copy_model, copy_to_run
from ..costs import dense_macs, dense_params
from ..forms import BasisConv2d
from ..recipe import LayerPlan
from ..running import ExampleInputs, batch_size
from ..structures import break_even_rank
from .base import MACS, FxPass
from .counting import MacCounter, count_macs
from .numbering import ConvRecord, conv_layers, number_convs
from .profiles import LayerProfile, Profile
from .training_steps import note_training, training_work

__all__ = ["LayerProfile", "Profile", "ProfilePass", "profile"]


def profile(model: nn.Module, example_inputs: ExampleInputs, *, training: bool = False) -> Profile:
    """Count the work of a model on the example inputs, before and after compression.

    The model runs once on a copy; it is not touched.

    Args:
        model: any nn.Module, compressed or not.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        training: count a forward and a backward pass in train() instead of a forward pass in eval().
            Parameters without ``requires_grad``, such as a fixed basis, have no gradient, and the inputs
            have none.

    Raises:
        InputError: when the model fails on the inputs.

    >>> import torch
    >>> net, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8)
    >>> found = profile(net, example)
    >>> found.macs, found.counted, found.params, dict(found.uncounted)
    (7776, 7776, 224, {'aten.relu': 1})
    >>> profile(net, example, training=True).counted  # the first layer's input needs no gradient
    15552
    """
    check_flags(training=training)
    copied = copy_model(model) if training else copy_to_run(model)  # a backward pass would give it gradients
    table, found = number_convs(copied, example_inputs), conv_layers(copied)
    calls = note_training(found) if training else {}
    counter = count_macs(copied, example_inputs, training=training)
    layers = [_conv_profile(record, layer, counter) for record, layer in _with_layers(table, copied)]
    if training:
        layers = [
            _of_training(row, training_work(found[row.name], record.shape, calls[row.name]))
            for row, record in zip(layers, table, strict=True)
        ]
    layers += _others(copied, counter, {scope for pair in found.items() for scope in _scopes(*pair)})
    params = sum(parameter.numel() for parameter in copied.parameters())
    saved = sum(layer.params_before - layer.params for layer in layers)
    uncounted = counter.uncounted
    return Profile(tuple(layers), batch_size(example_inputs), params, params + saved, uncounted, training)


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


def _of_training(layer: LayerProfile, macs: tuple[int, int]) -> LayerProfile:
    return replace(layer, macs_before=macs[0], macs=macs[1])


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
