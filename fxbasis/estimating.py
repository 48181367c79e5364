"""The estimators of ``sensitivities``, each from proposals and their weights to a change for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .datafit import error_of, squared
from .divergence import divergence
from .proposals import Proposal, shift_of
from .recipe import LayerPlan
from .running import ExampleInputs, run
from .statistics import inner_products
from .subjects import IMAGES, Subject, built, first_images, plan_with
from .sweeping import sweep

__all__ = ["Estimate", "by_fisher", "by_running", "by_statistics"]

Fitted = tuple[Proposal, dict[str, Tensor]]
Estimate = tuple[float, float]
"""A change and its standard error."""


def by_statistics(subject: Subject, name: str, fitted: Sequence[Fitted], estimator: str) -> list[Estimate]:
    """``weight``, ``output`` and ``kfac``, from the sums alone."""
    weight = subject.weight(name)
    found = []
    for proposal, weights in fitted:
        shift = shift_of(proposal, weight, weights)
        if estimator == "weight":
            change = float(shift.square().sum() / weight.square().sum().clamp(min=1e-300))
        else:
            statistics = subject.statistics[name]
            moment = statistics.covariance if name in subject.with_mean else statistics.moment
            if estimator == "output":
                change = error_of(weight, weight + shift, moment)
            else:
                change = 0.5 * statistics.positions * squared(shift, moment, statistics.metric)
        found.append((max(change, 0.0), 0.0))
    return found


def by_fisher(subject: Subject, fitted: Mapping[str, Sequence[Fitted]]) -> dict[str, list[Estimate]]:
    """Exact second order, one pass for all."""
    shifts = {
        name: torch.stack([shift_of(proposal, subject.weight(name), weights) for proposal, weights in found])
        for name, found in fitted.items()
        if found
    }
    means = {name: _means(subject, name) for name in shifts}
    layers = {name: subject.layers[name] for name in shifts}
    products = inner_products(subject.model, layers, shifts, first_images(subject.batches, IMAGES), means)
    return {name: _half_squares(products[name]) if name in shifts else [] for name in fitted}


def _means(subject: Subject, name: str) -> Tensor | None:
    """The mean patch, which a free constant takes out of the shift's effect."""
    return subject.statistics[name].mean if name in subject.with_mean else None


def _half_squares(products: Tensor) -> list[Estimate]:
    values = 0.5 * products.square()
    means, errors = values.mean(0), values.std(0) / max(1, len(values)) ** 0.5
    return [(float(mean), float(error)) for mean, error in zip(means, errors.nan_to_num(), strict=True)]


@dataclass(frozen=True)
class _Point:
    layer: LayerPlan
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class _OneLayer:
    """Builds the model with one layer compressed, and measures it; goes to other processes whole."""

    model: nn.Module
    table: Any
    batches: Sequence[ExampleInputs]
    expected: Sequence[Any]
    evaluate: Callable[[nn.Module], float] | None
    score: float

    def __call__(self, point: _Point) -> dict[str, float]:
        plan = plan_with(self.table, {point.layer.number: point.layer})
        small = built(self.model, plan, {point.layer.name: point.weights})
        if self.evaluate is not None:
            return {"change": self.score - float(self.evaluate(small)), "error": 0.0}
        pairs = zip(self.batches, self.expected, strict=True)
        changes = torch.cat([divergence(expected, run(small, batch)) for batch, expected in pairs])
        return {"change": float(changes.mean()), "error": float(changes.std()) / len(changes) ** 0.5}


def by_running(
    subject: Subject,
    fitted: Mapping[str, Sequence[Fitted]],
    *,
    evaluate: Callable[[nn.Module], float] | None,
    path: Path | None,
    executor: Executor | None,
    minutes: float | None,
) -> dict[str, list[Estimate | None]]:
    """The change measured, one model for each; None for what the time did not allow."""
    batches = [] if evaluate else first_images(subject.batches, IMAGES)
    expected = [run(subject.model, batch) for batch in batches]
    score = float(evaluate(subject.model)) if evaluate else 0.0
    compute = _OneLayer(subject.model, list(subject.table), batches, expected, evaluate, score)
    points = {
        _key(proposal.layer): _Point(proposal.layer, weights)
        for found in fitted.values()
        for proposal, weights in found
    }
    context = subject.digest(
        "measured" if evaluate is None else f"{evaluate.__module__}.{evaluate.__qualname__}"
    )
    results = sweep(points, compute, path=path, context=context, executor=executor, minutes=minutes)
    rows = {key: (row["change"], row["error"]) for key, row in results.items()}
    return {name: [rows.get(_key(one.layer)) for one, _ in found] for name, found in fitted.items()}


def _key(layer: LayerPlan) -> str:
    return f"{layer.number} {layer.name} {layer.form} {'-'.join(map(str, layer.ranks))}"
