"""Calls of the forward of modules: functions put around them, and which arguments they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["given_arguments", "left_defaults", "wrapped"]


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
