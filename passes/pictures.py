"""Pictures of values: what a value says, in texts, numbers and tuples of them.

Two values of one picture are the same to code that reads them, also where one is in a copy of the model or
in a pickle. Of tensors and modules the picture is only that they are one.
"""

from __future__ import annotations

import functools
from enum import Enum
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from .contents import VALUES, opener_of

__all__ = ["is_plain", "picture_of"]

_SAID = (torch.dtype, torch.device, torch.layout, torch.memory_format, slice, range, torch.Size)
_PLACED = (BuiltinFunctionType, type, ModuleType)
_DEEP = 6
_MOST = 2000  # parts of one picture


def is_plain(value: Any) -> bool:
    """Whether the value itself tells its picture, as nothing in it can change."""
    return type(value) in VALUES or isinstance(value, (Enum, *_SAID, *_PLACED))


def picture_of(value: Any) -> Any:
    """What the value says, as far as six levels and 2,000 parts go."""
    return _picture(value, _DEEP, iter(range(_MOST)))


def _picture(value: Any, deep: int, left: Any) -> Any:
    kind: Any = type(value)
    if kind in VALUES:
        return kind.__name__, value
    if isinstance(value, (torch.Tensor, nn.Module)):
        return "tensor" if isinstance(value, torch.Tensor) else "module"
    if isinstance(value, Enum):
        return _name(kind), value.name, repr(value.value)
    if isinstance(value, _SAID):
        return _name(kind), str(value)
    if isinstance(value, _PLACED):
        return _name(kind), *_place(value)
    if deep == 0 or next(left, None) is None:
        return _name(kind)
    pictures = (_picture(part, deep - 1, left) for part in _parts(value))
    return _name(kind), frozenset(pictures) if isinstance(value, (set, frozenset)) else tuple(pictures)


def _parts(value: Any) -> Any:
    if isinstance(value, FunctionType):
        kept = value.__defaults__, value.__kwdefaults__, *(value.__closure__ or ())
        return *_place(value), value.__code__, *kept
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_consts
    kind: Any = type(value)
    opener = _opener(kind)
    contents = opener(value) if opener else ()
    return islice(contents.values() if isinstance(contents, dict) else contents, _MOST)


def _place(value: Any) -> tuple[str, str]:
    """The module and name of a function or class."""
    return str(getattr(value, "__module__", "")), getattr(value, "__qualname__", None) or value.__name__


_opener = functools.lru_cache(1024)(opener_of)


@functools.lru_cache(1024)
def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
