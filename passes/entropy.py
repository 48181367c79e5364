"""Whether code asks the system for entropy, as generators of random numbers without a seed do."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .contents import is_own_name

__all__ = ["counted_entropy", "entropy_drawn"]

_DRAWN = [0]


def entropy_drawn() -> int:
    """How often it was asked for, as far as it was counted."""
    return _DRAWN[0]


@contextmanager
def counted_entropy() -> Iterator[None]:
    """Count inside: the seeds of ``random.Random()``, and what NumPy, ``secrets`` and ``uuid`` draw."""
    kept = [(os, "urandom"), (random, "_urandom"), (random.Random, "seed")]
    found = [(owner, name, vars(owner)[name]) for owner, name in kept]
    for owner, name, function in found:
        setattr(owner, name, _counting_seeds(function) if name == "seed" else _counting(function))
    try:
        yield
    finally:
        for owner, name, function in found:
            setattr(owner, name, function)


def _counting(function: Callable[[int], bytes]) -> Callable[[int], bytes]:
    def drawn(size: int) -> bytes:
        _DRAWN[0] += _asked_by_model()
        return function(size)

    return drawn


def _counting_seeds(function: Callable[..., None]) -> Callable[..., None]:
    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        _DRAWN[0] += a is None and _asked_by_model()
        function(self, a, version)

    return seed


def _asked_by_model() -> bool:
    """Whether neither torch asks, for a temporary file say, nor a module as it is imported."""
    frame: FrameType | None = sys._getframe(2)
    asked = False
    while frame is not None:
        home = frame.f_globals.get("__name__")
        top = str(home).partition(".")[0]
        if top in ("torch", "importlib"):
            return asked and top == "torch"
        asked = asked or is_own_name(home)
        frame = frame.f_back
    return asked
