"""Arguments that could be taken for something else: flags that are no bool, paths that are none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from .errors import FxBasisError, SelectionError, UsageError

__all__ = ["as_path", "check_flags"]


def check_flags(**flags: Any) -> None:
    """Refuse what Python would take for true or false, but is neither.

    >>> check_flags(dynamic_batch=True)

    Raises:
        SelectionError: naming the first such argument.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise SelectionError(f"{name}={value!r} is neither True nor False; pass one of them")


def as_path(path: Any, error: type[FxBasisError] = UsageError) -> Path:
    """The path, if the system can have one like it.

    >>> as_path("models/small").name
    'small'

    Raises:
        FxBasisError: of the given class, for another type, an empty text, or what no file can be called.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str) or not str(path):
        raise error(f"{path!r} is no path; give the name of a file or folder, as text or pathlib.Path")
    reason = ""
    try:
        os.stat(path)
    except ValueError as found:
        reason = str(found)
    except OSError as found:
        reason = os.strerror(found.errno) if found.errno == errno.ENAMETOOLONG else ""
    if reason:
        raise error(f"{str(path)!r:.80} is no path ({reason}); give another name")
    return Path(path)
