"""What a graph kept of its modules: whether their attributes and parts are still what they were.

Code that is traced reads flags, sizes, functions and objects of its modules once, walks through their parts,
and calls submodules without their hooks. Which attributes those are is told by the names in the functions of
the modules' classes; ``training`` is not among them. Values are told by their pictures (``pictures``), so
that those of a copy or a pickle are the same, and of a tensor or a module only that it is one.
"""

from __future__ import annotations

import functools
import inspect
from collections import ChainMap
from collections.abc import Collection, Hashable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple, cast

from torch import fx, nn

from ..carrying import has_hooks, hooks_of
from ..forms import BasisConv2d
from .contents import is_own, names_in, texts_in
from .pictures import is_plain, picture_of

__all__ = ["Attributes", "Places", "attributes_of", "places_of", "unchanged"]

_ABSENT = "<absent>"
_NONE = object()  # which no attribute is
_OF_GRAPHS = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))
_FORWARD = frozenset({"forward"})


class _OfModule(NamedTuple):
    """The class of a module, pictures of its attributes by name, and the names that it has not."""

    kind: type[nn.Module]
    values: dict[str, Any]
    absent: frozenset[str]


class Places(NamedTuple):
    """Where to look for what was kept; ``gone`` where a module is missing.

    ``values`` have where each is found, its name, its picture, and itself if that tells the picture;
    ``absent`` the names that a module must not have; ``parts`` its submodules now and then; ``uncalled`` the
    modules that the graph does not call, and whose hooks it passes by.
    """

    values: list[tuple[Mapping[str, Any], str, Any, Any]]
    absent: list[tuple[dict[str, Any], frozenset[str]]]
    parts: list[tuple[dict[str, Any], dict[str, Any]]]
    uncalled: list[nn.Module]
    gone: list[str]


Attributes = Mapping[str, _OfModule]


def attributes_of(root: nn.Module, entered: Collection[str]) -> Attributes:
    """The attributes of the module itself and of these submodules that their code names."""
    modules = {name: root.get_submodule(name) for name in sorted({"", *entered})}
    for name, module in list(modules.items()):  # lists of modules are walked through, but not called
        inner = ((f"{name}.{key}".lstrip("."), part) for key, part in module.named_modules() if key)
        modules |= {path: part for path, part in inner if isinstance(part, (nn.ModuleList, nn.ModuleDict))}
    kinds = {type(module) for module in modules.values()}
    named = frozenset[str]().union(*(_named(cast(Hashable, kind)) for kind in kinds)) - _OF_GRAPHS
    return {name: _of_module(module, named) for name, module in modules.items()}


def _of_module(module: nn.Module, named: frozenset[str]) -> _OfModule:
    held = {key: _found(module, key) for key in sorted(named)}
    values = {key: picture_of(holder[key]) for key, holder in held.items() if _is_kept(holder, key)}
    return _OfModule(type(module), values, named - vars(module).keys())


def _found(module: nn.Module, key: str) -> Mapping[str, Any]:
    """Where an attribute is: set on the module, among its tensors, or else in its own classes."""
    held = (vars(module), module._parameters, module._buffers)
    classes = (vars(owner) for owner in type(module).__mro__ if is_own(owner))
    return next((holder for holder in held if key in holder), ChainMap(*cast(Any, classes)))


def _is_kept(holder: Mapping[str, Any], key: str) -> bool:
    """Of classes their data; code of theirs a graph keeps."""
    of_class = isinstance(holder, ChainMap)
    return key in holder and not (of_class and (callable(holder[key]) or hasattr(holder[key], "__get__")))


def places_of(root: fx.GraphModule, attributes: Attributes) -> Places:
    """Where to look for each value at every call; the parts that are there now are the right ones."""
    places = Places([], [], [], [], [])
    for form in _uncalled_forms(root):
        places.absent.append((vars(form), _FORWARD))
        places.uncalled.append(form)
    for name, kept in attributes.items():
        try:
            module = root.get_submodule(name)
        except AttributeError:
            places.gone.append(name)
            continue
        if name and type(module) is not kept.kind:
            places.gone.append(name)
        places.values.extend(_values(module, kept))
        places.absent.append((vars(module), kept.absent | _FORWARD if name else kept.absent))
        places.parts.append((module._modules, dict(module._modules)))
        places.uncalled.extend([module] if name else [])
    return places


def _uncalled_forms(root: fx.GraphModule) -> Iterator[nn.Module]:
    """The forms whose steps the graph calls, and not them."""
    calls = {str(node.target) for node in root.graph.find_nodes(op="call_module")}
    parents = {call.rpartition(".")[0] for call in calls} - calls
    for path, module in root.named_modules(remove_duplicate=False):
        if path in parents and isinstance(module, BasisConv2d):
            yield module


def _values(module: nn.Module, kept: _OfModule) -> Iterator[tuple[Mapping[str, Any], str, Any, Any]]:
    for key, picture in kept.values.items():
        holder = _found(module, key)
        value = holder.get(key, _ABSENT)
        tells = is_plain(value) and picture_of(value) == picture
        yield holder, key, picture, value if tells else _NONE


def unchanged(places: Places) -> bool:
    """Whether every value and every part is what it was, and nothing is put where a graph does not look."""
    if places.gone or any(now != before for now, before in places.parts):
        return False
    if any(not names.isdisjoint(held) for held, names in places.absent):
        return False
    if any(map(_is_hooked, places.uncalled)):
        return False
    return all(_is_same(held.get(key, _ABSENT), *kept) for held, key, *kept in places.values)


def _is_same(value: Any, picture: Any, itself: Any) -> bool:
    return value is itself or bool(picture_of(value) == picture)


def _is_hooked(module: nn.Module) -> bool:
    """Whether others than this package's own watchers put hooks on it."""
    if not has_hooks(module):  # the most frequent, and the fastest
        return False
    hooks = (getattr(hook, "func", hook) for hook in hooks_of(module))
    return any(not str(getattr(hook, "__module__", "")).startswith("fxbasis.") for hook in hooks)


@functools.cache
def _named(kind: Hashable) -> frozenset[str]:
    """The names in the functions of a class, as far as they are somebody's own, and in their texts."""
    found: set[str] = set()
    for owner in filter(is_own, cast(type, kind).__mro__):
        for part in vars(owner).values():
            function = inspect.unwrap(getattr(part, "fget", None) or getattr(part, "__func__", part))
            if isinstance(function, FunctionType):
                found.update(names_in(function.__code__), texts_in(function.__code__))
    return frozenset(found)
