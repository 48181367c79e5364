"""Pictures of what modules hold and their code uses, to see afterwards what a run has changed."""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from .contents import VALUES, Contents, Opener, is_own, named_in_class, opener_of

__all__ = ["Picture"]

_REGISTERED = ("_parameters", "_buffers", "_modules")
_EMPTY = (OrderedDict, dict, list, set)
_MOST, _PER_MODULE = 5000, 10  # objects that are opened


class _Seen(NamedTuple):
    """An object, what tells its contents, and these as they were."""

    value: Any
    opener: Opener
    contents: Contents

    def now(self) -> Contents:
        """The contents as they are."""
        return _contents(self.value, self.opener)

    def named(self) -> list[tuple[str, Any]]:
        """The contents that have names: of modules and classes."""
        return [*self.contents.items()] if isinstance(self.contents, dict) else []


class Picture:
    """What is reached from the modules and their classes, each object once; not opened beyond a number.

    Args:
        modules: by name. Whether they are in train() is not in the picture.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.seen: dict[int, _Seen] = {}
        self.openers: dict[type, Opener | None] = {}
        self.queue: deque[Any] = deque()
        for module in modules.values():
            self._keep(module, _attributes)
        most = _MOST + _PER_MODULE * len(modules)
        while self.queue and len(self.seen) < most:  # the nearest first
            self._open(self.queue.popleft())
        self.queue.clear()

    def _open(self, value: Any) -> None:
        kind = type(value)
        if kind in VALUES or id(value) in self.seen:
            return
        if kind is tuple and VALUES.issuperset(map(type, value)):
            return
        opener = self._opener_of(kind)
        if opener and (not issubclass(kind, type) or _is_plain(value)):
            self._keep(value, opener)

    def _keep(self, value: Any, opener: Opener) -> None:
        contents = _contents(value, opener)
        self.seen[id(value)] = _Seen(value, opener, contents)
        self.queue.extend(_values(contents))
        self._opener_of(type(value))

    def _opener_of(self, kind: type) -> Opener | None:
        """Told once for each class, which is opened itself then."""
        if kind not in self.openers:
            try:
                self.openers[kind] = opener_of(kind)
                if is_own(kind):
                    self._keep(kind, named_in_class)
            except Exception:  # a class may answer anything
                self.openers[kind] = None
        return self.openers[kind]

    def changed(self) -> Iterator[tuple[str, str]]:
        """The modules that reach what is another than before, and what they do to it; the innermost first."""
        others = {key for key, seen in self.seen.items() if not _same(seen.contents, seen.now())}
        holders = self._holders(others) if others else set()
        for name, module in reversed([*self.modules.items()] if others else []):
            change = next(chain(self._in_module(module, holders), self._in_class(type(module), holders)), "")
            if change:
                yield name, change

    def _in_module(self, module: nn.Module, holders: set[int]) -> Iterator[str]:
        seen = self.seen[id(module)]
        yield from (f"sets its attribute {key}" for key in _differing(seen.contents, seen.now()))
        held = (key for key, part in seen.named() if id(part) in holders)
        yield from (f"changes what its attribute {key} holds or uses" for key in held)

    def _in_class(self, kind: type, holders: set[int]) -> Iterator[str]:
        seen = self.seen.get(id(kind))
        if seen is not None:
            yield from (f"sets the attribute {key}" for key in _differing(seen.contents, seen.now()))
            held = (key for key, part in seen.named() if id(part) in holders)
            yield from (f"changes what {key} holds or uses" for key in held)

    def _holders(self, others: set[int]) -> set[int]:
        """The objects from which one of the others is found, not through one of the modules."""
        held_by: dict[int, list[int]] = {}
        for key, seen in self.seen.items():
            for part in (*_values(seen.contents), type(seen.value)):
                held_by.setdefault(id(part), []).append(key)
        met = {id(module) for module in self.modules.values()}
        queue, found = [*others], set[int]()
        while queue:
            key = queue.pop()
            if key not in met:
                met.add(key)
                found.add(key)
                queue += held_by.get(key, ())
        return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds but for its mode; empty containers, most of which are of hooks, by their kind."""
    held = {
        key: type(value).__name__ if type(value) in _EMPTY and not value else value
        for key, value in vars(module).items()
        if key not in _REGISTERED
    }
    for name in _REGISTERED:
        held.update(vars(module)[name])
    del held["training"]
    return held


def _is_plain(kind: type) -> bool:
    """Whether a class is somebody's own and not of modules, which are opened where one of them is."""
    return is_own(kind) and not issubclass(kind, nn.Module)


def _contents(value: Any, opener: Opener) -> Contents:
    try:
        return opener(value)
    except Exception:  # an object may refuse anything
        return []


def _values(contents: Contents) -> Iterable[Any]:
    return contents.values() if isinstance(contents, dict) else contents


def _differing(before: Contents, after: Contents) -> list[str]:
    """The names of what is another, new or gone."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    kept = {key for key in before.keys() & after.keys() if _same_value(before[key], after[key])}
    return sorted({*before, *after} - kept)


def _same(before: Contents, after: Contents) -> bool:
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() != after.keys():
        return False
    one, other = _values(before), _values(after)
    same_number = len(before) == len(after)
    return same_number and (not any(map(operator.is_not, one, other)) or all(map(_same_value, one, other)))


def _same_value(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in VALUES and bool(one == other))
