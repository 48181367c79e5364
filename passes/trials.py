"""The runs on which a traced module is proven.

The example inputs in eval(), then another batch size and another image size in eval() and in train(): of
these, what the original accepts, and the example in train() where it accepts no other. One sample more, and
images of other, unequal sides, at once where the model takes that, otherwise one after the other. An example
of zeros, NaN or Inf, which tells nothing, gets random values.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FxBasisError, InputError
from ..nests import map_tensors, tensors_of
from ..running import ExampleInputs, batch_size, run, telling, with_batch
from ..snapshots import Snapshot, buffer_values

__all__ = ["run_trials", "telling_parameters"]

_SMALL = 1e-3

_Run = tuple[Any, dict[str, Tensor]]


def run_trials(
    model: nn.Module, example_inputs: ExampleInputs, *, example_only: bool = False
) -> dict[str, Any]:
    """Output and buffers after each run that the model accepts, by what the run was.

    Modes, buffers and random states are restored.

    Raises:
        InputError: when the model fails on the example inputs in eval().
    """
    found: dict[str, Any] = {"the example in eval()": _attempt(model, example_inputs, training=False)}
    if not example_only:
        found |= _on_variants(model, example_inputs)
    if not any("train()" in what for what in found):  # the cheapest run in train() is enough
        found["the example in train()"] = _accepted(model, example_inputs, training=True)
    return {what: outcome for what, outcome in found.items() if outcome is not None}


@contextmanager
def telling_parameters(model: nn.Module) -> Iterator[None]:
    """Random values in parameters that are zero or almost, as gates and last layers are before training.

    What they scale would be the same right or wrong. Those that the model itself changes are not put back.
    """
    small = filter(_is_small, model.parameters())
    drawn = [(parameter, parameter.detach().clone()) for parameter in small]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, values in drawn:
            parameter.copy_(torch.rand(values.shape, generator=generator, device="cpu") / 10 + 0.05)
    put = [parameter.detach().clone() for parameter, _ in drawn]
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, values), changed in zip(drawn, put, strict=True):
                if torch.equal(parameter, changed):
                    parameter.copy_(values)


def _is_small(parameter: Tensor) -> bool:
    if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
        return False
    expanded = 0 in parameter.stride()  # which cannot be written to
    return not expanded and bool(parameter.detach().abs().amax() < _SMALL)


def _on_variants(model: nn.Module, example: ExampleInputs) -> dict[str, Any]:
    """The runs on another batch and image size, and on random values where the example tells nothing."""
    drawn = telling(example)
    found = _on_sizes(model, drawn)
    if found or all(map(operator.is_, tensors_of(drawn), tensors_of(example))):
        return found
    return _first_accepted(model, "random values", [drawn]) or _on_sizes(model, example)


def _on_sizes(model: nn.Module, example: ExampleInputs) -> dict[str, Any]:
    together, apart = _variants(example)
    found = _first_accepted(model, *together)
    for what, alternatives in () if found else apart:
        found |= _first_accepted(model, what, alternatives)
    return found


def _first_accepted(model: nn.Module, what: str, alternatives: list[ExampleInputs]) -> dict[str, Any]:
    """The runs in both modes on the first inputs that the model accepts in eval()."""
    for inputs in alternatives:
        evaluated = _accepted(model, inputs, training=False)
        if evaluated is not None:
            trained = _accepted(model, inputs, training=True)
            return {f"{what} in eval()": evaluated, f"{what} in train()": trained}
    return {}


def _attempt(model: nn.Module, inputs: ExampleInputs, *, training: bool) -> _Run:
    before = Snapshot(model.modules())
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # a GraphModule prints where it fails
            warnings.simplefilter("ignore")
            output = run(model, inputs, training=training)
        return output, buffer_values(model)
    finally:
        before.restore()


def _accepted(model: nn.Module, inputs: ExampleInputs, *, training: bool) -> _Run | None:
    try:
        return _attempt(model, inputs, training=training)
    except InputError:
        return None


_Variant = tuple[str, list[ExampleInputs]]


def _variants(example_inputs: ExampleInputs) -> tuple[_Variant, list[_Variant]]:
    """Batch and image size changed together, and each by itself; alternatives cheapest first."""
    try:
        batch = with_batch(example_inputs, batch_size(example_inputs) + 1)
    except FxBasisError:
        return ("", []), []
    sizes = _other_sizes(example_inputs)
    together = [_resized(batch, example_inputs, size) for size in sizes[:1]]
    resized = [_resized(example_inputs, example_inputs, size) for size in sizes]
    return (
        ("another batch and image size", together),
        [("another batch size", [batch]), ("another image size", resized)],
    )


def _image_size(example_inputs: ExampleInputs) -> tuple[int, int] | None:
    sizes = [tuple(tensor.shape[-2:]) for tensor in tensors_of(example_inputs) if tensor.ndim >= 4]
    return (sizes[0][0], sizes[0][1]) if sizes else None


def _other_sizes(example_inputs: ExampleInputs) -> list[tuple[int, int]]:
    """Cheap sizes with unequal sides that divide by what the example's do, as far as that goes."""
    size = _image_size(example_inputs)
    if size is None:
        return []
    height, width = size
    if min(size) <= 48:
        return [(2 * height, 3 * width)]
    small = (64, 96) if size != (64, 96) else (96, 64)
    return [small, (height - 32, width - 64)] if min(size) > 128 else [small]


def _resized(inputs: ExampleInputs, like: ExampleInputs, size: tuple[int, int]) -> ExampleInputs:
    """Cut, or repeat, the last two dimensions of every tensor that has those of the example's images."""
    before = _image_size(like)

    def resize(tensor: Tensor) -> Tensor:
        if tensor.ndim < 3 or tuple(tensor.shape[-2:]) != before:
            return tensor
        rows, columns = (
            torch.arange(new, device=tensor.device) % old for new, old in zip(size, before, strict=True)
        )
        return tensor.index_select(-2, rows).index_select(-1, columns)

    resized: ExampleInputs = map_tensors(resize, inputs)
    return resized
