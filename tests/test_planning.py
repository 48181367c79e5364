"""Plans within budgets: what they promise holds exactly in the model that is built of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETS, build
from torch import nn

import fxbasis.latency
from fxbasis import (
    FxBasisError,
    FxBasisWarning,
    InputError,
    Plan,
    PlanError,
    SelectionError,
    compress,
    export_onnx,
    fold,
    load,
    measure,
    pareto,
    plan,
    plan_of,
    profile,
    report,
    save,
    sensitivities,
)
from fxbasis.promises import promised

DATA = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
FAST: dict[str, Any] = {"forms": ["gauge"], "calibration": DATA}


class Shaped(nn.Module):
    """Two convolutions and a Linear, whose output comes in another wrapping, or through a branch on data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        inner = self.b(torch.relu(self.bn(self.a(x))))
        inner = inner if scale is None else inner * scale
        y = self.fc(torch.relu(inner).mean((2, 3)))
        if self.kind == "branch":
            return y if y.sum() > 0 else 2 * y
        shapes: dict[str, Any] = {"dict": {"y": y, "inner": inner}, "tuple": (y, inner), "list": [y]}
        return shapes.get(self.kind, y)


def shaped(kind: str = "plain") -> Shaped:
    torch.manual_seed(0)
    return Shaped(kind).eval()


def ratios(small: nn.Module, example: Any) -> dict[str, float]:
    work = profile(small, example)
    return {"macs": work.macs / work.macs_before, "params": work.params / work.params_before}


@pytest.mark.parametrize("key", NETS)
def test_a_plan_keeps_its_budget_and_forecasts_exact_costs(key: str) -> None:
    net = build(key)
    found = plan(net, net.example, macs=0.75, **FAST)
    small = compress(net, net.example, plan=found)
    assert ratios(small, net.example) == {name: found.forecast[name] for name in ("macs", "params")}
    assert found.forecast["macs"] <= 0.75
    assert found.forecast["bound"] <= found.forecast["change"]


@pytest.mark.parametrize("limits", [{"params": 0.7}, {"macs": 0.7, "params": 0.7}])
def test_other_budgets_are_kept_too(limits: dict[str, float]) -> None:
    net = shaped()
    found = plan(net, DATA[0], forms=["cp", "gauge"], calibration=DATA, **limits)
    built = ratios(compress(net, DATA[0], plan=found), DATA[0])
    assert all(built[name] == found.forecast[name] <= limit for name, limit in limits.items())
    assert found.forecast["solver"] == ("integer program" if len(limits) == 2 else "merging, exact")


def test_max_drop_is_kept_and_costs_least() -> None:
    net = shaped()
    changes = [plan(net, DATA[0], macs=macs, **FAST).forecast["change"] for macs in (0.5, 0.8)]
    found = plan(net, DATA[0], max_drop=changes[0], **FAST)
    assert found.forecast["change"] <= changes[0]
    assert found.forecast["macs"] <= 0.5
    assert not plan(net, DATA[0], max_drop=0, **FAST).compressed
    assert changes[0] > changes[1] > 0


def test_the_whole_budget_leaves_the_model_dense() -> None:
    net = shaped()
    found = plan(net, DATA[0], macs=1.0, **FAST)
    assert not found.compressed
    assert (found.forecast["macs"], found.forecast["change"]) == (1.0, 0.0)
    with pytest.warns(FxBasisWarning, match="nothing is compressed: the plan leaves it dense"):
        compress(net, DATA[0], plan=found)


@pytest.mark.parametrize("limits", [{"macs": 0.05}, {"params": 0.01}, {"macs": 0.05, "params": 0.9}])
def test_what_cannot_be_reached_names_the_least_that_can(limits: dict[str, float]) -> None:
    net = shaped()
    with pytest.raises(PlanError, match=r"cannot be reached: the least is 0\.\d+ .*; raise it") as raised:
        plan(net, DATA[0], **limits, **FAST)
    least = float(str(raised.value).partition("the least is ")[2].split()[0])
    name = next(iter(limits))
    assert plan(net, DATA[0], **{**limits, name: least}, **FAST).forecast[name] <= least


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "pass macs=, params=, latency= or max_drop="),
        ({"macs": 0.5, "max_drop": 0.1}, "pass one of them"),
        ({"macs": 50}, "pass for example macs=0.5"),
        ({"macs": "half"}, "pass for example macs=0.5"),
        ({"params": math.nan}, "pass for example params=0.5"),
        ({"max_drop": math.inf}, "pass a number such as"),
        ({"macs": 0.9, "combine": "mean"}, 'pass "sum", or "paper"'),
        ({"macs": 0.9, "layers": {"a": {"size": 2}}}, "pass a list of layers"),
    ],
)
def test_mistakes_end_with_the_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        plan(shaped(), DATA[0], **{**FAST, **settings})


