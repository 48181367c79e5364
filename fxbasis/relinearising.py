"""Plans beyond the additive range: sensitivities once more, about the model that a plan makes.

About the dense model the first order of the change vanishes, and the second alone ranks the candidates. Far
from it neither holds. So the model of a plan of more than ``RANGE`` is built, and each candidate of each
layer judged in its place there: by the mean inner product of its shift with the gradient of the change, and
half the mean square of that with the gradient of the probe, as in ``statistics``; one forward and two
backward passes for all. The mean of all tables so far chooses the next plan, until one measures no better.

Only sums of the fisher estimate within a budget go that far: a largest change is met by the sum itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .calibrating import change_of
from .divergence import divergence, probe
from .estimating import Fitted, Key, weights_of
from .forms import BasisConv2d
from .passes.numbering import conv_layers
from .proposals import shift_of
from .recipe import Plan
from .running import ExampleInputs, batch_size, call, in_mode, run, seeded
from .sensitivities import Sensitivities
from .statistics import against, by_image, observed
from .subjects import IMAGES, Subject, built, first_images, take_off_

__all__ = ["RANGE", "beyond_range", "in_rounds", "relinearised"]

RANGE = 0.3
"""Nats up to which the changes by single layers add up to that of the model."""
ROUNDS = 3


def beyond_range(plan: Plan, combine: str = "sum") -> bool:
    """Whether a plan is so far from the model that its predicted change should be looked at again."""
    forecast = plan.forecast
    additive = combine == "sum" and forecast["estimator"] == "fisher" and "max_drop" not in forecast["asked"]
    return additive and forecast["change"] > RANGE


def in_rounds(
    subject: Subject,
    fitted: Mapping[str, Sequence[Fitted]],
    table: Sensitivities,
    combine: str,
    choose: Callable[[Sensitivities], Plan],
) -> Plan:
    """The plan that ``choose`` makes of the table, or where that is far from the model, ``relinearised``."""
    found = choose(table)
    return relinearised(subject, fitted, table, choose) if beyond_range(found, combine) else found


def relinearised(
    subject: Subject,
    fitted: Mapping[str, Sequence[Fitted]],
    table: Sensitivities,
    choose: Callable[[Sensitivities], Plan],
) -> Plan:
    """The plan that measures best of that of the table and those of up to ``ROUNDS`` tables about the last.

    Args:
        subject: with calibration data and outputs that can be compared.
        fitted: what could stand for each layer.
        table: the sensitivities about the dense model.
        choose: the best plan by sensitivities of the same rows.

    Returns:
        It; what was predicted is the sum about the dense model. The forecast also has the "measured change",
        before any fit of the whole, and the number of "rounds".
    """
    about, tables = _About(subject, fitted), [table]
    first = choose(table)
    tried = [(about.change(first), first)]
    while len(tables) <= ROUNDS:
        tables.append(about.table(table, tried[-1][1]))
        found = choose(_mean(tables))
        if found.layers == tried[-1][1].layers:
            break
        tried.append((about.change(found), found))
        if tried[-1][0] >= tried[-2][0]:
            break
    change, best = min(tried, key=lambda pair: pair[0])
    about_dense = {name: first.forecast[name] for name in ("objective", "bound")} | _predicted(table, best)
    told = {"measured change": change, "rounds": len(tables) - 1}
    return Plan(best.layers, {**best.forecast, **about_dense, **told})


def _mean(tables: Sequence[Sensitivities]) -> Sensitivities:
    rows = zip(*tables, strict=True)
    mean = (replace(row[0], change=sum(one.change for one in row) / len(row)) for row in rows)
    return replace(tables[0], rows=tuple(mean))


def _predicted(table: Sensitivities, plan: Plan) -> dict[str, float]:
    chosen = {layer.key for layer in plan.compressed}
    rows = [row for row in table if row.layer.key in chosen]
    return {"change": sum(row.change for row in rows), "error": sum(row.error**2 for row in rows) ** 0.5}


class _About:
    """Models under plans, measured and differentiated."""

    def __init__(self, subject: Subject, fitted: Mapping[str, Sequence[Fitted]]) -> None:
        self.subject = subject
        self.batches = tuple(first_images(subject.batches, IMAGES))
        self.expected = [run(subject.model, batch) for batch in self.batches]
        self.keys = {name: [one.layer.key for one, _ in found] for name, found in fitted.items() if found}
        self.weights = weights_of(fitted)
        self.shifts = {
            name: torch.stack([shift_of(one, subject.weight(name), weights) for one, weights in fitted[name]])
            for name in self.keys
        }

    def now(self, plan: Plan) -> dict[str, Tensor]:
        """The shift that each layer's weight has under a plan; zero where it is dense."""
        found = {name: torch.zeros_like(shifts[0]) for name, shifts in self.shifts.items()}
        for layer in plan.compressed:
            found[layer.name] = self.shifts[layer.name][self.keys[layer.name].index(layer.key)]
        return found

    def model(self, plan: Plan) -> nn.Module:
        """The traced model under a plan, its layers fitted each by itself."""
        weights = {layer.name: self.weights[layer.key] for layer in plan.compressed}
        small, now = built(self.subject.model, plan, weights), self.now(plan)
        for name in weights:
            constant = self.subject.constant(name, now[name])
            if constant is not None:
                take_off_(small, name, self.subject.norms.get(name), constant)
        return small

    def change(self, plan: Plan) -> float:
        """Measured, over the images."""
        return change_of(self.expected, self.model(plan), self.batches)

    def table(self, table: Sensitivities, plan: Plan) -> Sensitivities:
        """What each candidate changes, beside the dense layer, in a model that is otherwise the plan's."""
        now = self.now(plan)
        ways = {n: torch.cat([-now[n][None], shifts - now[n]]) for n, shifts in self.shifts.items()}
        first, second = self._products(self.model(plan), ways)
        found: dict[Key, float] = {}
        for name, keys in self.keys.items():
            changes = first[name].mean(0) + 0.5 * second[name].square().mean(0)
            found |= zip(keys, (changes[1:] - changes[0]).tolist(), strict=True)
        return replace(table, rows=tuple(replace(row, change=found[row.layer.key]) for row in table))

    def _products(self, small: nn.Module, ways: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """By layer (images, n): the shifts against the gradients of the change, and of the probe."""
        flat = {name: shifts.flatten(1).float() for name, shifts in ways.items()}
        found: list[dict[str, list[Tensor]]] = [{name: [] for name in flat} for _ in range(2)]
        for seed, (inputs, expected) in enumerate(zip(self.batches, self.expected, strict=True)):
            both = _gradients(small, list(flat), inputs, expected, seed)
            for into, gradients in zip(found, both, strict=True):
                for name, calls in gradients.items():
                    into[name].append(self._against(name, calls, flat[name], batch_size(inputs)))
        return [{name: torch.cat(parts).double() for name, parts in into.items()} for into in found]

    def _against(
        self, name: str, calls: Sequence[tuple[Tensor, Tensor]], shifts: Tensor, images: int
    ) -> Tensor:
        """(images, n), over all calls of a layer."""
        layer, total = self.subject.layers[name], torch.zeros(images, len(shifts))
        mean = self.subject.free_mean(name)
        for input, gradient in calls:
            total += by_image(name, against(layer, input, gradient, shifts, mean), images)
        return total


def _gradients(
    small: nn.Module, names: Sequence[str], inputs: ExampleInputs, expected: Any, seed: int
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Of one batch: by layer the input and the gradient of each call, for the change and for the probe."""
    layers = conv_layers(small)
    ends = {name: one.ends if isinstance(one := layers[name], BasisConv2d) else (one, one) for name in names}
    starts, stops = ({name: pair[end] for name, pair in ends.items()} for end in (0, 1))
    with (
        observed(starts) as ins,
        observed(stops) as outs,
        torch.enable_grad(),
        in_mode(small, False),
        seeded(),
    ):
        output = call(small, inputs)
        generator = torch.Generator().manual_seed(seed)
        scalars = (divergence(expected, output).sum(), probe(output, generator, expected))
    zeros = [zero for name in names for _, zero in outs[name]]
    for scalar in scalars:
        made = torch.autograd.grad(
            scalar, zeros, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        gradients = iter(made)
        yield {name: [(input, next(gradients)) for input, _ in ins[name]] for name in names}
