"""Patches of torch while a model is traced, for what its code does past the tracer.

fx sees nothing of what is computed or asked of parameters and buffers that code reached by ``parameters()``
say, and would keep the answers; nor of attributes that are set.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..nests import tensors_of
from .blaming import is_the_models

__all__ = ["patched"]

_ANSWERED = ("dtype", "device", "grad", "requires_grad", "is_cuda", "is_meta")
_VALUES = ("tolist", "numpy", "type")
_CHANGES = ("register_hook", "requires_grad_")


@contextmanager
def patched(tracer: Any) -> Iterator[None]:
    """Tell a ``guarding.GuardedTracer`` of what is asked, computed and set past it."""
    answers = {name: _answer(tracer, name) for name in (*_ANSWERED, *_VALUES, *_CHANGES)}
    replaced = {name: vars(torch.Tensor).get(name) for name in answers}
    for name, answer in answers.items():  # most are of a class of C, before which that of Python comes
        setattr(torch.Tensor, name, answer)
    own = nn.Module.__setattr__
    nn.Module.__setattr__ = _setting(tracer, own)  # type: ignore[method-assign]
    try:
        with _Computed(tracer):
            yield
    finally:
        nn.Module.__setattr__ = own  # type: ignore[method-assign]
        for name, before in replaced.items():
            delattr(torch.Tensor, name) if before is None else setattr(torch.Tensor, name, before)


def _answer(tracer: Any, name: str) -> Any:
    """An attribute of a parameter or buffer is that at run time; values and changes are refused."""
    own = getattr(torch.Tensor, name)

    def asked(tensor: torch.Tensor) -> bool:
        return id(tensor) in tracer.held and is_the_models(sys._getframe(2).f_code.co_filename)

    def answered(tensor: torch.Tensor) -> Any:
        if name == "grad" and id(tensor) in tracer.held:
            tracer.refuse("it asks for the gradients of its parameters, of which a graph knows none")
        if not asked(tensor):
            return own.__get__(tensor)
        return getattr(tracer.held_proxy(tracer.held[id(tensor)], tensor), name)

    def refused(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if id(tensor) not in tracer.held or (name == "type" and not asked(tensor)):
            return own(tensor, *args, **kwargs)
        if name in _CHANGES:
            tracer.refuse(f"it calls {name} of its parameters, which a graph would not")
        return tracer.refuse_computed()

    return property(answered, cast(Any, own).__set__) if inspect.isdatadescriptor(own) else refused


def _setting(tracer: Any, own: Any) -> Any:
    """Attributes that the model's code sets on its modules, also to the values that they have."""

    def set_attribute(module: nn.Module, key: str, value: Any) -> None:
        if id(module) in tracer.members and is_the_models(sys._getframe(1).f_code.co_filename):
            tracer.refuse(f"it sets its attribute {key}, which a graph would not")
        own(module, key, value)

    return set_attribute


class _Computed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses results of parameters and buffers."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(id(tensor) in self.tracer.held for tensor in tensors_of((args, kwargs))):
            self.tracer.refuse_computed()
        return func(*args, **(kwargs or {}))