def test_a_model_without_convolutions_has_no_plan() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    for verb, settings in ((plan, {"macs": 0.5}), (pareto, {}), (compress, {"macs": 0.5})):
        with pytest.raises(PlanError, match="no Conv2d, so there is nothing to plan"):
            verb(model, DATA[0], calibration=DATA, **settings)  # type: ignore[operator]


def test_a_plan_is_a_file_and_two_calls_agree(tmp_path: Path) -> None:
    net, path = shaped(), tmp_path / "plan.json"
    found = plan(net, DATA[0], macs=0.6, **FAST)
    found.to_json(path)
    again = Plan.from_json(path)
    assert (again, again.forecast) == (found, found.forecast)
    other = plan(shaped(), DATA[0], macs=0.6, **FAST)
    assert (other, other.forecast) == (found, found.forecast)
    small = compress(net, DATA[0], plan=path)
    assert plan_of(small).layers == found.layers
    assert plan_of(small).forecast == found.forecast


def test_the_papers_averages_take_as_many_times_less() -> None:
    net = shaped()
    found = plan(net, DATA[0], macs=0.9, combine="paper", **FAST)
    true = ratios(compress(net, DATA[0], plan=found), DATA[0])["macs"]
    assert found.forecast["macs"] == pytest.approx(1 - (1 - true) / 2)
    with pytest.raises(PlanError, match=r"the least is 0\.5"):
        plan(net, DATA[0], macs=0.5, combine="paper", **FAST)


def test_the_rule_of_the_largest_change() -> None:
    net = shaped()
    summed, found = (plan(net, DATA[0], macs=0.5, combine=rule, **FAST) for rule in ("sum", "minimax"))
    assert found.forecast["macs"] <= 0.5
    assert found.forecast["solver"] == "water level"
    assert found.forecast["change"] >= summed.forecast["change"]
    table = {row.layer.key: row.change for row in sensitivities(net, DATA[0], **FAST)}
    largest = [max(table[layer.key] for layer in made.compressed) for made in (found, summed)]
    assert largest[0] <= largest[1]
    assert "is below" in promised(found.forecast)[0]
    with pytest.raises(SelectionError, match="combine='minimax' is no rule"):
        plan(net, DATA[0], max_drop=0.1, combine="minimax", **FAST)


@pytest.mark.parametrize("kind", ["plain", "dict", "tuple", "list", "branch"])
@pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")  # of the branch, which stays Python
def test_any_model_in_one_call(kind: str) -> None:
    net = shaped(kind).train()
    small = compress(net, DATA[0], macs=0.6, **FAST)
    forecast = plan_of(small).forecast
    assert ratios(small, DATA[0])["macs"] == forecast["macs"] <= 0.6
    assert forecast["fit"]["changes"][forecast["fit"]["kept"]] == min(forecast["fit"]["changes"].values())
    assert small.training
    assert all(module.training for module in net.modules())


@pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")  # of the None that it is traced with
def test_other_inputs_and_dtypes() -> None:
    data, net = [batch.double() for batch in DATA], shaped().double()
    scale = torch.tensor(2.0, dtype=torch.float64)
    assert plan(net, data[0], calibration=data, macs=0.6, forms=["gauge"]).compressed
    pairs = [((batch, scale), "label") for batch in data]
    assert compress(net, (data[0], scale), calibration=pairs, macs=0.6, forms=["gauge"]) is not net
    named = [{"x": batch} for batch in data]
    assert plan(net, {"x": data[0]}, calibration=named, macs=0.6, forms=["gauge"]).compressed


def test_a_single_convolution_is_a_model() -> None:
    net = nn.Conv2d(3, 8, 3)
    found = plan(net, DATA[0], macs=0.6, **FAST)
    assert ratios(compress(net, DATA[0], plan=found), DATA[0])["macs"] == found.forecast["macs"]


