"""Pictures of what modules hold and their code uses, to see afterwards what a run has changed."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..nests import ATOMS

__all__ = ["changed", "pictures"]

_REGISTERED = ("_parameters", "_buffers", "_modules")
_EMPTY = (OrderedDict, dict)
_COUNTED = (int, float, str, list, dict, set, deque)


def pictures(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What each module and its classes hold: tensors and modules themselves; of the rest what is in it."""
    kinds = {kind: _of_classes(kind) for kind in {type(module) for module in modules.values()}}
    return {name: _attributes(module) | kinds[type(module)] for name, module in modules.items()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    held = {key: _inside(value) for key, value in vars(module).items() if key not in _REGISTERED}
    return held | {key: _inside(part) for name in _REGISTERED for key, part in vars(module)[name].items()}


def _of_classes(kind: type[nn.Module]) -> dict[str, Any]:
    return {
        f"{owner.__name__}.{key}{'()' * isinstance(value, FunctionType)}": _inside(value, 6)
        for owner in kind.__mro__
        if not owner.__module__.startswith("torch.")
        for key, value in vars(owner).items()
        if isinstance(value, (int, float, str, list, dict, set, FunctionType)) and not key.startswith("__")
    }


def _inside(value: Any, depth: int = 4) -> Any:
    """A picture of a value: containers and objects opened, random generators and tensors by their state."""
    kind = type(value)
    if kind in ATOMS or depth == 0:
        return value
    if kind in _EMPTY and not value:  # most are of hooks
        return kind
    if kind is tuple and {*map(type, value)} <= ATOMS:
        return value
    if isinstance(value, (int, float, str, type, nn.Module)):
        return value
    if isinstance(value, torch.Tensor):
        return value, None if value.is_inference() else value._version
    if isinstance(value, (dict, Mapping)):
        return {key: _inside(part, depth - 1) for key, part in value.items()} if value else Mapping
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, FunctionType):
        return [value, _inside(_around(value), depth - 1)]
    if callable(value):
        return value
    if isinstance(value, (Sequence, Set, deque)):
        return [_inside(part, depth - 1) for part in value]
    return _inside(dict(vars(value)), depth - 1) if hasattr(value, "__dict__") else value


def _around(function: FunctionType) -> dict[str, Any]:
    """The variables that a function has from outside: of its closure, and globals that can change."""
    found = function.__globals__
    named = {name: found[name] for name in function.__code__.co_names if _may_change(found.get(name))}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        with suppress(ValueError):  # not filled yet
            named[name] = cell.cell_contents
    return named


def _may_change(value: Any) -> bool:
    """Whether a global may be other after a call: a counter, a generator, an object, what a function uses."""
    if isinstance(value, (*_COUNTED, random.Random, np.random.Generator, torch.Generator)):
        return True
    if isinstance(value, (type, ModuleType, nn.Module, torch.Tensor)):
        return False
    home = (value.__module__ if isinstance(value, FunctionType) else type(value).__module__) or ""
    foreign = home.partition(".")[0] in {*sys.stdlib_module_names, "torch", "numpy"}
    return not foreign and (
        isinstance(value, FunctionType) or (hasattr(value, "__dict__") and not callable(value))
    )


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names of what is another than before, or is new."""
    return {
        key
        for key, value in after.items()
        if key not in before or not (before[key] is value or _same(before[key], value))
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and _same(list(one.values()), list(other.values()))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, (int, float, str)) and one == other)
