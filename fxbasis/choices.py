"""From a table of sensitivities to a plan: costs of the whole model, candidates, and the best choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

from .candidates import DENSE, Candidate, Choice, Layers, added, averaged, envelope, undominated
from .errors import InputError, PlanError, SelectionError
from .passes.profiling import profile
from .passes.records import ConvRecord
from .recipe import Plan
from .sensitivities import Sensitivities
from .solvers import choose, minimax, minimise
from .structures import Ranks
from .subjects import Subject, plan_with

__all__ = ["Totals", "asked_for", "candidates_of", "made_plan", "planned", "totals_of"]

Times: TypeAlias = Callable[[ConvRecord, str, Ranks], float]


@dataclass(frozen=True)
class Totals:
    """Costs of the whole model, and the part of them that no plan changes; by name."""

    whole: Mapping[str, float]
    fixed: Mapping[str, float]

    def budgets(self, fractions: Mapping[str, float]) -> dict[str, float]:
        """What is left to the convolutions of fractions of the whole."""
        return {name: part * self.whole[name] - self.fixed[name] for name, part in fractions.items()}

    def least(self, layers: Layers, name: str) -> float:
        """The smallest fraction of the whole that any choice reaches."""
        smallest = added(min(one.costs[name] for one in layer) for layer in layers)
        return (smallest + self.fixed[name]) / self.whole[name]

    def ratios(self, choice: Choice) -> dict[str, float]:
        """The costs of the model after a choice over those before."""
        return {
            name: (choice.costs[name] + self.fixed[name]) / self.whole[name]
            for name in choice.costs
            if self.whole[name] > 0
        }


def totals_of(subject: Subject) -> Totals:
    """MACs and parameters, for the example inputs."""
    work = profile(subject.model, subject.example)
    if not work.macs:
        raise InputError("the model does no work on the example inputs; pass a batch of at least one")
    whole = {"macs": float(work.macs), "params": float(work.params)}
    convs = {
        "macs": sum(r.macs or 0 for r in subject.table),
        "params": sum(r.params for r in subject.table),
    }
    return Totals(whole, {name: whole[name] - convs[name] for name in whole})


def candidates_of(
    subject: Subject,
    table: Sensitivities,
    names: Sequence[str] = ("macs", "params"),
    times: Times | None = None,
) -> list[list[Candidate]]:
    """For each convolution the dense candidate, and those of the table, monotone and undominated.

    Args:
        subject: whose convolutions these are.
        table: sensitivities of any of them.
        names: of the costs in which one candidate can dominate another.
        times: of a record, form and ranks, in ms; with them there is a cost "latency", and none is slower
            than dense.
    """
    rows: dict[int, list[Candidate]] = {record.index: [] for record in subject.table}
    for row in table:
        rows[row.layer.number].append(row.candidate())
    found = []
    for record in subject.table:
        made = [_dense(record), *envelope(rows[record.index])]
        if times is not None:
            made = [_timed(record, one, times) for one in made]
            made = [one for one in made if one.costs["latency"] <= made[0].costs["latency"]]
        found.append(undominated(made, list(names)))
    return found


def _dense(record: ConvRecord) -> Candidate:
    costs = {"macs": float(record.macs or 0), "params": float(record.params)}
    return Candidate(record.index, DENSE, (), costs, 0.0)


def _timed(record: ConvRecord, one: Candidate, times: Times) -> Candidate:
    return replace(one, costs={**one.costs, "latency": times(record, one.form, one.ranks)})


def planned(
    subject: Subject,
    table: Sensitivities,
    asked: Mapping[str, float],
    combine: str = "sum",
    totals: Totals | None = None,
    times: Times | None = None,
) -> Plan:
    """The plan that a table of sensitivities means, for budgets or a largest change.

    Raises:
        PlanError: for what cannot be met, with the least that can.
        SelectionError: for an unknown ``combine``.
    """
    totals = totals or totals_of(subject)
    if "max_drop" in asked:
        cost = "latency" if "latency" in asked else "macs"
        choice = minimise(candidates_of(subject, table, [cost], times), cost, asked["max_drop"], combine)
    else:
        layers = candidates_of(subject, table, list(asked), times)
        _check_reach(layers if combine != "paper" else averaged(layers), totals, asked, table.missing)
        budgets = totals.budgets(asked)
        choice = minimax(layers, budgets) if combine == "minimax" else choose(layers, budgets, combine)
    return made_plan(subject, table, choice, totals, asked)


def _check_reach(layers: Layers, totals: Totals, asked: Mapping[str, float], missing: int) -> None:
    for name, part in asked.items():
        least = totals.least(layers, name)
        if least > part:
            late = f" ({missing} candidates were not computed for want of time)" if missing else ""
            raise PlanError(
                f"{name}={part:.6g} cannot be reached: the least is {math.ceil(least * 1e4) / 1e4} of the "
                f"model's{late}; raise it, or allow more forms or layers"
            )


def made_plan(
    subject: Subject, table: Sensitivities, choice: Choice, totals: Totals, asked: Mapping[str, float]
) -> Plan:
    """The plan of a choice, with its forecast."""
    rows = {(row.layer.number, row.layer.form, row.layer.ranks): row.layer for row in table}
    chosen = {
        one.layer: rows[one.layer, one.form, one.ranks] for one in choice.candidates if one.form != DENSE
    }
    forecast = {
        "asked": dict(asked),
        **totals.ratios(choice),
        "change": choice.change,
        "error": choice.error,
        "unit": table.unit,
        "estimator": table.estimator,
        "images": table.images,
        "solver": choice.method,
        "objective": choice.objective,
        "bound": choice.bound,
    }
    return Plan(plan_with(subject.table, chosen, "the plan leaves it dense").layers, forecast)


def asked_for(**limits: Any) -> dict[str, float]:
    """The limits that are given, checked.

    Raises:
        SelectionError: for none, for a budget beside ``max_drop``, and for a value that means nothing.
    """
    asked = {name: value for name, value in limits.items() if value is not None}
    if not asked:
        raise SelectionError("there is nothing to plan for; pass macs=, params=, latency= or max_drop=")
    if "max_drop" in asked and len(asked) > 1:
        raise SelectionError("max_drop and a budget contradict each other; pass one of them")
    for name, value in asked.items():
        real = isinstance(value, Real) and not isinstance(value, bool)
        if name == "max_drop" and not (real and 0 <= value < math.inf):
            raise SelectionError(f"max_drop={value!r} is no change; pass a number such as max_drop=0.05")
        if name != "max_drop" and not (real and 0 < value <= 1):
            raise SelectionError(f"{name}={value!r} is no fraction in (0, 1]; pass for example {name}=0.5")
    return {name: float(value) for name, value in asked.items()}
