"""Progress bars on standard error for what takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    """The items, with a bar that appears after two seconds and goes when done."""
    bar: Iterable[Item] = tqdm(items, desc=what, delay=2, leave=False)
    return bar
