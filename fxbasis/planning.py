"""``plan`` and ``pareto``: which layers to compress, in which form, at which rank, within a budget.

The predicted changes of single layers (``sensitivities``, made monotone) are added up, and the best choice is
found exactly (``solvers``); leaving a layer dense is always among its candidates, so that no plan is predicted
worse or dearer than the model. Sums hold up to about 0.3 nats; beyond they rank plans but promise too little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .candidates import DENSE, Candidate, Choice, envelope, undominated
from .errors import PlanError, SelectionError
from .fronts import Front, front
from .passes.profiling import profile
from .passes.records import ConvRecord
from .passes.selection import Layers, matches
from .proposals import PROPOSED
from .recipe import LayerPlan, Plan
from .running import ExampleInputs
from .sensitivities import Sensitivities, estimated, estimator_for, fitted_all, proposed
from .solvers import choose, minimise
from .subjects import Subject, plan_with, subject_of

__all__ = ["ParetoFront", "Totals", "candidates_of", "pareto", "plan", "planned", "totals_of"]


@dataclass(frozen=True)
class Totals:
    """Costs of the whole model, and the part of them that no plan changes; by name."""

    whole: Mapping[str, float]
    fixed: Mapping[str, float]

    def budgets(self, fractions: Mapping[str, float]) -> dict[str, float]:
        """What is left to the convolutions of fractions of the whole.

        Raises:
            PlanError: where the rest of the model alone exceeds one.
        """
        found = {name: part * self.whole[name] - self.fixed[name] for name, part in fractions.items()}
        for name, left in found.items():
            if left <= 0:
                least = self.fixed[name] / self.whole[name]
                raise PlanError(
                    f"{name}={fractions[name]}: what is no convolution takes {least:.3f} of it already; raise it"
                )
        return found

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
    whole = {"macs": float(work.macs), "params": float(work.params)}
    convs = {
        "macs": sum(r.macs or 0 for r in subject.table),
        "params": sum(r.params for r in subject.table),
    }
    return Totals(whole, {name: whole[name] - convs[name] for name in whole})


def candidates_of(subject: Subject, table: Sensitivities) -> list[list[Candidate]]:
    """For each convolution the dense candidate, and those of the table, monotone and undominated."""
    by_number: dict[int, list[Candidate]] = {record.index: [] for record in subject.table}
    for row in table:
        by_number[row.layer.number].append(row.candidate())
    return [
        [_dense(record), *undominated(envelope(by_number[record.index]), ["macs", "params"])]
        for record in subject.table
    ]


def _dense(record: ConvRecord) -> Candidate:
    costs = {"macs": float(record.macs or 0), "params": float(record.params)}
    return Candidate(record.index, DENSE, (), costs, 0.0)


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    macs: float | None = None,
    params: float | None = None,
    max_drop: float | None = None,
    layers: Layers = "all",
    forms: Sequence[str] = PROPOSED,
    estimator: str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    multiple: int = 1,
    combine: str = "sum",
    path: str | Path | None = None,
    executor: Executor | None = None,
    minutes: float | None = None,
) -> Plan:
    """The plan of least predicted change within budgets, or the cheapest within a largest change.

    Args:
        model, example_inputs, calibration, layers, forms, estimator, evaluate, multiple, path, executor,
            minutes: as of ``sensitivities``, which are computed first.
        macs, params: budgets, as fractions of the whole model's.
        max_drop: instead of budgets, the largest predicted change, in the unit of the sensitivities; what
            is minimised are the MACs.
        combine: "sum", or "paper" for the averages of arXiv 2408.06024, in which budgets are too.

    Returns:
        A plan with a forecast: the predicted change and cost ratios, what was asked for, and the bound that
        proves how far from the best plan of these candidates it can be.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    >>> data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    >>> found = plan(model, data[0], calibration=data, macs=0.6)
    >>> found.forecast["macs"] <= 0.6
    True

    Raises:
        PlanError: for a budget that cannot be met, with the least that can.
        SelectionError: without a budget, or with a budget and ``max_drop``.
        InputError: as ``sensitivities``.
    """
    asked = _asked(macs=macs, params=params, max_drop=max_drop)
    subject = subject_of(model, example_inputs, calibration)
    how = {"evaluate": evaluate, "path": path and Path(path), "executor": executor, "minutes": minutes}
    name = estimator_for(estimator, calibration, evaluate)
    table = _table(subject, layers, forms, multiple, name, how)
    return planned(subject, table, asked, combine)


def _asked(**limits: float | None) -> dict[str, float]:
    asked = {name: float(value) for name, value in limits.items() if value is not None}
    if not asked:
        raise SelectionError("there is nothing to plan for; pass macs=, params=, latency= or max_drop=")
    if "max_drop" in asked and len(asked) > 1:
        raise SelectionError("max_drop and a budget contradict each other; pass one of them")
    for name, value in asked.items():
        if not (value > 0 and (name == "max_drop" or value <= 1)):
            raise SelectionError(f"{name}={value} is no fraction in (0, 1]; pass for example {name}=0.5")
    return asked


def _table(
    subject: Subject, layers: Layers, forms: Sequence[str], multiple: int, name: str, how: Mapping[str, Any]
) -> Sensitivities:
    proposals = proposed(subject, forms, multiple, matches(layers, subject.table))
    return estimated(subject, fitted_all(subject, proposals), name, **how)


def planned(subject: Subject, table: Sensitivities, asked: Mapping[str, float], combine: str = "sum") -> Plan:
    """The plan that a table of sensitivities means."""
    totals, layers = totals_of(subject), candidates_of(subject, table)
    if "max_drop" in asked:
        choice = minimise(layers, "macs", asked["max_drop"], combine)
    else:
        choice = choose(layers, totals.budgets(asked), combine)
    return _plan(subject, table, choice, totals, asked)


def _plan(
    subject: Subject, table: Sensitivities, choice: Choice, totals: Totals, asked: Mapping[str, float]
) -> Plan:
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


@dataclass(frozen=True)
class ParetoFront:
    """Every plan that no other beats in cost and predicted change, by rising cost.

    Attributes:
        cost: its name. unit: of the changes.
    """

    cost: str
    unit: str
    subject: Subject
    table: Sensitivities
    totals: Totals
    found: Front

    def __len__(self) -> int:
        return len(self.found)

    @property
    def costs(self) -> list[float]:
        """Of the whole model, over those of the original."""
        whole, fixed = self.totals.whole[self.cost], self.totals.fixed[self.cost]
        return [(float(cost) + fixed) / whole for cost in self.found.costs]

    @property
    def changes(self) -> list[float]:
        """Predicted, falling."""
        return [float(change) for change in self.found.changes]

    def plan(self, index: int) -> Plan:
        """The plan of one point."""
        return _plan(self.subject, self.table, self.found[index], self.totals, {})


def pareto(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    cost: str = "macs",
    layers: Layers = "all",
    forms: Sequence[str] = PROPOSED,
    estimator: str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    multiple: int = 1,
    path: str | Path | None = None,
    executor: Executor | None = None,
    minutes: float | None = None,
) -> ParetoFront:
    """The exact front of all plans over cost and predicted change; arguments as of ``plan``.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    >>> data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    >>> found = pareto(model, data[0], calibration=data)
    >>> found.costs[-1], found.changes[-1], len(found.plan(0).compressed)
    (1.0, 0.0, 2)

    Raises:
        SelectionError: for a cost other than macs and params.
        InputError: as ``sensitivities``.
    """
    if cost not in ("macs", "params"):
        raise SelectionError(f"cost={cost!r} has no front; choose macs or params")
    subject = subject_of(model, example_inputs, calibration)
    how = {"evaluate": evaluate, "path": path and Path(path), "executor": executor, "minutes": minutes}
    name = estimator_for(estimator, calibration, evaluate)
    table = _table(subject, layers, forms, multiple, name, how)
    found = front(candidates_of(subject, table), cost)
    return ParetoFront(cost, table.unit, subject, table, totals_of(subject), found)
