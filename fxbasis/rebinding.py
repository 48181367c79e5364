"""What a deep copy leaves with the original, turned to the copy: functions, weak references, bound methods.

``copy.deepcopy`` takes functions and weak references as they are. A hook, or a forward put on an instance,
that has the model in its closure would so read the original's weights, and write into the original.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from .nests import ATOMS

__all__ = ["rebind_"]

_EMPTY_CELL = object()
_CLOSED = (torch.Tensor, nn.Module, fx.Graph, fx.Node, type)  # never opened; modules are visited one by one
_NAMED = (dict, list, tuple, set, frozenset)


def rebind_(copied: nn.Module, memo: Mapping[int, Any]) -> None:
    """Turn what the modules of a copy hold, however deep, from the original to the copy.

    Args:
        copied: the copy, changed in place; nothing that the original holds is.
        memo: of the deepcopy, by the id of what was copied.
    """
    turn = _Turn(memo)
    for module in copied.modules():
        turn.inside(vars(module))


class _Turn:
    """What stands in the copy for a value of the original."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self.memo = dict(memo)
        self.copies = {id(value) for value in memo.values()}
        self.seen: set[int] = set()

    def inside(self, held: Any) -> None:
        """Of a dict or list of the copy, in place."""
        for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
            if type(value) in ATOMS:
                continue
            turned = self.of(value)
            if turned is not value:
                held[key] = turned

    def of(self, value: Any) -> Any:
        """The value, or what stands for it; functions, tuples are made anew, what was copied is changed."""
        kind = type(value)
        if id(value) in self.memo:
            return self.memo[id(value)]
        if kind is MethodType:
            owner = value.__self__
            return MethodType(value.__func__, self.memo[id(owner)]) if id(owner) in self.memo else value
        if kind is weakref.ref:
            return weakref.ref(self.memo[id(value())]) if id(value()) in self.memo else value
        if kind is FunctionType:
            return self._function(value) if value.__closure__ else value
        if kind is tuple:
            parts = tuple(map(self.of, value))
            return value if all(map(_same, parts, value)) else parts
        if kind is functools.partial:
            return self._partial(value)
        if id(value) in self.copies and id(value) not in self.seen and not isinstance(value, _CLOSED):
            self.seen.add(id(value))
            if isinstance(value, (dict, list)):
                self.inside(value)
            elif kind not in _NAMED and isinstance(getattr(value, "__dict__", None), dict):
                self.inside(vars(value))
        return value

    def _partial(self, value: functools.partial[Any]) -> Any:
        parts = (value.func, value.args, tuple(value.keywords.values()))
        func, args, named = map(self.of, parts)
        if all(map(_same, (func, args, named), parts)):
            return value
        return functools.partial(func, *args, **dict(zip(value.keywords, named, strict=True)))

    def _function(self, value: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in value.__closure__ or ())
        made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__, made.__qualname__ = value.__kwdefaults__, value.__qualname__
        made.__dict__.update(value.__dict__)
        self.memo[id(value)] = made  # before its cells: it may call itself
        before = [_content(cell) for cell in value.__closure__ or ()]
        after = [self._inside_of_cell(content) for content in before]
        if all(map(_same, before, after)):
            self.memo[id(value)] = value
        for cell, content in zip(cells, after, strict=True):
            if content is not _EMPTY_CELL:
                cell.cell_contents = content
        return self.memo[id(value)]  # type: ignore[no-any-return]

    def _inside_of_cell(self, content: Any) -> Any:
        """A list or dict in a closure is the original's own: made anew where it leads to a copy."""
        if type(content) is list and id(content) not in self.memo:
            parts = [self._inside_of_cell(part) for part in content]
            return content if all(map(_same, parts, content)) else parts
        if type(content) is dict and id(content) not in self.memo:
            named = {key: self._inside_of_cell(part) for key, part in content.items()}
            return content if all(map(_same, named.values(), content.values())) else named
        return self.of(content)


def _same(one: Any, other: Any) -> bool:
    return one is other


def _content(cell: CellType) -> Any:
    with suppress(ValueError):
        return cell.cell_contents
    return _EMPTY_CELL
