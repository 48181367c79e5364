"""What objects hold and what functions use, one level deep, told without running any code of theirs.

Of torch, NumPy and the standard library only values are opened that hold something of a model: containers,
generators of random numbers, iterators, partials. Classes, functions and modules are opened of all others.
"""

from __future__ import annotations

import functools
import gc
import random
import sys
import threading
from array import array
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from itertools import islice
from types import (
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import nn

from ..nests import ATOMS

__all__ = [
    "VALUES",
    "Contents",
    "Opener",
    "is_own",
    "is_own_name",
    "named_in_class",
    "names_in",
    "opener_of",
    "texts_in",
]

VALUES = ATOMS | {bytes, complex}
_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "fxbasis"})
_CLOSED = frozenset(
    {"torch", "numpy", "fxbasis", "logging", "weakref", "typing", "importlib", "unittest", "threading"}
)
_ITERATORS = frozenset({"builtins", "itertools", "collections"})
_LISTS = (list, tuple, set, frozenset, deque)
_UNUSED = frozenset({"__doc__", "__module__", "__dict__", "__weakref__", "__dataclass_fields__", "_abc_impl"})
_ABSENT = "<absent>"
_MOST = 2000  # parts of one object
_MOST_BYTES = 2**20

Contents = list[Any] | dict[str, Any]
Opener = Callable[[Any], Contents]


def is_own(kind: type) -> bool:
    """Whether somebody else than torch, NumPy, the standard library and this package made the class."""
    return is_own_name(type.__getattribute__(kind, "__module__"))  # not asking its own class


def is_own_name(home: Any) -> bool:
    """Whether a module of this name is, or one without a name."""
    return not isinstance(home, str) or home.partition(".")[0] not in _FOREIGN


def opener_of(kind: type) -> Opener | None:
    """What tells the contents of objects of a class; None where nothing is in them that can change."""
    if kind is FunctionType:
        return functools.partial(_of_function, imported=dict(sys.modules))  # one that imports does not change
    for kinds, opener in _OPENERS:
        if issubclass(kind, kinds):
            return opener
    home = str(kind.__module__).partition(".")[0]
    if hasattr(kind, "__next__") and home in _ITERATORS:
        return _of_iterator
    if is_own(kind) or issubclass(kind, nn.Module):
        return _of_object
    return _of_object if kind.__dictoffset__ and home not in _CLOSED else None


def named_in_class(kind: type) -> dict[str, Any]:
    """What stands in a class and its bases, but for what runs as modules are made; Enums only grow."""
    if issubclass(kind, Enum):
        return {}
    unused = _UNUSED | {"__init__"} if issubclass(kind, nn.Module) else _UNUSED
    return {
        f"{owner.__name__}.{key}": value
        for owner in kind.__mro__
        if is_own(owner)
        for key, value in vars(owner).items()
        if key not in unused and not key.startswith("__anno")
    }


def _of_object(value: Any) -> list[Any]:
    """The attributes: of its dict, and of its slots."""
    kind = type(value)
    held = object.__getattribute__(value, "__dict__") if kind.__dictoffset__ else {}
    slots = [
        _slot(value, member)
        for owner in kind.__mro__
        if is_own(owner)
        for member in vars(owner).values()
        if type(member) is MemberDescriptorType
    ]
    return [len(held), *_first(held), *_first(held.values()), *slots]


def _slot(value: Any, member: MemberDescriptorType) -> Any:
    try:
        return member.__get__(value)
    except AttributeError:
        return _ABSENT


def _first(values: Any) -> Iterator[Any]:
    return islice(values, _MOST)


def _of_dict(value: dict[Any, Any]) -> list[Any]:
    kind = OrderedDict if isinstance(value, OrderedDict) else dict
    parts = [len(value), *_first(kind.keys(value)), *_first(kind.values(value))]
    return parts + _of_object(value) if is_own(type(value)) else parts


def _of_list(value: Any) -> list[Any]:
    kind = next(kind for kind in _LISTS if isinstance(value, kind))
    parts = [len(value), *_first(kind.__iter__(value))]
    return parts + _of_object(value) if is_own(type(value)) else parts


def _of_tensor(value: torch.Tensor) -> list[Any]:
    """How often it was changed in place; its values too, as far as ``.data`` may have changed them."""
    parts: list[Any] = [None if value.is_inference() else value._version]
    plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
    if plain and value.numel() * value.itemsize <= _MOST_BYTES and value.dtype is not torch.bfloat16:
        parts.append(_digest(value.detach().resolve_conj().resolve_neg().numpy()))
    return parts


