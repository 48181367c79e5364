"""What a graph kept of its modules' attributes: whether they are still what they were.

Code that is traced reads flags, sizes and functions of its modules once, and walks through their parts. The
flags are told by their names: those that the functions of the modules' classes name. ``training`` is not
among them, nor is what has no value to compare, such as tensors and other objects.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Hashable, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..nests import ATOMS
from .contents import is_own, names_in

__all__ = ["Attributes", "Places", "attributes_of", "places_of", "unchanged"]

_FIXED = (*ATOMS, Enum, torch.dtype, torch.device, BuiltinFunctionType, type)
_ABSENT = "<absent>"


class _OfModule(NamedTuple):
    """The class of a module, and values of its attributes by name."""

    kind: type[nn.Module]
    values: dict[str, Any]


class Places(NamedTuple):
    """Where each value is found, and how many parts each module has; ``gone`` where one is missing."""

    values: list[tuple[dict[str, Any], str, Any]]
    parts: list[tuple[dict[str, Any], int]]
    gone: list[str]


Attributes = Mapping[str, _OfModule]


def attributes_of(root: nn.Module, entered: Collection[str]) -> Attributes:
    """The attributes of the module itself and of these submodules that their code names."""
    modules = {name: root.get_submodule(name) for name in sorted({"", *entered})}
    for name, module in list(modules.items()):  # lists of modules are walked through, but not called
        inner = ((f"{name}.{key}".lstrip("."), part) for key, part in module.named_modules() if key)
        modules |= {path: part for path, part in inner if isinstance(part, (nn.ModuleList, nn.ModuleDict))}
    named = frozenset[str]().union(*(_named(cast(Hashable, type(module))) for module in modules.values()))
    return {name: _OfModule(type(module), _values(module, named)) for name, module in modules.items()}


def places_of(root: nn.Module, attributes: Attributes) -> Places:
    """Where to look for each value at every call; the parts that are there now are the right ones."""
    places = Places([], [], [])
    for name, (kind, values) in attributes.items():
        try:
            module = root.get_submodule(name)
        except AttributeError:
            places.gone.append(name)
            continue
        if name and type(module) is not kind:
            places.gone.append(name)
        places.values.extend((vars(module), key, value) for key, value in values.items())
        places.values.extend((module._modules, key, part) for key, part in module._modules.items())
        places.parts.append((module._modules, len(module._modules)))
    return places


def unchanged(places: Places) -> bool:
    """Whether every value and every part is what it was."""
    if places.gone or any(len(parts) != number for parts, number in places.parts):
        return False
    return all(_is_same(held.get(key, _ABSENT), value) for held, key, value in places.values)


def _values(module: nn.Module, named: Collection[str]) -> dict[str, Any]:
    held = ((key, value) for key, value in vars(module).items() if key in named and key != "training")
    return {key: _copied(value) for key, value in held if _is_fixed(value)}


def _is_fixed(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        return all(map(_is_fixed, value.values() if isinstance(value, dict) else value))
    if isinstance(value, FunctionType):  # copies of a model have others, where one holds something of it
        return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    return isinstance(value, _FIXED)


def _copied(value: Any) -> Any:
    """Containers may be changed in place."""
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _is_same(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other) or isinstance(one, nn.Module):
        return one is other
    return bool(one == other)


@functools.cache
def _named(kind: Hashable) -> frozenset[str]:
    """The names in the functions of a class, as far as they are somebody's own."""
    found: set[str] = set()
    for owner in filter(is_own, cast(type, kind).__mro__):
        for part in vars(owner).values():
            function = inspect.unwrap(getattr(part, "fget", None) or getattr(part, "__func__", part))
            if isinstance(function, FunctionType):
                found.update(names_in(function.__code__))
    return frozenset(found)
