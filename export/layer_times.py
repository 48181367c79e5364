"""``measure_layer``: how long one convolution takes, dense and in each form over ranks, in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..arguments import as_path
from ..errors import InputError, SelectionError
from ..passes.ranking import cost_ratio, groups_of, is_whole, ranks_by_cost
from ..passes.records import ConvRecord
from ..progress import progress
from ..recipe import DENSE
from ..structures import FORMS, Ranks
from ..tables import aligned
from .checking import check_threads
from .layer_graphs import Geometry, geometry_of
from .layer_runs import processor, runtime, timed
from .time_cache import Timing, default_path, times_at

__all__ = ["FormTime", "LayerTimes", "layer_ms", "measure_layer", "time_ratio"]

Cache: TypeAlias = bool | str | os.PathLike[str]

FLAT = 1.03
"""A stretch of ranks is flat while its time stays below this multiple of its first."""


@dataclass(frozen=True)
class FormTime:
    """One form at one rank; both ratios are to the dense layer."""

    form: str
    ranks: Ranks
    macs_ratio: float
    time_ratio: float


@dataclass(frozen=True)
class LayerTimes:
    """The measured times of one convolution; prints as a table.

    Attributes:
        layer: its number, name and weight. geometry: what else its time depends on.
        threads, runtime: how it ran.
        dense_ms: the time of the dense layer for the whole batch, in milliseconds.
        control: the time of the dense layer over that of itself; what it lacks of 1 is noise.
        rows: a form at a rank each, in the order of their MACs within a form.
    """

    layer: str
    geometry: Geometry
    threads: int
    runtime: str
    dense_ms: float
    control: float
    rows: tuple[FormTime, ...]

    def ratio(self, form: str, ranks: int | Ranks) -> float:
        """The time of a form over that of the dense layer.

        Raises:
            InputError: when this was not measured.
        """
        wanted = ranks if isinstance(ranks, tuple) else (ranks,)
        for row in self.rows:
            if (row.form, row.ranks) == (form, wanted):
                return row.time_ratio
        raise InputError(
            f"{self.layer}: the {form} form at rank {ranks} was not measured; name both: "
            f"measure_layer(record, forms=[{form!r}], ranks=[{ranks}])"
        )

    def steps(self, form: str) -> tuple[Ranks, ...]:
        """The edges of the staircase: the largest ranks of each stretch over which the time is flat."""
        edges: list[Ranks] = []
        first = 0.0
        for row in (row for row in self.rows if row.form == form):
            if edges and row.time_ratio < FLAT * first:
                edges[-1] = row.ranks
            else:
                edges.append(row.ranks)
                first = row.time_ratio
        return tuple(edges)

    def break_even(self, form: str) -> Ranks | None:
        """The largest measured ranks at which the form is faster than dense; None where it never is."""
        faster = [row.ranks for row in self.rows if row.form == form and row.time_ratio < 1]
        return faster[-1] if faster else None

    def __str__(self) -> str:
        edges = {(form, ranks) for form in FORMS for ranks in self.steps(form)}
        rows = [_row(row, (row.form, row.ranks) in edges) for row in self.rows]
        size, batch = "x".join(map(str, self.geometry.input_size)), self.geometry.batch
        return (
            f"{self.layer}, input {size}, batch {batch}: dense {self.dense_ms:.3f} ms, "
            f"{self.control:.3f} times itself ({self.runtime}, {threads_text(self.threads)})\n\n"
            f"{aligned(rows, ('form', 'rank', 'MACs', 'time', 'edge'), left=('form', 'edge'))}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _row(row: FormTime, edge: bool) -> list[str]:
    ranks = ", ".join(map(str, row.ranks))
    return [row.form, ranks, f"{row.macs_ratio:.3f}", f"{row.time_ratio:.3f}", "step" * edge]


def threads_text(threads: int) -> str:
    """How many threads, in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def measure_layer(
    record: ConvRecord,
    *,
    forms: Sequence[str] | None = None,
    ranks: Sequence[int | Ranks] | None = None,
    threads: int = 1,
    cache: Cache = True,
) -> LayerTimes:
    """Time one convolution dense and in each form over ranks, or take the times from the cache.

    Args:
        record: from ``number_convs`` with example inputs, at whose sizes and batch it is timed, in float32.
        forms: by default all but ``"weight"``, which folds to the dense layer.
        ranks: of each form, over all groups: a number stands for every rank of a form, at most the largest
            useful one. By default up to 32 multiples of 8 for each group, up to the MACs of the dense layer.
        threads: of one run.
        cache: True for the file in the user's cache folder, False for none, or the path of another.

    Raises:
        InputError: when the record has no sizes.
        SelectionError: for a form that is not known, or ranks that it cannot have.
        ExportError: for threads that mean nothing.

    >>> import torch
    >>> from fxbasis.passes.numbering import number_convs
    >>> record = number_convs(torch.nn.Conv2d(16, 32, 3), torch.zeros(1, 16, 10, 10))[0]
    >>> times = measure_layer(record, forms=["output", "cp"], ranks=[8, 16], cache=False)
    >>> times.dense_ms > 0, times.ratio("output", 8) > 0, len(times.rows)
    (True, True, 4)
    """
    _check_record(record, threads, cache)
    chosen: list[tuple[str, Ranks]] = []
    for form in [name for name in FORMS if name != "weight"] if forms is None else forms:
        _check_form(record, form)
        wanted = _ladder(record, form) if ranks is None else [_whole(record, form, rank) for rank in ranks]
        found = sorted(dict.fromkeys(wanted), key=lambda ranks: cost_ratio(record, ranks, form))
        chosen += [(form, _checked(record, form, ranks)) for ranks in found]
    dense = _timing(record, DENSE, (), threads, cache)
    rows = [
        FormTime(form, ranks, cost_ratio(record, ranks, form), _ratio(record, form, ranks, threads, cache))
        for form, ranks in progress(chosen, "timing")
    ]
    return LayerTimes(str(record), geometry_of(record), threads, runtime(), *dense[::-1], tuple(rows))


