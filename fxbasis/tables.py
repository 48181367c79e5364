"""Tables of text: numbers to the right, words to the left."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def aligned(
    rows: Sequence[Sequence[str]], headers: Sequence[str], *, left: Sequence[str], tablefmt: str = "simple"
) -> str:
    """The rows under their headers; columns named in ``left`` hold words.

    >>> print(aligned([["a", "1,000"], ["bc", "20"]], ["name", "MACs"], left=["name"]))
    name      MACs
    ------  ------
    a        1,000
    bc          20
    """
    align = ["left" if header in left else "right" for header in headers]
    text: str = tabulate(
        rows, headers=headers, tablefmt=tablefmt, disable_numparse=True, colalign=align if rows else None
    )
    return text