def test_the_front_is_monotone_ends_dense_and_can_be_built() -> None:
    net = shaped()
    found = pareto(net, DATA[0], **FAST)
    assert found.costs == sorted(found.costs)
    assert found.changes == sorted(found.changes, reverse=True)
    assert (found.costs[-1], found.changes[-1]) == (1.0, 0.0)
    for index in range(0, len(found) - 1, 5):
        small = compress(net, DATA[0], plan=found.plan(index))
        assert ratios(small, DATA[0])["macs"] == pytest.approx(found.costs[index], rel=1e-12)
    assert plan(net, DATA[0], macs=found.costs[3], **FAST).forecast["change"] == found.changes[3]
    assert pareto(net, DATA[0], cost="params", **FAST).costs[-1] == 1.0
    with pytest.raises(SelectionError, match="choose macs or params"):
        pareto(net, DATA[0], cost="latency", **FAST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": 0.6, "plan": Plan(())}, "plan= decides instead of a budget; pass one"),
        ({"macs": 0.6, "energy": 0.9}, "energy= and a budget both say the ranks; pass one"),
        ({"macs": 0.6, "form": "gauge"}, "pass forms= instead of form="),
        ({"macs": 0.6, "fixed_basis": True}, "pass forms= instead of fixed_basis="),
        ({"max_drop": 0.1, "latency": 0.5}, "contradict each other; pass one of them"),
        ({"forms": ["gauge"]}, "pass a budget too, such as macs=0.5"),
        ({"evaluate": lambda model: 1.0}, "pass a budget too, such as macs=0.5"),
    ],
)
def test_compress_refuses_what_a_budget_would_overrule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        compress(shaped(), DATA[0], **settings)


@pytest.mark.parametrize("form", ["reduced", "weight", "tt"])
def test_every_form_stands_beside_calibration_data(form: str) -> None:
    assert plan_of(compress(shaped(), DATA[0], form=form, calibration=DATA)).forecast["fit"]["images"] == 8


def test_a_compressed_model_reports_saves_folds_and_exports(tmp_path: Path) -> None:
    net = shaped()
    small = compress(net, DATA[0], macs=0.6, **FAST)
    again = load(net, save(small, tmp_path / "saved"))
    done = report(net, again, DATA[0], tmp_path, runs=3)
    text = (tmp_path / "report.md").read_text()
    assert "Planned for MACs at most 0.6. Predicted: MACs 0." in text
    assert "Fitted to 8 images without labels" in text
    assert "promise failed" not in text
    assert done.forecast == plan_of(small).forecast
    assert torch.equal(again(DATA[0]), small(DATA[0]))
    assert plan_of(again).forecast == plan_of(small).forecast
    assert "fit" not in plan_of(compress(net, DATA[0], plan=tmp_path / "plan.json")).forecast
    torch.testing.assert_close(fold(small)(DATA[0]), small(DATA[0]))
    assert export_onnx(small, DATA[0], tmp_path / "small.onnx").difference.relative < 1e-4


def test_a_broken_promise_and_a_point_of_a_front_are_told(tmp_path: Path) -> None:
    net = shaped()
    found = pareto(net, DATA[0], **FAST)
    small = compress(net, DATA[0], plan=found.plan(0))
    report(net, small, DATA[0], tmp_path, runs=3)
    assert "Planned for a point of the front. Predicted" in (tmp_path / "report.md").read_text()
    greedy = Plan(found.plan(0).layers, {**found.plan(0).forecast, "asked": {"macs": 0.01}})
    report(net, compress(net, DATA[0], plan=greedy), DATA[0], tmp_path, runs=3)
    assert "**A promise failed: MACs at most 0.01, measured 0." in (tmp_path / "report.md").read_text()


def test_a_time_is_kept_when_measured_again() -> None:
    convs = [nn.Conv2d(channels, 64, 3, padding=1) for channels in (3, 64, 64)]
    net, data = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]), [torch.randn(2, 3, 28, 28)]
    small = compress(net, data[0][:1], latency=0.7, calibration=data, forms=["gauge"])
    assert plan_of(small).forecast["measured latency"] <= 0.7
    assert plan_of(small).forecast["asked"] == {"latency": 0.7}
    found = []
    for _ in range(5):
        times = measure({"net": net, "small": small}, data[0][:1], runs=15)
        found.append(times["small"].ratio_to(times["net"]))
    assert min(found) <= 0.7


