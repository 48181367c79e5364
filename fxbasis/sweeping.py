"""Many independent measurements, in parallel if there is an executor, kept as they finish and resumed.

Results go to a file of lines, one JSON object for each finished point:

    {"context": "5f0c...", "key": "layer2.0.conv1 output 16", "result": {"change": 0.031}}

A line is appended by one write and is on the disk before the next point is recorded, so a process that is
killed loses the points in work and no other; a line that it was writing is cut off by the next sweep. The
context stands for all that results depend on beside the key: a hash of the model, the data and the setting.
Lines of other contexts are kept and not read, so one file serves many.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from .errors import FxBasisError, InputError, UsageError
from .files import cannot_write
from .progress import progress

__all__ = ["sweep"]

Argument = TypeVar("Argument")
Result: TypeAlias = dict[str, float]
Outcomes: TypeAlias = Generator[tuple[str, Result | Exception], None, None]
_IN_FLIGHT = 128  # submitted and not recorded; enough for as many workers
_HEAD = b'{"context": '


def sweep(
    points: Mapping[str, Argument],
    compute: Callable[[Argument], Mapping[str, float]],
    *,
    path: Path | None,
    context: str,
    executor: Executor | None = None,
    minutes: float | None = None,
) -> dict[str, Result]:
    """The result of ``compute`` for each point, in the order of the points; finished ones are not redone.

    Args:
        points: the argument of each point, under a name that says what it is.
        compute: of one argument, a dict of floats. With processes, both must be picklable.
        path: of the file of results, made if it does not exist; None keeps nothing.
        context: what the results depend on beside the name of the point, as a string such as a hash.
        executor: of ``concurrent.futures``, or ``Client(...).get_executor()`` of Dask, which starts the
            points of a lost worker again by itself, with results of it that were on their way; without
            one, points are computed here, one by one.
        minutes: after them no point is started. Those that have not begun are given up, those in work are
            waited for, and what is there is returned: the caller sees by the keys what is missing. Dask
            gives up those in work too.

    >>> sweep({"two": 2.0, "three": 3.0}, lambda x: {"square": x * x}, path=None, context="")
    {'two': {'square': 4.0}, 'three': {'square': 9.0}}

    Raises:
        FxBasisError: naming a point that failed, once all others are recorded.
        InputError: for the name of a point that is no string.
        UsageError: for a file that cannot be written, holds something else, or is in use by another process.
    """
    for key in points:
        if not isinstance(key, str):
            raise InputError(f"the point {key!r} is named by a {type(key).__name__}; name it by a string")
    if minutes is not None and not (isinstance(minutes, (int, float)) and minutes >= 0):  # nan is not either
        raise InputError(f"minutes={minutes!r} is no time; pass a number from 0")
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    failed: dict[str, Exception] = {}
    with _kept(path, context) as results:
        missing = {key: argument for key, argument in points.items() if key not in results.found}
        with contextlib.closing(_outcomes(missing, compute, executor, deadline)) as outcomes:
            for key, outcome in progress(outcomes, "points", len(missing)):
                if isinstance(outcome, Exception):
                    failed[key] = outcome
                else:
                    results.add(key, outcome)
    if failed:
        raise _failure(failed, path)
    return {key: results.found[key] for key in points if key in results.found}


def _outcomes(
    points: Mapping[str, Argument],
    compute: Callable[[Argument], Any],
    executor: Executor | None,
    deadline: float,
) -> Outcomes:
    """Each point as it finishes, with its result or what it raised."""
    if executor is not None:
        yield from _submitted(points, compute, executor, deadline)
        return
    for key, argument in points.items():
        if time.monotonic() >= deadline:
            return
        yield key, _outcome(compute, argument)


def _submitted(
    points: Mapping[str, Argument], compute: Callable[[Argument], Any], executor: Executor, deadline: float
) -> Outcomes:
    waiting = list(points.items())[::-1]
    running: dict[Future[Any], str] = {}
    try:
        while waiting or running:
            left = deadline - time.monotonic()
            if left <= 0:
                waiting.clear()
                running = {future: key for future, key in running.items() if not future.cancel()}
            while waiting and len(running) < _IN_FLIGHT:
                key, argument = waiting.pop()
                running[_future(executor, compute, argument)] = key
            done, _ = wait(running, left if 0 < left < math.inf else None, FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), _outcome(future.result)
    finally:
        for future in running:
            future.cancel()


def _future(executor: Executor, compute: Callable[[Argument], Any], argument: Argument) -> Future[Any]:
    """The submitted point; one that failed if it cannot be submitted, as when the executor is broken."""
    try:
        return executor.submit(compute, argument)
    except Exception as error:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future


def _outcome(compute: Callable[..., Any], *arguments: Any) -> Result | Exception:
    try:
        result = compute(*arguments)
        if not isinstance(result, Mapping):
            raise InputError(f"the result is a {type(result).__name__}; return a dict of floats")
        return {str(name): float(value) for name, value in result.items()}
    except Exception as error:
        return error


def _failure(failed: Mapping[str, Exception], path: Path | None) -> FxBasisError:
    """What the first failed point says, and what to do."""
    key, error = next(iter(failed.items()))
    remedy = "pass a new executor" if isinstance(error, BrokenExecutor) else "mend it"
    kept = "give a path= to keep those that finish" if path is None else f"those that finished are in {path}"
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    made = FxBasisError(
        f"point {key!r} failed{more}: {type(error).__name__}: {error}; {remedy} and sweep again: {kept}"
    )
    made.__cause__ = error
    return made


@dataclass(frozen=True)
class _Results:
    """The results of the context, and the file that they are in."""

    context: str
    found: dict[str, Result]
    path: Path | None = None
    file: FileIO | None = None

    def add(self, key: str, result: Result) -> None:
        """Keep the result, on the disk when this returns."""
        self.found[key] = result
        if self.path is None or self.file is None:
            return
        line = json.dumps({"context": self.context, "key": key, "result": result}).encode() + b"\n"
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error


@contextlib.contextmanager
def _kept(path: Path | None, context: str) -> Iterator[_Results]:
    """The results so far, from the file if there is one, which is locked meanwhile."""
    if path is None:
        yield _Results(context, {})
        return
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        _lock(file, path)
        yield _Results(context, _read(file, path, context), path, file)


def _lock(file: FileIO, path: Path) -> None:
    """Lock the file for this process, by a lock that its children do not inherit and its end removes."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UsageError(
            f"{path} is in use by another process; wait until its sweep has ended, or give another path"
        ) from error


def _read(file: FileIO, path: Path, context: str) -> dict[str, Result]:
    """The results of the context; a last line that was not written to its end is cut off."""
    file.seek(0)
    *lines, torn = file.readall().split(b"\n")
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["context"] == context:
                found[entry["key"]] = dict(entry["result"])
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"line {number} of {path} is no result; delete it, or give another path"
            ) from error
    if not (torn.startswith(_HEAD) or _HEAD.startswith(torn)):
        raise UsageError(f"the last line of {path} is no result; delete it, or give another path")
    file.truncate(file.tell() - len(torn))
    return found
