"""The contexts of torch that are open: gradients, autocast, modes. A graph does not keep those of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["contexts", "open_contexts", "rare_contexts"]

_KINDS = ("cpu", "cuda")


def open_contexts() -> tuple[Any, ...]:
    """What is open now, to be compared."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in _KINDS),
        *(torch.get_autocast_dtype(kind) for kind in _KINDS),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        torch.initial_seed(),
    )


@contextmanager
def contexts(*, gradients: bool, autocast: bool) -> Iterator[None]:
    """Gradients and autocast on or off."""
    before = [torch.is_autocast_enabled(kind) for kind in _KINDS]
    with torch.set_grad_enabled(gradients):
        for kind in _KINDS:
            torch.set_autocast_enabled(kind, autocast)
        try:
            yield
        finally:
            for kind, enabled in zip(_KINDS, before, strict=True):
                torch.set_autocast_enabled(kind, enabled)


@contextmanager
def rare_contexts() -> Iterator[None]:
    """Inference mode, and another dtype of autocast than by default."""
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_autocast_dtype("cpu", before)
