"""The estimators of ``sensitivities``, each from proposals and their weights to a change for each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .calibration_data import naming_batch
from .copying import copy_model
from .datafit import error_of, squared
from .divergence import divergence
from .errors import InputError
from .proposals import Proposal, shift_of
from .recipe import LayerPlan
from .running import ExampleInputs, run, seeded
from .statistics import inner_products
from .subjects import IMAGES, Subject, built, first_images, plan_with, take_off_
from .sweeping import sweep

__all__ = ["Estimate", "Key", "by_fisher", "by_running", "by_statistics", "weights_of"]

Fitted = tuple[Proposal, dict[str, Tensor]]
Key = tuple[str, str, tuple[int, ...]]
Estimate = tuple[float, float]
"""A change and its standard error."""
Score: TypeAlias = Callable[[nn.Module], float]
_WHOLE = "the model itself"
_ALONE = RLock()


def weights_of(fitted: Mapping[str, Sequence[Fitted]]) -> dict[Key, dict[str, Tensor]]:
    """The steps' weights of everything that was fitted, by the key of its ``LayerPlan``."""
    return {one.layer.key: weights for found in fitted.values() for one, weights in found}


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
    means = {name: subject.free_mean(name) for name in shifts}
    layers = {name: subject.layers[name] for name in shifts}
    products = inner_products(subject.model, layers, shifts, first_images(subject.batches, IMAGES), means)
    return {name: _half_squares(products[name]) if name in shifts else [] for name in fitted}


def _half_squares(products: Tensor) -> list[Estimate]:
    values = 0.5 * products.square()
    return list(zip(values.mean(0).tolist(), _errors(values).tolist(), strict=True))


def _errors(values: Tensor) -> Tensor:
    """The standard error of the mean over dimension 0; 0 for one value."""
    deviation = values.std(0, correction=min(1, len(values) - 1))
    return deviation.div(len(values) ** 0.5)


@dataclass(frozen=True)
class _Point:
    """A layer, the weights of its steps, and the mean that they add to its outputs."""

    layer: LayerPlan
    weights: dict[str, Tensor]
    constant: Tensor | None
    norm: str | None


@dataclass(frozen=True)
class _OneLayer:
    """Builds the model with one layer compressed, or none, and measures it; goes to other processes whole.

    In one process one at a time: the random state, and what fx patches while it traces, are of all threads.
    """

    model: nn.Module
    table: Any
    batches: Sequence[ExampleInputs]
    expected: Sequence[Any]
    evaluate: Score | None
    threads: int

    def __call__(self, point: _Point | None) -> dict[str, float]:
        with _ALONE, _threads(self.threads):
            return self._measured(point)

    def _measured(self, point: _Point | None) -> dict[str, float]:
        small = copy_model(self.model) if point is None else self._built(point)
        if self.evaluate is not None:
            with seeded():
                score = float(self.evaluate(small))
            if not math.isfinite(score):
                what = "the model itself" if point is None else f"{point.layer}, {_key(point.layer)}"
                raise InputError(f"evaluate gave {score} for {what}; let it give a finite number")
            return {"score": score}
        pairs = zip(self.batches, self.expected, strict=True)
        changes = torch.cat([divergence(expected, run(small, batch)) for batch, expected in pairs])
        return {"change": float(changes.mean()), "error": float(_errors(changes))}

    def _built(self, point: _Point) -> nn.Module:
        name = point.layer.name
        small = built(
            self.model, plan_with(self.table, {point.layer.number: point.layer}), {name: point.weights}
        )
        if point.constant is not None:
            take_off_(small, name, point.norm, point.constant)
        return small


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads of torch here as where the sweep began: sums in another order are other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _point(subject: Subject, proposal: Proposal, weights: dict[str, Tensor]) -> _Point:
    name = proposal.layer.name
    constant = subject.constant(name, shift_of(proposal, subject.weight(name), weights))
    return _Point(proposal.layer, weights, constant, subject.norms.get(name))


def by_running(
    subject: Subject,
    fitted: Mapping[str, Sequence[Fitted]],
    *,
    evaluate: Score | None,
    path: str | Path | None,
    executor: Executor | None,
    minutes: float | None,
) -> dict[str, list[Estimate | None]]:
    """The change measured, one model for each; None for what the time did not allow."""
    batches = [] if evaluate else first_images(subject.batches, IMAGES)
    expected = []
    for number, batch in enumerate(batches, start=1):
        with naming_batch(number):
            expected.append(run(subject.model, batch))
    compute = _OneLayer(
        subject.model, list(subject.table), batches, expected, evaluate, torch.get_num_threads()
    )
    points: dict[str, _Point | None] = {_WHOLE: None} if evaluate else {}
    points |= {
        _key(one.layer): _point(subject, one, weights) for found in fitted.values() for one, weights in found
    }
    kept = None if path is None else Path(path)
    context = subject.digest("measured" if evaluate is None else _identity(evaluate))
    results = sweep(points, compute, path=kept, context=context, executor=executor, minutes=minutes)
    rows = _estimates(results)
    return {name: [rows.get(_key(one.layer)) for one, _ in found] for name, found in fitted.items()}


def _estimates(results: Mapping[str, Mapping[str, float]]) -> dict[str, Estimate]:
    """Changes as they are; scores as what they lack of the model's own, none without that."""
    if all("change" in row for row in results.values()):
        return {key: (row["change"], row["error"]) for key, row in results.items()}
    if _WHOLE not in results:
        return {}
    dense = results[_WHOLE]["score"]
    return {key: (dense - row["score"], 0.0) for key, row in results.items() if key != _WHOLE}


def _key(layer: LayerPlan) -> str:
    return f"{layer.number} {layer.name} {layer.form} {'-'.join(map(str, layer.ranks))}"


def _identity(evaluate: Any) -> str:
    """The name, source and bound arguments of a score, by which its results are found again."""
    told = []
    while isinstance(evaluate, partial):
        told.append(repr((evaluate.args, evaluate.keywords)))
        evaluate = evaluate.func
    named = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    with suppress(OSError, TypeError):  # no source: built in, or typed in a shell
        told.append(inspect.getsource(named))
    return "\n".join([named.__qualname__, *told])
