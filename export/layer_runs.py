"""One convolution run in ONNX Runtime on the CPU, dense and in a form, in turns.

Each runs once in every round, in an order that reverses, and the ratio is the median round by round. The
clock is the processor time of the thread that calls, which works in every node and waits awake for the rest.
So what other programs take of the processor is not counted; on a quiet machine it is the time that passes.
On Windows, where that clock is coarse, the time that passes is taken.

A graph brings its input into the runtime's own layout and its output back, which a layer within a network
need not. That is in both times, so a ratio lies a little nearer to 1 than there, and on the same side of it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe import DENSE
from ..structures import Ranks
from .checking import open_session
from .layer_graphs import Geometry, layer_graph
from .time_cache import Timing

__all__ = ["processor", "runtime", "timed"]

_WARM_UP, _LEAST_ROUNDS, _MOST_ROUNDS = 3, 9, 200
_NANOSECONDS = 50_000_000  # of all rounds together, where that is enough rounds
_CLOCK = time.perf_counter_ns if os.name == "nt" else time.thread_time_ns


def timed(geometry: Geometry, form: str, ranks: Ranks, threads: int) -> Timing:
    """The time of a form, which takes some 0.1 s to measure; ``"dense"`` is compared with itself."""
    size = (geometry.batch, geometry.in_channels, *geometry.input_size)
    images = {"input": np.random.default_rng(0).random(size, dtype=np.float32)}
    sessions = [_dense(geometry, threads), _session(geometry, form, ranks, threads)]
    dense, other = _interleaved([partial(session.run, None, images) for session in sessions])
    ratios = [after / before for before, after in zip(dense, other, strict=True)]
    return Timing(statistics.median(ratios), statistics.median(dense) / 1e6)


def _session(geometry: Geometry, form: str, ranks: Ranks, threads: int) -> Any:
    """Threads that sleep after a run, so that they do not take the processors from the other session."""
    return open_session(layer_graph(geometry, form, ranks), threads, force_spinning_stop="1")


@lru_cache(maxsize=1)
def _dense(geometry: Geometry, threads: int) -> Any:
    return _session(geometry, DENSE, (), threads)


def _interleaved(calls: Sequence[Callable[[], Any]]) -> list[list[int]]:
    """The nanoseconds of each call in each round."""
    samples: list[list[int]] = [[] for _ in calls]
    spent = [_nanoseconds(call) for call in [*calls] * _WARM_UP]
    rounds = _NANOSECONDS // max(1, sum(spent[-len(calls) :]))
    for turn in range(max(_LEAST_ROUNDS, min(rounds, _MOST_ROUNDS))):
        for index in range(len(calls))[:: -1 if turn % 2 else 1]:
            samples[index].append(_nanoseconds(calls[index]))
    return samples


def _nanoseconds(call: Callable[[], Any]) -> int:
    start = _CLOCK()
    call()
    return max(1, _CLOCK() - start)


def runtime() -> str:
    """The runtime and its version.

    >>> runtime().split()[0]
    'onnxruntime'
    """
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


@lru_cache
def processor() -> str:
    """The model of the processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
