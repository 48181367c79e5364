"""Plans within a measured time: layers are timed one by one, and whole models until one keeps the budget.

The sum over layers misjudges a whole model by some per cent (layouts, fusions, what lies between), so it only
leads: each plan is exported and measured in turns with the original, and the next one aims between the
nearest of those tried. Where there are other limits, the best plan for them alone is measured first, of its
layers those that were chosen: what is slower than dense is chosen no more. If it keeps the time, no other
layer is timed. A plan beyond the range of sums is chosen once more, in rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

from torch import Tensor

from .choices import Times, Totals, candidates_of, planned, totals_of
from .errors import PlanError
from .estimating import Fitted, Key, weights_of
from .export.layer_times import layer_ms
from .export.measuring import measure
from .passes.records import ConvRecord
from .recipe import DENSE, LayerPlan, Plan
from .relinearising import beyond_range, in_rounds, relinearised
from .sensitivities import Sensitivities, Sensitivity
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
    """The plan that was measured within the time: that of least change, or the fastest for a largest one.

    Raises:
        PlanError: where none of the plans tried was, with the least time that was measured.
    """
    search = _Search(subject, fitted, table, asked, combine, threads)
    others = {name: limit for name, limit in asked.items() if name != "latency"}
    if not others:
        return search.refined(search.best())
    found, took = search.chosen(others), ""
    try:
        found = search.no_layer_slower(found, others)
        ratio = search.measured(found)
        if ratio <= asked["latency"] * MARGIN:
            return _with_time(found, asked, ratio)
        took = f"the best for {_listed(others)} alone took {ratio:.3f} of the time; "
        return search.refined(search.best())
    except PlanError as error:
        raise PlanError(
            f"no plan for {_listed(asked)}: {took}{error}; keep_if_slower=True (--keep-if-slower) does "
            "without the time"
        ) from error


def _listed(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={limit}" for name, limit in limits.items())


@dataclass(frozen=True)
class _Try:
    """A plan, the time of the sum over layers that it was chosen for, and the one that was measured."""

    plan: Plan
    aim: float
    ratio: float


@dataclass(frozen=True)
class _Search:
    """Plans for times around the one asked for."""

    subject: Subject
    fitted: Mapping[str, Sequence[Fitted]]
    table: Sensitivities
    asked: Mapping[str, float]
    combine: str
    threads: int

    @cached_property
    def times(self) -> Times:
        return _times_of(self.threads)

    @cached_property
    def totals(self) -> Totals:
        return _timed(self.subject, self.times, self.threads)

    def plan(self, table: Sensitivities, aim: float) -> Plan:
        limits = {**self.asked, "latency": aim}
        return planned(self.subject, table, limits, self.combine, self.totals, self.times)

    def chosen(self, limits: Mapping[str, float], slower: Sequence[LayerPlan] = ()) -> Plan:
        """The plan for other limits, without what is known to be slower."""
        allowed = replace(self.table, rows=tuple(row for row in self.table if not _as_slow(row, slower)))
        choose = partial(planned, self.subject, asked=limits, combine=self.combine)
        return in_rounds(self.subject, self.fitted, allowed, self.combine, choose)

    def no_layer_slower(self, found: Plan, limits: Mapping[str, float]) -> Plan:
        """The plan, chosen again until none of its layers measures slower than dense by itself."""
        slower: list[LayerPlan] = []
        while new := [layer for layer in found.compressed if self.ratio(layer) > 1]:
            slower += new
            found = self.chosen(limits, slower)
        return found

    def ratio(self, layer: LayerPlan) -> float:
        """The time of a layer over that of the dense one, as it is printed."""
        record = self.subject.table[layer.number - 1]
        dense = self.times(record, DENSE, ())
        return round(self.times(record, layer.form, layer.ranks) / dense, 2) if dense else 0.0

    def measured(self, plan: Plan) -> float:
        return _measured(self.subject, plan, weights_of(self.fitted), self.threads)

    def tried(self) -> list[_Try]:
        """Each plan aims between the nearest of those before it; for a largest change there is one."""
        budget = self.asked["latency"]
        layers = candidates_of(self.subject, self.table, ["latency"], self.times)
        floor, aim = self.totals.least(layers, "latency"), budget * MARGIN
        found: list[_Try] = []
        for _ in range(1 if "max_drop" in self.asked else ROUNDS):
            limit = max(floor, min(aim, 1.0))
            made = self.plan(self.table, limit)
            found.append(_Try(made, limit, self.measured(made)))
            ratio = found[-1].ratio
            if budget * (MARGIN - CLOSE) <= ratio <= budget * MARGIN or (aim <= floor and ratio > budget):
                break
            points = [(1.0, 1.0), *((one.aim, one.ratio) for one in found)]  # the original is one
            aim = _aim_for(budget * (MARGIN - CLOSE / 3), points)
        return found

    def best(self) -> _Try:
        """Of the plans that were measured within the time, that of the least predicted change."""
        found, limit = self.tried(), self.asked["latency"]
        within = [one for one in found if one.ratio <= limit * MARGIN]
        if not within:
            least = min(one.ratio for one in found)
            raise PlanError(
                f"latency={limit}: no plan was measured within {MARGIN} of it; the fastest took "
                f"{least:.3f} of the original's time: raise it, or allow more forms or layers"
            )
        return min(within, key=lambda one: (one.plan.forecast["change"], one.ratio))

    def refined(self, best: _Try) -> Plan:
        """The plan in rounds for the same sum over layers, where that is called for and keeps the time."""
        if beyond_range(best.plan, self.combine):
            choose = partial(self.plan, aim=best.aim)
            found = relinearised(self.subject, self.fitted, self.table, choose)
            ratio = self.measured(found)
            if ratio <= self.asked["latency"] * MARGIN:
                return _with_time(found, self.asked, ratio)
        return _with_time(best.plan, self.asked, best.ratio)


def _as_slow(row: Sensitivity, slower: Sequence[LayerPlan]) -> bool:
    """Whether it is one of the slower, or the same form of that layer at no less work."""
    same = [one for one in slower if (one.name, one.form) == (row.layer.name, row.layer.form)]
    return any(max(row.layer.ranks) >= max(one.ranks) for one in same)


def _aim_for(target: float, points: Sequence[tuple[float, float]]) -> float:
    """The aim that should measure as ``target``: on the line between the nearest tries on either side."""
    under = [point for point in points if point[1] <= target]
    if not under:
        aim, ratio = min(points, key=lambda point: point[1])
        return aim * target / ratio
    low, low_ratio = max(under, key=lambda point: point[1])
    high, high_ratio = min((point for point in points if point[1] > target), key=lambda point: point[1])
    return low + (high - low) * (target - low_ratio) / (high_ratio - low_ratio)


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
    subject: Subject, plan: Plan, weights: Mapping[Key, Mapping[str, Tensor]], threads: int
) -> float:
    """Time of the model under a plan over that of the original, measured in turns."""
    chosen = {layer.name: weights[layer.key] for layer in plan.compressed}
    small = built(subject.model, plan, chosen)
    both = measure({"original": subject.model, "small": small}, subject.example, runs=RUNS, threads=threads)
    return both["small"].ratio_to(both["original"])
