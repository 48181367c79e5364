"""Measured times on disk, so that a layer is timed once on a machine.

The file holds one JSON object a line, ``{"key": {...}, "ratio": ..., "dense_ms": ...}``, and only grows. A
line is appended in one write and begins with the end of the line before it, so that one cut off spoils none
but itself, and processes can share the file.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FxBasisWarning

__all__ = ["Timing", "default_path", "times_at"]


class Timing(NamedTuple):
    """What was measured: the time over that of the dense layer, and the dense layer's in milliseconds."""

    ratio: float
    dense_ms: float


def default_path() -> Path:
    """``fxbasis/layer_times.jsonl`` in the user's cache folder: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "fxbasis", "layer_times.jsonl")


@lru_cache
def times_at(path: Path) -> _Times:
    """The times in a file, which need not exist yet; one object for each path."""
    return _Times(path)


class _Times:
    """What a file holds, read when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Timing] = {}
        self._state: tuple[int, int] | None = None

    def get(self, key: Mapping[str, Any]) -> Timing | None:
        """The time under this key, if it has been measured."""
        state = self._state_of_file()
        if state != self._state:
            self._known, self._state = self._read() if state else {}, state
        return self._known.get(_text(key))

    def put(self, key: Mapping[str, Any], timing: Timing) -> None:
        """Keep a time; where the file cannot be written, a warning, and it is kept in memory."""
        self._known[_text(key)] = timing
        line = "\n" + json.dumps({"key": dict(key), **timing._asdict()})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            _warn(f"cannot write {self._path}: {error.strerror or error}; pass cache= another file")
        self._state = self._state_of_file()

    def _state_of_file(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _read(self) -> dict[str, Timing]:
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError as error:
            _warn(f"cannot read {self._path}: {error.strerror or error}; pass cache= another file")
            return {}
        entries = [_entry(line) for line in lines if line.strip()]
        damaged = entries.count(None)
        if damaged:
            what = "1 line is" if damaged == 1 else f"{damaged} lines are"
            _warn(f"{self._path}: {what} damaged and ignored; delete the file to measure afresh")
        return dict(entry for entry in entries if entry is not None)


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _entry(line: bytes) -> tuple[str, Timing] | None:
    """Key and time of a line; None for a damaged one."""
    try:
        found = json.loads(line)
        key, timing = _text(found["key"]), Timing(float(found["ratio"]), float(found["dense_ms"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, timing) if all(math.isfinite(value) and value > 0 for value in timing) else None


def _warn(text: str) -> None:
    warnings.warn(text, FxBasisWarning, stacklevel=4)
