"""One forward pass made safe: inputs in three shapes, modes restored, RNG untouched.

``example_inputs`` is a tensor, a tuple of positional arguments, or a dict of keyword arguments.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.fx
from torch import nn

from .errors import FxBasisError, InputError, LayerError
from .nests import cloned, map_tensors, tensors_in, tensors_of

COMPILED = "_orig_mod"
_NEEDS_GRADIENTS = "does not require grad"
ExampleInputs: TypeAlias = torch.Tensor | tuple[Any, ...] | dict[str, Any]


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that ``example_inputs`` stands for.

    >>> as_arguments({"x": 1})
    ((), {'x': 1})

    Raises:
        InputError: for anything that is not a tensor, a tuple or a dict with string keys.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tensor, a tuple of positional "
        "arguments, or a dict of keyword arguments (one list argument is written as a tuple: ([...],))"
    )


def describe(example_inputs: Any) -> str:
    """The shapes, dtypes and devices of the inputs, for messages.

    >>> describe(torch.zeros(1, 3, 8, 8))
    '(1, 3, 8, 8) float32 cpu'
    """
    parts = [
        f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} {t.device}"
        for t in tensors_of(example_inputs)
    ]
    return ", ".join(parts) or "no tensor"


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module into train or eval mode, and each back into its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]  # frozen ScriptModules: none
    for module, _ in modes:
        module.training = training
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Fix the random state inside (torch, Python, NumPy), and give the caller's own back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed prepares devices that are not there
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def run(model: nn.Module, example_inputs: ExampleInputs, *, training: bool = False) -> Any:
    """One forward pass without gradients, from a fixed random state.

    Modes and RNG are restored. Buffers are the caller's affair: in training mode BatchNorm updates
    its statistics.

    Raises:
        InputError: when the model fails on the inputs; the model's own message is kept.
    """
    try:
        with torch.no_grad(), seeded(), in_mode(model, training):
            return call(model, example_inputs)
    except InputError as error:
        if _NEEDS_GRADIENTS not in str(error.__cause__):
            raise
    with torch.enable_grad(), seeded(), in_mode(model, training):  # its forward asks for gradients itself
        return map_tensors(torch.Tensor.detach, call(model, example_inputs))


def train_once(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """One forward and backward pass in train(), of the sum of all outputs, from a fixed random state.

    Modes and RNG are restored; parameters have gradients, and buffers are the caller's affair.

    Raises:
        InputError: when either pass fails, or when no output depends on a parameter that is trained.
    """
    with torch.enable_grad(), seeded(), in_mode(model, True):
        found = tensors_in(call(model, example_inputs))
        outputs = [tensor for tensor in found if tensor.requires_grad]
        if not outputs:
            raise InputError(
                f"no output of {type(model).__name__} in train() has a gradient; set requires_grad of the "
                "parameters that are trained"
            )
        try:
            torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])
        except RuntimeError as error:
            raise InputError(
                f"the backward pass of {type(model).__name__} failed: {error}; make it trainable"
            ) from error


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made it, from a module that it holds as ``COMPILED``."""
    return type(module).__qualname__ == "OptimizedModule" and COMPILED in module._modules


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what ``torch.compile`` made as plain Python, since what is put around modules is not compiled."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """The model's answer to a copy of the inputs, which it may change; its failure as an InputError.

    Raises:
        InputError: when the model fails on the inputs; the model's own message is kept.
    """
    args, kwargs = as_arguments(cloned(example_inputs))
    if any(tensor.ndim >= 3 and tensor.numel() == 0 for tensor in tensors_of((args, kwargs))):
        raise InputError(
            f"an example input is empty ({describe(example_inputs)}); pass a batch of at least one sample"
        )
    try:
        with uncompiled():
            return model(*args, **kwargs)
    except FxBasisError:
        raise
    except Exception as error:
        raise InputError(
            f"the model failed on the example inputs ({describe(example_inputs)}): "
            f"{type(error).__name__}: {error}; {_remedy(model, example_inputs)}"
        ) from error


def _remedy(model: nn.Module, example_inputs: ExampleInputs) -> str:
    wanted, given = (
        sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()})
        for tensors in (model.parameters(), tensors_of(example_inputs))
    )
    if len(wanted) == 1 and given and wanted != given:
        return f"pass inputs in {wanted[0]}, or a model in {given[0]}, as model.to(torch.{given[0]}) makes it"
    return "pass inputs of the shape, dtype and device that the model takes"


def telling(example_inputs: ExampleInputs) -> ExampleInputs:
    """The inputs with random values, in [0, 1), where an image or feature map has one value, NaN or Inf.

    Of zeros everything that is linear makes zeros, right or wrong.

    >>> float(telling(torch.zeros(1, 3, 8, 8)).std()) > 0.1
    True
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 3 or not tensor.is_floating_point() or tensor.numel() < 2 or _tells(tensor):
            return tensor
        return torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor)

    found: ExampleInputs = map_tensors(drawn, example_inputs)
    return found


def _tells(tensor: torch.Tensor) -> bool:
    if tensor.is_meta:
        return True
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high) & (low < high))


def with_batch(example_inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """The inputs repeated or cut along dimension 0 to ``batch`` samples.

    >>> with_batch(torch.zeros(1, 3, 8, 8), 2).shape
    torch.Size([2, 3, 8, 8])

    Raises:
        InputError: when there is no sample to repeat.
    """

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0:
            return tensor
        if tensor.shape[0] == 0:
            raise InputError(f"an input ({describe(tensor)}) has no sample; pass a batch of at least one")
        copies = -(-batch // tensor.shape[0])
        return torch.cat([tensor] * copies)[:batch]

    resized: ExampleInputs = map_tensors(resize, example_inputs)
    return resized


def batch_size(example_inputs: ExampleInputs) -> int:
    """Size of dimension 0 of the first tensor; 1 when no tensor has one.

    >>> batch_size(torch.zeros(4, 3, 8, 8))
    4
    """
    sizes = [tensor.shape[0] for tensor in tensors_of(example_inputs) if tensor.ndim > 0]
    return sizes[0] if sizes else 1


def load_values(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """``load_state_dict`` for tensors from a file, which holds no versions of modules: the model's own then.

    Some classes (torchvision's MNASNet) convert or refuse a state_dict without a version.
    """
    own = model.state_dict()
    if not hasattr(state, "_metadata") and hasattr(own, "_metadata") and own.keys() <= state.keys():
        state = OrderedDict(state)
        state._metadata = own._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=False)


def become(old: nn.Module, new: nn.Module) -> None:
    """Make ``old`` what ``new`` is, wherever it is held: under every name, in lists, in closures.

    Raises:
        LayerError: when its class does not allow it.
    """
    try:
        old.__class__ = new.__class__
    except TypeError as error:
        raise LayerError(
            f"{type(old).__name__} cannot be exchanged: {error}; leave it out of layers="
        ) from error
    old.__dict__ = new.__dict__
