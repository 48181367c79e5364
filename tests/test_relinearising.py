"""Sensitivities about a compressed model, and plans in rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import fxbasis.latency
from fxbasis import compress, plan_of
from fxbasis.choices import Totals, totals_of
from fxbasis.planning import ParetoFront, pareto
from fxbasis.promises import promised
from fxbasis.recipe import Plan
from fxbasis.relinearising import RANGE, _About

DATA = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def front_of(*between: nn.Module) -> ParetoFront:
    torch.manual_seed(1)
    convs = [nn.Conv2d(channels, 16, 3, padding=1) for channels in (3, 16, 16)]
    net = nn.Sequential(convs[0], *between, convs[1], *between, convs[2]).eval()
    return pareto(net, DATA[0][:1], calibration=DATA, forms=["gauge"])


def without(plan: Plan, number: int, other: Any) -> Plan:
    """The plan with another decision for one layer."""
    return Plan(tuple(other if layer.number == number else layer for layer in plan.layers))


def test_about_a_plan_of_a_linear_model_changes_are_those_that_are_measured() -> None:
    """The change is a square there, so that two orders are all; the second is an average of probes."""
    front = front_of()
    about, plan = _About(front.subject, front.fitted), front.plan(len(front) // 3)
    table, whole = about.table(front.table, plan), front.plan(len(front) - 1)
    assert {layer.form for layer in plan.layers} == {"dense", "gauge"}
    predicted, measured = [], []
    for row in table:
        dense = whole.layers[row.layer.number - 1]
        ways = [without(plan, row.layer.number, other) for other in (row.layer, dense)]
        predicted.append(row.change)
        measured.append(about.change(ways[0]) - about.change(ways[1]))
    found, true = torch.tensor(predicted), torch.tensor(measured)
    assert float(spearmanr(found, true).statistic) > 0.97
    assert float((found - true).norm() / true.norm()) < 0.15


@pytest.mark.parametrize("macs", [0.15, 0.25])
def test_rounds_never_measure_worse_than_the_sum(macs: float) -> None:
    front = front_of(nn.ReLU())
    alone = front._planned(front.table, {"macs": macs}, "sum")
    assert alone.forecast["change"] > RANGE
    found = front.within({"macs": macs})
    about = _About(front.subject, front.fitted)
    assert found.forecast["measured change"] == pytest.approx(about.change(found), rel=1e-6)
    assert found.forecast["measured change"] <= about.change(alone)
    assert found.forecast["change"] >= alone.forecast["change"] - 1e-9  # the least sum is that of the sum
    assert found.forecast["macs"] <= macs
    assert 1 <= found.forecast["rounds"] <= 3
    assert "Measured before the fit: change" in promised(found.forecast)[0]


def test_rounds_help_somewhere() -> None:
    gains = []
    for macs in (0.15, 0.2, 0.25, 0.3):
        front = front_of(nn.ReLU())
        alone = front._planned(front.table, {"macs": macs}, "sum")
        about = _About(front.subject, front.fitted)
        gains.append(about.change(alone) - about.change(front.within({"macs": macs})))
    assert min(gains) >= 0
    assert max(gains) > 0


def test_small_changes_and_other_rules_take_no_rounds() -> None:
    front = front_of(nn.ReLU())
    assert "rounds" not in front.within({"macs": 0.95}).forecast
    assert "rounds" not in front.within({"max_drop": 5.0}).forecast


def timed_by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that follow the ranks, and whole models that take what their layers do."""

    def layer_ms(record: Any, form: str, ranks: Any, threads: int) -> float:
        return float(record.macs) * (1.0 if form == "dense" else sum(ranks) / record.out_channels)

    monkeypatch.setattr(fxbasis.latency, "layer_ms", layer_ms)
    monkeypatch.setattr(fxbasis.latency, "_timed", timed)
    monkeypatch.setattr(fxbasis.latency, "_measured", lambda _, plan, *rest: plan.forecast["latency"])


def timed(subject: Any, times: Any, threads: int) -> Totals:
    convs = sum(times(record, "dense", ()) for record in subject.table)
    totals = totals_of(subject)
    return Totals({**totals.whole, "latency": convs}, {**totals.fixed, "latency": 0.0})


def test_budgets_of_time_take_rounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_of(nn.ReLU())
    timed_by_work(monkeypatch)
    found, about = front.within({"latency": 0.15}), _About(front.subject, front.fitted)
    assert found.forecast["rounds"] >= 1
    assert found.forecast["measured latency"] <= 0.15
    assert found.forecast["measured change"] == pytest.approx(about.change(found), rel=1e-6)
    monkeypatch.setattr(fxbasis.latency, "beyond_range", lambda *_: False)
    alone = front.within({"latency": 0.15})
    assert "rounds" not in alone.forecast
    assert found.forecast["measured change"] <= about.change(alone)


def test_rounds_that_miss_the_time_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_of(nn.ReLU())
    timed_by_work(monkeypatch)

    def slower(subject: Any, plan: Plan, *rest: Any) -> float:
        return float(plan.forecast["latency"]) * (1.2 if "rounds" in plan.forecast else 1)

    monkeypatch.setattr(fxbasis.latency, "_measured", slower)
    found = front.within({"latency": 0.15})
    assert "rounds" not in found.forecast
    assert found.forecast["measured latency"] <= 0.15


def test_another_budget_beside_that_of_time_takes_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_of(nn.ReLU())
    timed_by_work(monkeypatch)
    monkeypatch.setattr(fxbasis.latency, "_measured", lambda *_: 0.5)
    both, alone = front.within({"macs": 0.2, "latency": 1.0}), front.within({"macs": 0.2})
    assert both.layers == alone.layers
    assert both.forecast["rounds"] == alone.forecast["rounds"] >= 1


def test_a_compressed_model_tells_its_rounds() -> None:
    net = front_of(nn.ReLU()).subject.model
    small = compress(net, DATA[0][:1], macs=0.2, calibration=DATA, forms=["gauge"])
    forecast = plan_of(small).forecast
    assert forecast["rounds"] >= 1
    assert forecast["fit"]["changes"]["data"] > 0
