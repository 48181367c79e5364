"""The closed form of a training step: what a convolution, dense or rewritten, costs forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..costs import ConvShape, dense_macs
from ..forms import BasisConv2d
from ..structures import training_macs

__all__ = ["TrainingCall", "note_training", "training_work"]

Layer: TypeAlias = nn.Conv2d | BasisConv2d


@dataclass
class TrainingCall:
    """One call of a layer in a training step.

    Attributes:
        batch: samples. input_size, output_size: (H, W).
        input_gradient: its input needs a gradient. reached: the backward pass came to its output.
    """

    input_size: tuple[int, int]
    input_gradient: bool
    batch: int = 1
    output_size: tuple[int, int] = (0, 0)
    reached: bool = False


def note_training(layers: Mapping[str, Layer]) -> dict[str, list[TrainingCall]]:
    """Filled while a copy, whose convolutions and forms are ``layers``, is trained; its hooks stay."""
    found: dict[str, list[TrainingCall]] = {name: [] for name in layers}
    for name, layer in layers.items():
        first, last = layer.ends if isinstance(layer, BasisConv2d) else (layer, layer)
        enter, leave = _hooks(found[name])
        first.register_forward_pre_hook(enter, with_kwargs=True)
        last.register_forward_hook(leave)
    return found


def _hooks(calls: list[TrainingCall]) -> tuple[Any, Any]:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        calls.append(TrainingCall(_sides(given), given.requires_grad and torch.is_grad_enabled()))

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        call = calls[-1]
        call.batch, call.output_size = len(output) if output.ndim == 4 else 1, _sides(output)
        if output.requires_grad:
            output.register_hook(lambda _: setattr(call, "reached", True))  # type: ignore[no-untyped-call]

    return enter, leave


def _sides(images: Tensor) -> tuple[int, int]:
    return int(images.shape[-2]), int(images.shape[-1])


def training_work(layer: Layer, shape: ConvShape, calls: list[TrainingCall]) -> tuple[int, int]:
    """MACs of all calls of a training step: of the dense layer, and of the layer as it is."""
    parts = layer.factors.values() if isinstance(layer, BasisConv2d) else [layer]
    trained = [cast(Tensor, part.weight).requires_grad for part in parts]
    before = sum(_dense(shape, call, any(trained)) for call in calls)
    if not isinstance(layer, BasisConv2d):
        return before, before
    return before, sum(_rewritten(layer, shape, call, trained) for call in calls)


def _dense(shape: ConvShape, call: TrainingCall, trained: bool) -> int:
    backward = (call.input_gradient + trained) * call.reached
    return dense_macs(shape, call.output_size, call.batch) * (1 + backward)


def _rewritten(layer: BasisConv2d, shape: ConvShape, call: TrainingCall, trained: list[bool]) -> int:
    return training_macs(
        layer.plan.form,
        shape,
        layer.plan.ranks,
        call.output_size,
        call.input_size,
        call.batch,
        input_gradient=call.input_gradient and call.reached,
        trained=[learning and call.reached for learning in trained],
    )
