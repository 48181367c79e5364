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
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from ..errors import ExportError
from ..progress import progress
from ..running import ExampleInputs, batch_size
from .checking import check_threads
from .runners import ModelOrPath, Runner, eager_state, runner_of

__all__ = ["WARM_UP", "Latency", "measure"]

WARM_UP = 3
"""Uncounted runs of every model before the first sample."""

RUNTIMES = ("onnxruntime", "eager")


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

    >>> import torch
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
            stack.enter_context(eager_state(threads))
        runners = [runner_of(entry, example_inputs, threads, runtime, stack) for entry in entries.values()]
        samples = _interleaved([runner.call for runner in runners], runs)
    batch, measured = batch_size(example_inputs), zip(entries, runners, samples, strict=True)
    return {name: _latency(taken, runner, threads, batch) for name, runner, taken in measured}


def _check_settings(runs: int, threads: int, runtime: str) -> None:
    if type(runs) is not int or runs < 1:  # True is an int
        raise ExportError(f"runs={runs!r} cannot be measured; pass a whole number of at least 1")
    check_threads(threads)
    if runtime not in RUNTIMES:
        raise ExportError(f"runtime={runtime!r} is unknown; pass one of {', '.join(map(repr, RUNTIMES))}")


def _latency(samples_ms: Sequence[float], runner: Runner, threads: int, batch: int) -> Latency:
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
