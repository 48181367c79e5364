"""Plans within a measured time: layers are timed one by one, and whole models until one keeps the budget.

The sum over layers misjudges a whole model by some per cent (layouts, fusions, what lies between), so it only
leads: each plan is exported and measured in turns with the original, and the next one aims between the
nearest of those tried. Where there are other budgets, the best plan for them alone is measured first; no
layer is timed if it keeps the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from torch import Tensor

from .choices import Times, Totals, candidates_of, planned, totals_of
from .errors import PlanError
from .estimating import Fitted
from .export.layer_times import layer_ms
from .export.measuring import measure
from .passes.records import ConvRecord
from .recipe import DENSE, Plan
from .sensitivities import Sensitivities
from .structures import Ranks
from .subjects import Subject, built

__all__ = ["planned_by_time"]

ROUNDS = 5
MARGIN = 0.97
"""Of the budget that is aimed at, for the noise of the next measurement."""
CLOSE = 0.06
"""A plan that measures this little under its budget is not tried to be made larger."""
RUNS = 15


def planned_by_time(
    subject: Subject,
    fitted: Mapping[str, Sequence[Fitted]],
    table: Sensitivities,
    asked: Mapping[str, float],
    combine: str,
    threads: int,
) -> Plan:
    """The plan of least predicted change that was measured within the time.

    Raises:
        PlanError: where none of the plans tried was, with the least time that was measured.
    """
    weights = {(one.layer.name, one.layer.form, one.layer.ranks): w for f in fitted.values() for one, w in f}
    others = {name: limit for name, limit in asked.items() if name != "latency"}
    if others:
        found = planned(subject, table, others, combine)
        ratio = _measured(subject, found, weights, threads)
        if ratio <= asked["latency"] * MARGIN:
            return _with_time(found, asked, ratio)
    try:
        return _best(_tried(subject, weights, table, asked, combine, threads), asked)
    except PlanError as error:
        if not others:
            raise
        raise PlanError(
            f"the best plan for {_listed(others)} took {ratio:.3f} of the original's time, and no "
            f"other keeps latency={asked['latency']} too ({error}); "
            "keep_if_slower=True (--keep-if-slower) keeps it"
        ) from error


def _listed(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={limit}" for name, limit in limits.items())


def _tried(
    subject: Subject,
    weights: Mapping[tuple[str, str, Ranks], Mapping[str, Tensor]],
    table: Sensitivities,
    asked: Mapping[str, float],
    combine: str,
    threads: int,
) -> list[tuple[float, Plan]]:
    """Plans for times around the one asked for, each with the ratio that was measured."""
    times, budget = _times_of(threads), asked["latency"]
    totals = _timed(subject, times, threads)
    floor = totals.least(candidates_of(subject, table, ["latency"], times), "latency")
    tried: list[tuple[float, Plan]] = []
    points = [(1.0, 1.0)]  # aim and ratio; the original is one
    aim = budget * MARGIN
    for _ in range(ROUNDS):
        limits = {**asked, "latency": max(floor, min(aim, 1.0))}
        found = planned(subject, table, limits, combine, totals, times)
        ratio = _measured(subject, found, weights, threads)
        tried.append((ratio, found))
        if budget * (MARGIN - CLOSE) <= ratio <= budget * MARGIN or (aim <= floor and ratio > budget):
            break
        points.append((aim, ratio))
        aim = _aim_for(budget * (MARGIN - CLOSE / 3), points)
    return tried


def _aim_for(target: float, points: Sequence[tuple[float, float]]) -> float:
    """The aim that should measure as ``target``: on the line between the nearest tries on either side."""
    under = [point for point in points if point[1] <= target]
    if not under:
        aim, ratio = min(points, key=lambda point: point[1])
        return aim * target / ratio
    low, low_ratio = max(under, key=lambda point: point[1])
    high, high_ratio = min((point for point in points if point[1] > target), key=lambda point: point[1])
    return low + (high - low) * (target - low_ratio) / (high_ratio - low_ratio)


def _best(tried: Sequence[tuple[float, Plan]], asked: Mapping[str, float]) -> Plan:
    """Of the plans that were measured within the time, that of the least predicted change."""
    within = [pair for pair in tried if pair[0] <= asked["latency"] * MARGIN]
    if not within:
        least = min(ratio for ratio, _ in tried)
        raise PlanError(
            f"latency={asked['latency']}: no plan was measured within {MARGIN} of it; the fastest took "
            f"{least:.3f} of the original's time: raise it, or allow more forms or layers"
        )
    ratio, found = min(within, key=lambda pair: (pair[1].forecast["change"], pair[0]))
    return _with_time(found, asked, ratio)


def _with_time(found: Plan, asked: Mapping[str, float], ratio: float) -> Plan:
    return Plan(found.layers, {**found.forecast, "asked": dict(asked), "measured latency": ratio})


def _times_of(threads: int) -> Times:
    @cache
    def one_call(record: ConvRecord, form: str, ranks: Ranks) -> float:
        return layer_ms(record, form, ranks, threads)

    def times(record: ConvRecord, form: str, ranks: Ranks) -> float:
        return sum(one_call(call, form, ranks) for call in record.each_call())

    return times


def _timed(subject: Subject, times: Times, threads: int) -> Totals:
    """The totals with the time of the original; what its convolutions do not take by themselves is fixed."""
    totals = totals_of(subject)
    whole = measure(subject.model, subject.example, runs=RUNS, threads=threads).median_ms
    convs = sum(times(record, DENSE, ()) for record in subject.table if record.calls)
    fixed = max(0.0, whole - convs)
    return Totals({**totals.whole, "latency": convs + fixed}, {**totals.fixed, "latency": fixed})


def _measured(
    subject: Subject, plan: Plan, weights: Mapping[tuple[str, str, Ranks], Mapping[str, Tensor]], threads: int
) -> float:
    """Time of the model under a plan over that of the original, measured in turns."""
    chosen = {layer.name: weights[layer.name, layer.form, layer.ranks] for layer in plan.compressed}
    small = built(subject.model, plan, chosen)
    both = measure({"original": subject.model, "small": small}, subject.example, runs=RUNS, threads=threads)
    return both["small"].ratio_to(both["original"])
