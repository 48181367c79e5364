"""Plans within a measured time: layers are timed one by one, and whole models until one keeps the budget.

The sum over layers misjudges a whole model by some per cent (layouts, fusions, what lies between), so it only
leads: each plan is exported and measured in turns with the original, and the next one aims lower or higher by
the ratio that was missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .choices import Times, Totals, planned, totals_of
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
    times, budget = _times_of(threads), asked["latency"]
    totals = _timed(subject, times, threads)
    weights = {(one.layer.name, one.layer.form, one.layer.ranks): w for f in fitted.values() for one, w in f}
    best: Plan | None = None
    aim, least = budget * MARGIN, float("inf")
    for _ in range(ROUNDS):
        try:
            found = planned(subject, table, {**asked, "latency": aim}, combine, totals, times)
        except PlanError:
            if best is not None:
                break
            raise
        ratio = _measured(subject, found, weights, threads)
        least = min(least, ratio)
        if ratio <= budget * MARGIN:
            best = Plan(found.layers, {**found.forecast, "asked": dict(asked), "measured latency": ratio})
            if ratio >= budget * (MARGIN - CLOSE) or not any(layer.compressed for layer in found):
                break
        aim *= budget * (MARGIN - CLOSE / 3) / ratio
    if best is None:
        raise PlanError(
            f"latency={budget}: no plan was measured within it; the fastest took {least:.3f} of the "
            "original's time: raise it, or allow more forms"
        )
    return best


def _times_of(threads: int) -> Times:
    def times(record: ConvRecord, form: str, ranks: Ranks) -> float:
        return (record.calls or 0) * layer_ms(record, form, ranks, threads)

    return times


def _timed(subject: Subject, times: Times, threads: int) -> Totals:
    """The totals with the time of the original; what its convolutions do not take by themselves is fixed."""
    totals = totals_of(subject)
    whole = measure(subject.model, subject.example, runs=RUNS, threads=threads).median_ms
    convs = sum(times(record, DENSE, ()) for record in subject.table if record.calls)
    fixed = max(0.0, whole - convs)
    return Totals({**totals.whole, "latency": convs + fixed}, {**totals.fixed, "latency": fixed})


def _measured(
    subject: Subject, plan: Plan, weights: Mapping[tuple[str, str, Ranks], Mapping[str, object]], threads: int
) -> float:
    """Time of the model under a plan over that of the original, measured in turns."""
    chosen = {layer.name: weights[layer.name, layer.form, layer.ranks] for layer in plan.compressed}
    small = built(subject.model, plan, chosen)  # type: ignore[arg-type]
    both = measure({"original": subject.model, "small": small}, subject.example, runs=RUNS, threads=threads)
    return both["small"].ratio_to(both["original"])
