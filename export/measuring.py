"""Latency, measured so that two models can be compared.

Conventions. A sample is the wall-clock time of one call on the whole batch, from inputs in memory to outputs
in memory, in milliseconds. Every model runs `WARM_UP` times uncounted. Several models take turns in each
round, in an order that rotates and reverses, so that clocks, caches and neighbours meet all of them alike;
`Latency.ratio_to` therefore compares round by round. ONNX Runtime runs on the CPU with all graph
optimisations, sequentially, with ``threads`` intra-op and 1 inter-op threads that spin as by default.
Eager PyTorch runs in eval mode under ``torch.inference_mode``, where the model is; accelerators are awaited.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from torch import nn

from ..errors import ExportError, InputError
from ..progress import progress
from ..running import ExampleInputs, as_arguments, batch_size, describe, run, seeded, tensors_of
from .checking import (
    bytes_of,
    check_threads,
    feed,
    frozen_copy,
    named_inputs,
    named_tensors,
    open_session,
)
from .exporting import export_onnx

__all__ = ["WARM_UP", "Latency", "measure"]

WARM_UP = 3
"""Uncounted runs of every model before the first sample."""

RUNTIMES = ("onnxruntime", "eager")

ModelOrPath: TypeAlias = nn.Module | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Latency:
    """The time of one call on a batch of ``batch`` samples, in milliseconds, and how it was measured.

    ``size_bytes`` is what the ONNX file and its external data take on disk; for eager PyTorch, what
    parameters and buffers take in memory. ``samples_ms`` holds every run in the order of the rounds.
    """

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    runs: int
    threads: int
    runtime: str
    batch: int
    size_bytes: int
    samples_ms: tuple[float, ...] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{self.median_ms:.3f} ms median (quartiles {self.lower_quartile_ms:.3f} to "
            f"{self.upper_quartile_ms:.3f}; {self.runs} runs after {WARM_UP} of warm-up, batch {self.batch}, "
            f"{threads}, {self.runtime}, {self.size_bytes / 1e6:.2f} MB)"
        )

    @property
    def spread(self) -> float:
        """Upper over lower quartile: 1 on a silent machine."""
        return self.upper_quartile_ms / self.lower_quartile_ms

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    def ratio_to(self, other: Latency) -> float:
        """Median of the ratios of this one's samples to the other's, round by round; below 1 is faster.

        Of two models measured in one call this is steadier than the ratio of the medians, because a
        disturbance that lasts longer than a round cancels.

        Raises:
            ExportError: when the two have different numbers of runs, hence no common rounds.
        """
        if self.runs != other.runs:
            raise ExportError(
                f"{self.runs} runs cannot be paired with {other.runs}; measure both models in one call: "
                "measure({'a': a, 'b': b}, ...)"
            )
        return statistics.median(a / b for a, b in zip(self.samples_ms, other.samples_ms, strict=True))


@dataclasses.dataclass(frozen=True)
class _Runner:
    call: Callable[[], Any]
    runtime: str
    size_bytes: int


@overload
def measure(
    model_or_path: ModelOrPath,
    example_inputs: ExampleInputs,
    *,
    runs: int = 30,
    threads: int = 1,
    runtime: str = "onnxruntime",
) -> Latency: ...


@overload
def measure(
    model_or_path: Mapping[str, ModelOrPath],
    example_inputs: ExampleInputs,
    *,
    runs: int = 30,
    threads: int = 1,
    runtime: str = "onnxruntime",
) -> dict[str, Latency]: ...


def measure(
    model_or_path: ModelOrPath | Mapping[str, ModelOrPath],
    example_inputs: ExampleInputs,
    *,
    runs: int = 30,
    threads: int = 1,
    runtime: str = "onnxruntime",
) -> Latency | dict[str, Latency]:
    """The latency of one model, or of several measured in turns, on ``example_inputs`` as they are.

    Args:
        model_or_path: a module, an ``.onnx`` file, or a mapping from names to either. A module is left as it
            is; for ONNX Runtime it is first exported, and checked, by ``export_onnx``.
        example_inputs: a tensor ``(N, ...)``, a tuple of positional arguments, or a dict of keyword
            arguments; for an ``.onnx`` file tensors in the order of its inputs, or a dict by their names.
        runs: counted runs of each model, at least 1.
        threads: CPU threads that one run may use, at least 1.
        runtime: ``"onnxruntime"`` or ``"eager"``.

    Raises:
        ExportError: for ``runs``, ``threads``, ``runtime`` or a mapping that mean nothing, for a file that is
            missing or not ONNX, and for a module that cannot be exported.
        InputError: when the example inputs do not fit the model.

    >>> conv, inputs = torch.nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)
    >>> latency = measure(conv, inputs, runs=5, runtime="eager")
    >>> latency.runs, latency.threads, latency.batch, latency.size_bytes, latency.median_ms > 0
    (5, 1, 2, 896, True)
    >>> both = measure({"small": conv, "large": torch.nn.Conv2d(3, 64, 3)}, inputs, runs=5, runtime="eager")
    >>> both["small"].ratio_to(both["large"]) > 0
    True
    """
    _check_settings(runs, threads, runtime)
    if isinstance(model_or_path, Mapping):
        return _measured(model_or_path, example_inputs, runs, threads, runtime)
    return _measured({"model": model_or_path}, example_inputs, runs, threads, runtime)["model"]


def _measured(
    entries: Mapping[str, ModelOrPath], example_inputs: ExampleInputs, runs: int, threads: int, runtime: str
) -> dict[str, Latency]:
    if not entries:
        raise ExportError("there is nothing to measure: the mapping is empty; pass {'name': model}")
    with contextlib.ExitStack() as stack:
        if runtime == "eager":
            stack.enter_context(_eager_state(threads))
        runners = [_runner(entry, example_inputs, threads, runtime, stack) for entry in entries.values()]
        samples = _interleaved([runner.call for runner in runners], runs)
    batch, measured = batch_size(example_inputs), zip(entries, runners, samples, strict=True)
    return {name: _latency(taken, runner, threads, batch) for name, runner, taken in measured}


def _check_settings(runs: int, threads: int, runtime: str) -> None:
    if not isinstance(runs, int) or runs < 1:
        raise ExportError(f"runs={runs!r} cannot be measured; pass a whole number of at least 1")
    check_threads(threads)
    if runtime not in RUNTIMES:
        raise ExportError(f"runtime={runtime!r} is unknown; pass one of {', '.join(map(repr, RUNTIMES))}")


def _latency(samples_ms: Sequence[float], runner: _Runner, threads: int, batch: int) -> Latency:
    lower, median, upper = (float(q) for q in np.percentile(samples_ms, [25, 50, 75]))
    times, runs = tuple(samples_ms), len(samples_ms)
    return Latency(median, lower, upper, runs, threads, runner.runtime, batch, runner.size_bytes, times)


def _interleaved(calls: Sequence[Callable[[], Any]], runs: int) -> list[list[float]]:
    """The time of each call in each round, in milliseconds."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in [*calls] * WARM_UP:
        call()
    for turn in progress(range(runs), "measuring"):
        for index in _order(len(calls), turn):
            start = time.perf_counter_ns()
            calls[index]()
            samples[index].append((time.perf_counter_ns() - start) / 1e6)
    return samples