def measured_as(ratios: list[float], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let whole models measure as told; layers take a millisecond for each million of MACs."""
    left, shape = iter(ratios), fxbasis.latency

    def layer_ms(record: Any, form: str, ranks: Any, threads: int) -> float:
        part = 1.0 if form == "dense" else sum(ranks) / record.out_channels
        return float(record.macs) * part / 1e6

    monkeypatch.setattr(shape, "layer_ms", layer_ms)
    monkeypatch.setattr(shape, "_measured", lambda *_: next(left))
    return ratios


def test_of_the_plans_in_time_the_one_of_least_change_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as([0.9, 0.3, 0.65, 0.75, 0.5], monkeypatch)
    found = plan(shaped(), DATA[0], latency=0.7, **FAST)
    assert found.forecast["measured latency"] == 0.65
    measured_as([0.9, 0.8, 0.9, 0.9, 0.9], monkeypatch)
    with pytest.raises(PlanError, match=r"the fastest took 0\.[89]00 of the original's time: raise it"):
        plan(shaped(), DATA[0], latency=0.7, **FAST)


def test_other_budgets_come_first_and_the_rest_is_timed_only_where_that_is_too_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured_as([0.8], monkeypatch)
    timed = fxbasis.latency._timed
    monkeypatch.setattr(fxbasis.latency, "_timed", None)
    alone, both = (plan(shaped(), DATA[0], macs=0.6, **more, **FAST) for more in ({}, {"latency": 0.9}))
    assert both.layers == alone.layers
    assert (both.forecast["measured latency"], both.forecast["asked"]) == (0.8, {"macs": 0.6, "latency": 0.9})
    measured_as([1.3, 0.9, 0.9, 0.9, 0.9, 0.9], monkeypatch)
    monkeypatch.setattr(fxbasis.latency, "_timed", timed)
    slow = plan(shaped(), DATA[0], macs=0.6, latency=0.95, **FAST)
    assert slow.forecast["measured latency"] == 0.9
    assert slow.forecast["macs"] <= 0.6


def test_no_slower_model_is_returned_under_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    net = shaped()
    measured_as([0.8], monkeypatch)
    small = compress(net, DATA[0], macs=0.6, keep_if_slower=False, **FAST)
    assert plan_of(small).forecast["asked"] == {"macs": 0.6, "latency": 1.0}
    measured_as([1.2] * 6, monkeypatch)
    with pytest.raises(PlanError, match=r"macs=0.6 .* took 1.200 of .*; keep_if_slower=True .*time$"):
        compress(net, DATA[0], macs=0.6, keep_if_slower=False, **FAST)
    with pytest.raises(PlanError, match=r"^macs=0.01 cannot be reached: the least is 0\.[^;]*; [^;]*$"):
        compress(net, DATA[0], macs=0.01, keep_if_slower=False, **FAST)


def test_no_layer_is_chosen_that_is_slower_than_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    net, limit = shaped(), {"keep_if_slower": False, **FAST}
    free = plan(net, DATA[0], macs=0.6, **FAST).compressed
    slow = free[0]
    measured_as([0.8, 0.8], monkeypatch)
    shape, told = fxbasis.latency, fxbasis.latency.layer_ms

    def layer_ms(record: Any, form: str, ranks: Any, threads: int) -> float:
        grown = form == slow.form and ranks >= slow.ranks and record.name == slow.name
        return told(record, form, ranks, threads) * (100 if grown else 1)

    monkeypatch.setattr(shape, "layer_ms", layer_ms)
    for asked in ({"macs": 0.6}, {"max_drop": plan(net, DATA[0], macs=0.6, **FAST).forecast["change"]}):
        found = plan_of(compress(net, DATA[0], **asked, **limit))
        chosen = {layer.name: layer.ranks for layer in found.compressed if layer.form == slow.form}
        assert chosen.get(slow.name, (0,)) < slow.ranks
        assert found.forecast["asked"] == {**asked, "latency": 1.0}


def test_a_largest_change_takes_the_fastest_where_the_least_work_is_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, drop = shaped(), plan(shaped(), DATA[0], macs=0.7, **FAST).forecast["change"]
    measured_as([1.2, 0.9], monkeypatch)
    found = plan_of(compress(net, DATA[0], max_drop=drop, keep_if_slower=False, **FAST)).forecast
    assert (found["measured latency"], found["objective"]) == (0.9, "latency")
    assert found["change"] <= drop
    measured_as([1.2, 1.1], monkeypatch)
    with pytest.raises(PlanError, match=r"max_drop=.* took 1.200 of the time; .* the fastest took 1.100"):
        compress(net, DATA[0], max_drop=drop, keep_if_slower=False, **FAST)


def test_a_budget_of_time_and_scores_without_comparable_outputs() -> None:
    net = shaped()
    with pytest.raises(InputError, match="needs calibration"):
        plan(net, DATA[0], macs=0.5, estimator="measured")
    found = plan(net, DATA[0], macs=0.6, evaluate=lambda model: 1.0, forms=["gauge"])
    assert (found.forecast["unit"], found.forecast["estimator"]) == ("of the score", "evaluate")
    with pytest.raises(FxBasisError, match="not computed for want of time"):
        plan(net, DATA[0], macs=0.6, estimator="measured", minutes=0, **FAST)