def _digest(values: Any) -> int:
    return hash(values.tobytes())


def _of_array(value: Any) -> list[Any]:
    held = memoryview(value) if isinstance(value, (bytearray, array)) else value
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return [*_first(value.flat)]
    return [_digest(held)] if held.nbytes <= _MOST_BYTES else []


def _of_method(value: MethodType) -> list[Any]:
    return [value.__func__, value.__self__]


def _of_iterator(value: Any) -> list[Any]:
    """Where it stands, as ``copy`` would be told; in what cannot be copied, always elsewhere."""
    try:
        return [*_first(_flat(value.__reduce__()))]
    except TypeError:
        return [object()]


def _flat(value: Any) -> Iterator[Any]:
    """What is new at each call of ``__reduce__`` opened: tuples, lists, iterators in iterators."""
    kind = type(value)
    if kind in (tuple, list):
        for part in value:
            yield from _flat(part)
    elif hasattr(kind, "__next__") and kind.__module__ in _ITERATORS:
        yield from _flat(value.__reduce__())
    else:
        yield value


def _of_generator(value: GeneratorType[Any, Any, Any]) -> list[Any]:
    frame = value.gi_frame
    if frame is None:
        return [None]
    return [frame.f_lasti, value.gi_yieldfrom, *frame.f_locals, *frame.f_locals.values()]


def _of_cell(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not filled yet
        return []


def _of_function(value: FunctionType, imported: dict[str, Any]) -> list[Any]:
    """What a function has from outside: defaults, attributes, closure, globals and imports that it names."""
    kept = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *(value.__closure__ or ())]
    parts = [value.__code__, *kept, *vars(value), *vars(value).values()]
    space = value.__globals__
    if is_own_name(space.get("__name__")):
        parts += _first(_named(ChainMap(space, imported), names_in(value.__code__), set()))
    return parts


@functools.lru_cache(4096)
def names_in(code: CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in a function's code, and in that of functions inside."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return tuple(dict.fromkeys((*code.co_names, *(name for part in inner for name in names_in(part)))))


def texts_in(code: CodeType) -> list[str]:
    """The texts in a function's code that may name an attribute, as for ``getattr``."""
    found = [part for part in code.co_consts if isinstance(part, str) and part.isidentifier()]
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return found + [text for part in inner for text in texts_in(part)]


def _named(space: Mapping[str, Any], names: tuple[str, ...], seen: set[int]) -> Iterator[Any]:
    """The globals of these names; in modules and classes of modules that are among them, the attributes."""
    for name in names:
        value = space.get(name, _ABSENT)
        yield value
        if id(value) not in seen:
            seen.add(id(value))
            for inner in _spaces_in(value):
                yield from _named(inner, names, seen)


def _spaces_in(value: Any) -> list[Mapping[str, Any]]:
    kind = type(value)
    if issubclass(kind, ModuleType):
        space = object.__getattribute__(value, "__dict__")
        return [space] if is_own_name(space.get("__name__")) else []
    if issubclass(kind, type) and issubclass(value, nn.Module):
        return [vars(owner) for owner in value.__mro__ if is_own(owner)]
    return []


def _of_partial(value: functools.partial[Any]) -> list[Any]:
    return [value.func, *value.args, *value.keywords, *value.keywords.values()]


_OPENERS: tuple[tuple[Any, Opener | None], ...] = (
    (torch.Tensor, _of_tensor),
    (MethodType, _of_method),
    ((staticmethod, classmethod), lambda value: [value.__func__]),
    (property, lambda value: [value.fget, value.fset, value.fdel]),
    (functools.partial, _of_partial),
    (CellType, _of_cell),
    (GeneratorType, _of_generator),
    (type, named_in_class),
    ((ModuleType, torch.jit.ScriptModule), None),
    (dict, _of_dict),
    (MappingProxyType, gc.get_referents),
    (threading.local, lambda value: _of_dict(threading.local.__getattribute__(value, "__dict__"))),
    (_LISTS, _of_list),
    ((np.ndarray, bytearray, array), _of_array),
    (random.Random, lambda value: [str(random.Random.getstate(value))]),
    (np.random.Generator, lambda value: [str(value.bit_generator.state)]),
    (np.random.BitGenerator, lambda value: [str(value.state)]),
    (np.random.RandomState, lambda value: [str(value.get_state(legacy=False))]),
    (torch.Generator, lambda value: [_digest(value.get_state().numpy())]),
)
