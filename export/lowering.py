"""How a reduced composition is computed in an ONNX file: by gathers, or as a 1x1 convolution.

A gather of channels is memory traffic, a convolution by zeros is arithmetic, and which is less time depends
on the size of the feature map, the number of channels and the machine. So both are measured, on the layer's
own input size, basis convolution included: how the runtime lays out its output is part of the answer.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..compositions import LOWERINGS, ReducedComposition
from ..forms import BasisConv2d
from ..passes.numbering import conv_layers
from ..running import ExampleInputs, run
from .checking import frozen_copy, open_session
from .exporters import quiet

__all__ = ["with_measured_lowerings"]

LEAST, MOST = 15, 200  # runs of each
SECONDS = 0.1


def with_measured_lowerings(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """A copy in which each reduced composition has the lowering that is faster in ONNX Runtime on one thread.

    The model itself where it has none. Each layer is measured at the size of its first call, layers of one
    shape once; where the runtime cannot compute a layer in its dtype it keeps its lowering.

    Raises:
        InputError: when the model fails on the example inputs.
    """
    if not any(isinstance(module, ReducedComposition) for module in model.modules()):
        return model
    copied = frozen_copy(model)
    found: dict[tuple[Any, ...], str] = {}
    for form, shape in _called(copied, example_inputs):
        composition = cast(ReducedComposition, form.composition)
        key = (str(form.basis), str(composition), shape)
        if key not in found:
            found[key] = _faster(form, shape) or composition.lowering
        composition.lowering = found[key]
    return copied


def _called(model: nn.Module, example_inputs: ExampleInputs) -> list[tuple[BasisConv2d, tuple[int, ...]]]:
    """The layers in the reduced form that are called, each with the shape of its first input."""
    sizes: dict[str, tuple[int, ...]] = {}
    watched = frozen_copy(model)
    for name, form in _reduced(watched):
        form.basis.register_forward_pre_hook(
            lambda _, args, name=name: sizes.setdefault(name, tuple(args[0].shape)) and None
        )
    run(watched, example_inputs)
    return [(form, sizes[name]) for name, form in _reduced(model) if name in sizes]


def _reduced(model: nn.Module) -> Iterator[tuple[str, BasisConv2d]]:
    for name, layer in conv_layers(model).items():
        if isinstance(layer, BasisConv2d) and layer.plan.form == "reduced":
            yield name, layer


def _faster(form: BasisConv2d, shape: tuple[int, ...]) -> str | None:
    """The lowering of the fastest run; None where the runtime cannot compute the layer."""
    input = torch.zeros(shape, dtype=form.basis.weight.dtype)
    with tempfile.TemporaryDirectory() as folder:
        try:
            sessions = {name: _session(form, name, input, Path(folder)) for name in LOWERINGS}
            least = _least(sessions, input)
        except Exception:  # a dtype without kernels: the export of the whole model says so
            return None
    return min(least, key=lambda name: least[name])


def _session(form: BasisConv2d, lowering: str, input: torch.Tensor, folder: Path) -> Any:
    file = folder / f"{lowering}.onnx"
    composition = cast(ReducedComposition, copy.deepcopy(form.composition))
    layer = nn.Sequential(copy.deepcopy(form.basis), composition).eval().cpu()
    composition.lowering = lowering
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (input,), str(file), input_names=["x"], dynamo=False)
    return open_session(file, 1)


def _least(sessions: dict[str, Any], input: torch.Tensor) -> dict[str, float]:
    """Seconds of the fastest run of each, in turn: what others do on the machine only ever adds to a time."""
    feed = {"x": input.numpy()}
    slow = max(_timed(session, feed) for session in sessions.values() for _ in range(3))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(min(MOST, max(LEAST, int(SECONDS / slow)))):
        for name in sorted(sessions, reverse=bool(turn % 2)):
            times[name].append(_timed(sessions[name], feed))
    return {name: min(found) for name, found in times.items()}


def _timed(session: Any, feed: dict[str, Any]) -> float:
    start = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - start
