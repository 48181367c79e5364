"""Files written whole or not at all: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .arguments import as_path
from .errors import FxBasisError, UsageError


def write_whole(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, or leave what is there untouched.

    Raises:
        UsageError: when the folder is missing, not writable, or the disk is full.
    """
    write_through(path, lambda temporary: temporary.write_bytes(content))


def write_through(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``."""
    with replacing(path) as temporary:
        write(temporary)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path``, renamed to ``path`` at the end if nothing failed.

    Raises:
        UsageError: when the folder is missing, not writable, or the disk is full.
    """
    path, temporary = check_target(path), None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def made_folder(folder: str | Path) -> Iterator[Path]:
    """The folder, made if it does not exist, and gone again when what follows fails and leaves it empty.

    Raises:
        UsageError: when it cannot be made, or is a file.
    """
    folder = as_path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()
        raise


def check_target(path: str | Path) -> Path:
    """The path of a file to write, refused before the work begins when it has no folder or is one.

    Raises:
        UsageError: naming the path.
    """
    path = as_path(path)
    if path.is_dir():
        raise cannot_write(path, IsADirectoryError("it is a folder"))
    if not path.parent.is_dir():
        raise cannot_write(path, NotADirectoryError(f"{path.parent} is no folder"))
    return path


def check_folder(path: str | Path) -> Path:
    """The path of a folder to write, refused before the work begins when it cannot be one.

    Raises:
        UsageError: naming the path.
    """
    path = as_path(path)
    above = next((part for part in (path, *path.parents) if part.exists()), Path())
    if not above.is_dir():
        raise UsageError(f"cannot write {path}: {above} is a file; give the name of a folder")
    if not os.access(above, os.W_OK):
        raise UsageError(f"cannot write {path}: {above} is not writable; give another folder")
    return path


def cannot_write(path: Path, error: OSError) -> FxBasisError:
    """The error for a path that cannot be written."""
    reason = error.strerror or str(error)
    return UsageError(f"cannot write {path}: {reason}; give a path in a folder that exists and has room")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