def _order(count: int, turn: int) -> list[int]:
    """Who runs first, second, ...: rotated by one each round, reversed after each full rotation.

    >>> [_order(2, turn) for turn in range(4)]
    [[0, 1], [1, 0], [1, 0], [0, 1]]
    """
    shift = turn % count
    order = [*range(shift, count), *range(shift)]
    return order[::-1] if turn // count % 2 else order


def _runner(
    entry: ModelOrPath, inputs: ExampleInputs, threads: int, runtime: str, stack: contextlib.ExitStack
) -> _Runner:
    if isinstance(entry, nn.Module):
        if runtime == "eager":
            return _eager_runner(entry, inputs)
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model.onnx")
        export_onnx(entry, inputs, path, dynamic_batch=False)
        return _session_runner(path, inputs, threads, entry)
    if not isinstance(entry, (str, os.PathLike)):
        raise ExportError(f"a {type(entry).__name__} cannot be measured; pass a module or an .onnx path")
    path = Path(entry)
    if runtime == "eager":
        raise ExportError(f"{path} cannot run in eager PyTorch; pass the module, or runtime='onnxruntime'")
    if not path.is_file():
        raise ExportError(f"{path} is not a file; export_onnx(model, example_inputs, path) writes one")
    return _session_runner(path, inputs, threads)


def _session_runner(
    path: Path, inputs: ExampleInputs, threads: int, model: nn.Module | None = None
) -> _Runner:
    import onnxruntime

    try:
        session = open_session(path, threads)
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot load {path} ({str(error)[:200]}); write the file again with export_onnx"
        ) from error
    arrays = feed(session, named_inputs(model, inputs) if model else _file_inputs(session, inputs))

    def call() -> Any:
        return session.run(None, arrays)

    try:
        call()
    except Exception as error:
        takes = ", ".join(f"{value.name} {value.shape} {value.type}" for value in session.get_inputs())
        raise InputError(
            f"{path.name} takes {takes} and the example inputs are {describe(inputs)}; pass inputs of that "
            "shape and dtype, or export the model with these ones"
        ) from error
    return _Runner(call, f"onnxruntime {onnxruntime.__version__}", _size_on_disk(path))


def _file_inputs(session: Any, inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    """Tensors under the names that a dict gives them, which must be the graph's; else numbered in order."""
    args, kwargs = as_arguments(inputs)
    if not kwargs:
        return {f"#{i}": tensor for i, tensor in enumerate(tensors_of(args))}
    named, names = named_tensors(kwargs), [value.name for value in session.get_inputs()]
    if set(named) != set(names):
        raise InputError(
            f"the ONNX graph takes {names} and the example inputs are named {list(named)}; pass a dict with "
            "these names, or a tuple in this order"
        )
    return named


def _size_on_disk(path: Path) -> int:
    """Bytes of the ONNX file and of the files that its weights lie in."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    parts = {path, *(path.parent / entry.value for entry in entries if entry.key == "location")}
    return sum(part.stat().st_size for part in parts)


@contextlib.contextmanager
def _eager_state(threads: int) -> Iterator[None]:
    """Inference mode, ``threads`` CPU threads and a fixed random state; all put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), seeded():
            yield
    finally:
        torch.set_num_threads(before)


def _eager_runner(model: nn.Module, inputs: ExampleInputs) -> _Runner:
    """Runs a copy that shares the parameters: what a forward caches under inference mode dies with it."""
    frozen = frozen_copy(model)
    run(frozen, inputs)
    args, kwargs = as_arguments(inputs)
    tensors = [*frozen.parameters(), *frozen.buffers()]
    devices = {t.device.type for t in [*tensors, *tensors_of(inputs)]} - {"cpu"}

    def call() -> Any:
        output = frozen(*args, **kwargs)
        if devices:
            torch.accelerator.synchronize()
        return output

    where = "".join(f" on {device}" for device in sorted(devices))
    return _Runner(call, f"torch {torch.__version__} eager{where}", bytes_of(tensors))
