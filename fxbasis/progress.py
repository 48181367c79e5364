"""Progress bars on standard error for what takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar that appears after two seconds and goes when done.

    ``total`` is their number, for items that do not know it.
    """
    bar: Iterable[Item] = tqdm(items, desc=what, total=total, delay=2, leave=False)
    return bar