def time_ratio(
    record: ConvRecord, form: str, ranks: Ranks, threads: int = 1, *, cache: Cache = True
) -> float:
    """The time of one form over that of the dense layer, measured in some 0.1 s, or taken from the cache.

    Args:
        record: from ``number_convs`` with example inputs.
        form: a key of ``structures.FORMS``; ``"dense"`` and ``"weight"`` are 1 without a measurement.
        ranks: over all groups.
        threads: of one run.
        cache: as of ``measure_layer``.

    Raises:
        InputError, SelectionError, ExportError: as of ``measure_layer``.

    >>> import torch
    >>> from fxbasis.passes.numbering import number_convs
    >>> record = number_convs(torch.nn.Conv2d(16, 32, 3), torch.zeros(1, 16, 10, 10))[0]
    >>> time_ratio(record, "tucker2", (8, 8), cache=False) > 0
    True
    """
    _check_record(record, threads, cache)
    if form != DENSE:
        _check_form(record, form)
        ranks = _checked(record, form, ranks)
    return _ratio(record, form, ranks, threads, cache)


def layer_ms(record: ConvRecord, form: str, ranks: Ranks, threads: int = 1) -> float:
    """The time of one call of a layer in milliseconds: its dense time by ``time_ratio``, both of the cache.

    Raises:
        InputError, SelectionError, ExportError: as of ``measure_layer``.
    """
    dense = _timing(record, DENSE, (), threads, True).dense_ms
    return dense * time_ratio(record, form, ranks, threads)


def _check_record(record: Any, threads: int, cache: Cache) -> None:
    if not isinstance(record, ConvRecord):
        raise InputError(
            f"the record is a {type(record).__name__}; pass one of number_convs(model, example_inputs)"
        )
    check_threads(threads)
    if not isinstance(cache, bool):
        as_path(cache)


def _check_form(record: ConvRecord, form: Any) -> None:
    if not isinstance(form, str) or form not in FORMS:
        raise SelectionError(f"{record}: form={form!r} is not known; choose one of {', '.join(FORMS)}")


def _largest(record: ConvRecord, form: str) -> Ranks:
    """The largest ranks of any method."""
    method = "random" if "random" in FORMS[form].methods else ""
    return FORMS[form].largest_ranks(record.shape, method)


def _checked(record: ConvRecord, form: str, ranks: Ranks) -> Ranks:
    largest, groups = _largest(record, form), groups_of(record, form)
    whole = len(ranks) == len(largest) and all(is_whole(rank) and rank % groups == 0 for rank in ranks)
    least = (1, 0) if form == "reduced" else (1,) * len(largest)  # which may have no sums
    if not whole or not all(a <= rank <= b for a, rank, b in zip(least, ranks, largest, strict=True)):
        raise SelectionError(
            f"{record}: ranks={ranks} are none of the {form} form; pass {len(largest)} from 1 to {largest}, "
            f"multiples of its groups, {groups}"
        )
    return tuple(map(int, ranks))


def _whole(record: ConvRecord, form: str, ranks: int | Ranks) -> Ranks:
    if isinstance(ranks, tuple):
        return ranks
    return tuple(min(ranks, most) for most in FORMS[form].largest_ranks(record.shape))


def _ladder(record: ConvRecord, form: str) -> list[Ranks]:
    """Ranks in step, up to the MACs of the dense layer."""
    top, unit = ranks_by_cost(record, 1.0, "macs", form), 8 * groups_of(record, form)
    while max(top) > 32 * unit:
        unit *= 2
    parts = range(1, max(top) // unit + 1)
    return [tuple(min(-(-most * part // max(top)) * unit, most) for most in top) for part in parts] or [top]


def _ratio(record: ConvRecord, form: str, ranks: Ranks, threads: int, cache: Cache) -> float:
    if form in (DENSE, "weight"):
        return 1.0
    ratio = _timing(record, form, ranks, threads, cache).ratio
    if form == "reduced":  # an export takes the faster of its two lowerings, of which one is the output form
        return min(ratio, _timing(record, "output", ranks[:1], threads, cache).ratio)
    return ratio


def _timing(record: ConvRecord, form: str, ranks: Ranks, threads: int, cache: Cache) -> Timing:
    """From the cache, or measured and kept."""
    geometry = geometry_of(record)
    if cache is False:
        return timed(geometry, form, ranks, threads)
    times = times_at(default_path() if cache is True else Path(cache))
    key = {"layer": asdict(geometry), "form": form, "ranks": ranks, "threads": threads}
    key |= {"runtime": runtime(), "processor": processor()}
    found = times.get(key)
    if found is None:
        found = timed(geometry, form, ranks, threads)
        times.put(key, found)
    return found
