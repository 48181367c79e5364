"""Calls of the forward of modules: functions put around them, which arguments they give, and of what kind.

Python may ask of an argument whether it is given, its class, whether it is None, a flag, or the same as
another; a graph kept the answers. ``kind_of_call`` is the text of all these, without values and shapes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from itertools import count
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..nests import ATOMS, parts_of_object
from .contents import is_own

__all__ = ["defaults_of", "given_arguments", "kind_of_call", "left_defaults", "wrapped"]

_NUMBERS = count()


@contextmanager
def wrapped(wraps: Iterator[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Put a function around the forward of modules, however it is called."""
    undo: list[tuple[nn.Module, Any]] = []
    for module, around in wraps:
        original = module.forward
        undo.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = _around(original, around)
    try:
        yield
    finally:
        for module, replaced in undo:
            if replaced is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = replaced


def _around(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: around(original, *args, **kwargs)


def given_arguments(module: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """Arguments of forward that a call gives."""
    try:
        return list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)[1:]
    except TypeError:
        return []


def left_defaults(module: nn.Module, given: Collection[str]) -> dict[str, Any]:
    """Arguments of forward that are left at their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(type(module).forward).parameters.items()
        if parameter.default is not parameter.empty and name not in given
    }


def defaults_of(forward: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a forward with their defaults; ``inspect.Parameter.empty`` where there is none."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {part.name: part.default for part in parameters if part.kind in named}


def kind_of_call(defaults: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What code could ask of the arguments of a call; those at their defaults are left out.

    >>> x = torch.zeros(1)
    >>> kind_of_call({"x": inspect.Parameter.empty, "mask": None, "flag": True}, (x, None), {"flag": False})
    'x: Tensor, flag: False'
    >>> kind_of_call({"q": 0, "k": 0}, (x, x), {})
    'q: Tensor, k: q'
    """
    names = [*defaults, *(f"*{index}" for index in range(len(args) - len(defaults)))]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    seen: dict[int, str] = {}
    return ", ".join(
        f"{name}: {_kind_of(value, name, seen)}"
        for name, value in given.items()
        if not (name in defaults and value is defaults[name])
    )


def _kind_of(value: Any, name: str, seen: dict[int, str], depth: int = 8) -> str:
    """The kind of one argument, or the ``name`` under which it was seen before."""
    kind = type(value)
    if value is None or kind is bool or isinstance(value, (Enum, torch.dtype)):
        return str(value)
    if kind in ATOMS:
        return kind.__name__
    if seen.setdefault(id(value), name) != name:
        return seen[id(value)]
    if isinstance(value, torch.Tensor):
        of_torch = kind.__module__.partition(".")[0] == "torch"  # asked so that torch.compile follows
        return "Tensor" if of_torch and kind is not nn.Parameter else kind.__name__
    if isinstance(value, nn.Module) or depth == 0:
        return kind.__name__
    if callable(value):
        return _kind_of_function(value)
    if isinstance(value, (list, tuple)):
        parts: Mapping[Any, Any] = dict(enumerate(value))
        return f"{kind.__name__}({', '.join(_kinds_of(parts, name, seen, depth).values())})"
    parts = value if isinstance(value, Mapping) else _parts_of(value)
    kinds = _kinds_of(parts, name, seen, depth).items()
    return f"{kind.__name__}({', '.join(f'{key}: {part}' for key, part in kinds)})"


def _kinds_of(parts: Mapping[Any, Any], name: str, seen: dict[int, str], depth: int) -> dict[Any, str]:
    return {key: _kind_of(part, f"{name}[{key}]", seen, depth - 1) for key, part in parts.items()}


def _parts_of(value: Any) -> dict[str, Any]:
    """What an object holds: attributes, slots and properties."""
    found = parts_of_object(value) or {}
    for owner in type(value).__mro__ if is_own(type(value)) else ():
        named = [*vars(owner).get("__slots__", ())]
        named += [key for key, part in vars(owner).items() if isinstance(part, property)]
        for key in named:
            try:
                found[key] = getattr(value, key)
            except Exception:  # which a property may raise, and an empty slot does
                found[key] = inspect.Parameter.empty
    return found


def _kind_of_function(value: Callable[..., Any]) -> str:
    """Its name, where that finds it; what else has the name is another one each time."""
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    try:
        found = attrgetter(name)(sys.modules.get(module or "builtins"))
    except AttributeError:
        found = None
    return f"{module}.{name}" if found is value else f"{name} {next(_NUMBERS)}"
