"""``plan`` and ``pareto``: which layers to compress, in which form, at which rank, within a budget.

The predicted changes of single layers (``sensitivities``, made monotone) are added up, and the best choice
is found exactly (``solvers``); leaving a layer dense is always among its candidates, so that no plan is
predicted worse or dearer than the model. Sums hold up to about 0.3 nats. Beyond, plans by the fisher estimate
within budgets are chosen in rounds (``relinearising``); others are ranked by sums that promise too little
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from .choices import Totals, asked_for, candidates_of, made_plan, planned, totals_of
from .errors import PlanError, SelectionError
from .estimating import Fitted
from .export.checking import check_threads
from .fronts import Front, front
from .latency import planned_by_time
from .passes.ranking import is_whole
from .passes.rewriting import check_uncompressed
from .passes.selection import Layers
from .recipe import Plan
from .relinearising import in_rounds
from .running import ExampleInputs
from .sensitivities import CHANGES, Sensitivities, estimated, estimator_for, fitted_for
from .subjects import Subject, subject_of

__all__ = ["ParetoFront", "pareto", "plan", "plan_for"]


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    statistics: str | Path | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    layers: Layers = "all",
    forms: Sequence[str] | None = None,
    estimator: str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    multiple: int = 1,
    combine: str = "sum",
    path: str | Path | None = None,
    executor: Executor | None = None,
    minutes: float | None = None,
    threads: int = 1,
) -> Plan:
    """The plan of least predicted change within budgets, or the cheapest within a largest change.

    Args:
        model, example_inputs, calibration, statistics, layers, forms, estimator, evaluate, multiple, path,
            executor, minutes: as of ``sensitivities``, which are computed first.
        macs, params: budgets, as fractions of the whole model's.
        latency: a budget too, of the time in ONNX Runtime with ``threads``. Layers are timed one by one, and
            plans are built and measured whole, beside the original, until one keeps the budget.
        max_drop: instead of budgets, the largest predicted change, in the unit of the sensitivities; what
            is minimised are the MACs.
        combine: "sum"; for comparison "paper", the averages of arXiv 2408.06024, in which budgets are too, or
            "minimax", the least largest change of one layer (AIMET, BasisConv), within budgets.

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
        SelectionError: without a budget, or with a budget and ``max_drop``; and as ``sensitivities``.
        InputError: as ``sensitivities``.
    """
    asked = asked_for(macs=macs, params=params, latency=latency, max_drop=max_drop)
    how = {"evaluate": evaluate, "path": path, "executor": executor, "minutes": minutes}
    name = estimator_for(estimator, calibration, how)
    subject = subject_of(model, example_inputs, calibration, statistics)
    return plan_for(subject, asked, layers, forms, name, multiple, combine, threads, how)


def plan_for(
    subject: Subject,
    asked: Mapping[str, float],
    layers: Layers,
    forms: Sequence[str] | None,
    estimator: str,
    multiple: int,
    combine: str,
    threads: int,
    how: Mapping[str, Any],
) -> Plan:
    """``plan`` for a model under study."""
    return _front(subject, "macs", layers, forms, estimator, multiple, how).within(asked, combine, threads)


def _front(
    subject: Subject,
    cost: str,
    layers: Layers,
    forms: Sequence[str] | None,
    name: str,
    multiple: int,
    how: Mapping[str, Any],
) -> ParetoFront:
    if not subject.table:
        raise PlanError(
            "the model has no Conv2d, so there is nothing to plan; fxbasis.profile counts its work"
        )
    check_uncompressed(subject.model)
    if name in CHANGES:
        subject.check_comparable()
    fitted, ruled_out = fitted_for(subject, forms, multiple, layers)
    return ParetoFront(cost, subject, fitted, estimated(subject, fitted, ruled_out, name, **how))


@dataclass(frozen=True)
class ParetoFront:
    """Every plan that no other beats in cost and predicted change, by rising cost.

    Attributes:
        cost: its name.
        subject: the model under study.
        fitted: what could stand for each layer, with its weights. table: what that does to the model.
    """

    cost: str
    subject: Subject
    fitted: Mapping[str, Sequence[Fitted]]
    table: Sensitivities

    @property
    def unit(self) -> str:
        """Of the changes."""
        return self.table.unit

    @cached_property
    def totals(self) -> Totals:
        """Costs of the model."""
        return totals_of(self.subject)

    @cached_property
    def found(self) -> Front:
        """The points; put together when they are first asked for."""
        return front(candidates_of(self.subject, self.table), self.cost)

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
        """The plan of one point.

        Raises:
            PlanError: for a point that there is not.
        """
        if not is_whole(index) or not -len(self) <= index < len(self):
            raise PlanError(f"point {index!r} is not on the front; pass a number from 0 to {len(self) - 1}")
        return made_plan(self.subject, self.table, self.found[index], self.totals, {})

    def within(self, asked: Mapping[str, float], combine: str = "sum", threads: int = 1) -> Plan:
        """The plan for budgets or a largest change, of the same candidates; arguments as of ``plan``.

        Raises:
            PlanError: for a budget that cannot be met, with the least that can.
            SelectionError: for what is no budget.
        """
        asked = {name: asked_for(**{name: limit})[name] for name, limit in asked.items()}
        if "latency" in asked:
            check_threads(threads)
            return planned_by_time(self.subject, self.fitted, self.table, asked, combine, threads)
        choose = partial(self._planned, asked=asked, combine=combine)
        return in_rounds(self.subject, self.fitted, self.table, combine, choose)

    def _planned(self, table: Sensitivities, asked: Mapping[str, float], combine: str) -> Plan:
        return planned(self.subject, table, asked, combine, self.totals)


def pareto(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    statistics: str | Path | None = None,
    cost: str = "macs",
    layers: Layers = "all",
    forms: Sequence[str] | None = None,
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
        SelectionError: for a cost other than macs and params; and as ``sensitivities``.
        InputError: as ``sensitivities``.
    """
    if cost not in ("macs", "params"):
        raise SelectionError(f"cost={cost!r} has no front; choose macs or params")
    how = {"evaluate": evaluate, "path": path, "executor": executor, "minutes": minutes}
    name = estimator_for(estimator, calibration, how)
    subject = subject_of(model, example_inputs, calibration, statistics)
    return _front(subject, cost, layers, forms, name, multiple, how)
