"""What planning and fitting are given by mistake: an error that names it, and nothing is changed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxbasis import (
    FxBasisError,
    InputError,
    PlanError,
    SelectionError,
    UsageError,
    compress,
    load,
    pareto,
    plan,
    plan_of,
    recalibrate_batchnorm_,
    sensitivities,
)
from fxbasis.calibration_data import batches_of
from fxbasis.images import Preparation, images_in

BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
X = BATCHES[0][:1]
GAUGE: dict[str, Any] = {"forms": ["gauge"]}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten()
    ).eval()


class Breaks:
    def __iter__(self) -> Iterator[Tensor]:
        yield from BATCHES[:2]
        raise RuntimeError("disk gone")


DATA = [
    (Breaks(), r"batch 3 of the calibration data cannot be read \(RuntimeError: disk gone\); repair it"),
    ([BATCHES[0], BATCHES[1][:0]], "batch 2 of the calibration data has no sample; leave it out"),
    ([BATCHES[0].double()], r"failed on batch 1 of the calibration data \(\(4, .*; pass inputs in float32"),
    (
        [*BATCHES[:2], BATCHES[2][:, :1]],
        r"failed on batch 3 of the calibration data \(\(4, 1.*; pass inputs of",
    ),
]


@pytest.mark.parametrize(("data", "message"), DATA, ids=["breaks", "empty", "dtype", "channels"])
def test_a_batch_that_is_none_is_named(data: Any, message: str) -> None:
    model = net()
    with pytest.raises(InputError, match=message):
        plan(model, X, macs=0.7, calibration=data, **GAUGE)
    with pytest.raises(InputError, match=message):
        sensitivities(model, X, calibration=data, estimator="measured", **GAUGE)
    before = model[1].running_mean.clone()
    with pytest.raises(InputError, match=message):
        recalibrate_batchnorm_(model, data)
    assert torch.equal(model[1].running_mean, before)


def test_statistics_that_are_not_finite_are_put_back() -> None:
    model, spoiled = net(), BATCHES[0].clone()
    spoiled[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"^1: its new statistics are NaN or infinite; take such inputs out"):
        recalibrate_batchnorm_(model, [spoiled])
    assert bool(model[1].running_mean.isfinite().all())


ARGUMENTS = [
    ({"multiple": 0}, "multiple=0 is no whole number from 1"),
    ({"multiple": 2.5}, "multiple=2.5 is no whole number"),
    ({"multiple": True}, "multiple=True is no whole number"),
    ({"forms": 5}, "forms=5 is no list of forms"),
    ({"forms": ["gauge", ["cp"]]}, r"the form \['cp'\] cannot be planned; choose of"),
    ({"layers": lambda record: 1 / 0}, "the function raised ZeroDivisionError: .*; it takes a ConvRecord"),
    ({"latency": 0.9, "threads": "4"}, "threads='4' cannot be measured; pass a whole number"),
    ({"statistics": 5}, "statistics=5 is no path"),
]


@pytest.mark.parametrize(("wrong", "message"), ARGUMENTS)
def test_arguments_that_mean_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(FxBasisError, match=message):
        plan(net(), X, **{"macs": 0.7, "calibration": BATCHES, **GAUGE, **wrong})


@pytest.mark.parametrize("verb", [sensitivities, pareto])
@pytest.mark.parametrize(
    ("given", "name"), [({}, "weight"), ({"calibration": BATCHES}, "fisher")], ids=["weight", "fisher"]
)
@pytest.mark.parametrize("what", [{"path": "points.jsonl"}, {"minutes": 1}, {"executor": "pool"}], ids=str)
def test_what_an_estimator_does_not_use_is_refused(
    verb: Callable[..., Any], given: dict[str, Any], name: str, what: dict[str, Any]
) -> None:
    with pytest.raises(
        SelectionError,
        match=rf"{next(iter(what))}=.* is for the estimators measured and evaluate, this one is {name}; ",
    ):
        verb(net(), X, **given, **what, **GAUGE)


@pytest.mark.parametrize(("path", "message"), [("none/points", "none is no folder"), (5, "5 is no path")])
def test_a_file_of_points_that_cannot_be_written_is_refused_before_the_work(path: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sensitivities(net(), X, evaluate=lambda model: pytest.fail("it ran"), path=path, **GAUGE)


def test_data_that_are_drawn_leave_the_random_state_and_are_the_same_each_time() -> None:
    data = DataLoader(TensorDataset(torch.cat(BATCHES)), 3, shuffle=True)
    state = torch.get_rng_state()
    seen = [torch.cat(list(batches_of(data))) for _ in range(2)]  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], torch.cat(BATCHES))
    assert torch.equal(seen[0].flatten().sort().values, torch.cat(BATCHES).flatten().sort().values)


@pytest.mark.parametrize("minutes", ["4", float("nan"), -1])
def test_a_time_that_is_none_is_refused(minutes: Any) -> None:
    with pytest.raises(InputError, match=r"minutes=.* is no time; pass a number from 0"):
        sensitivities(net(), X, evaluate=lambda model: 0.0, minutes=minutes, **GAUGE)


def test_forms_may_come_one_by_one() -> None:
    assert len(sensitivities(net(), X, forms=iter(["gauge"]))) == len(sensitivities(net(), X, **GAUGE)) > 0


@pytest.mark.parametrize("rule", [{"size": 4}, {"size": 0.25}, {"macs_ratio": 0.5}, {"energy": 0.5}])
def test_a_rank_and_a_budget_contradict_each_other(rule: dict[str, Any]) -> None:
    with pytest.raises(SelectionError, match="= and a budget both say the ranks; pass one of them"):
        compress(net(), X, macs=0.7, **rule)


def test_an_example_without_samples_plans_nothing() -> None:
    with pytest.raises(InputError, match=r"an example input is empty .*; pass a batch of at least one"):
        plan(net(), X[:0], macs=0.7, **GAUGE)


@pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")
def test_outputs_without_a_change_are_refused_before_the_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxbasis.planning.fitted_for", lambda *_: pytest.fail("it fitted"))
    with pytest.raises(InputError, match=r"pass evaluate=.*, or a plan of fxbasis.plan\("):
        compress(GivesDicts(*net()), X, macs=0.7, calibration=BATCHES)


class GivesDicts(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return [{"boxes": row} for row in super().forward(x)]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_names_the_point(score: float) -> None:
    with pytest.raises(
        FxBasisError, match=rf"the model itself.*: evaluate gave {score} for the model itself; let"
    ):
        sensitivities(net(), X, evaluate=lambda model: score, **GAUGE)


def test_points_and_budgets_of_a_front_are_checked() -> None:
    front = pareto(net(), X, **GAUGE)
    with pytest.raises(PlanError, match="point 1000000 is not on the front; pass a number from 0"):
        front.plan(10**6)
    with pytest.raises(SelectionError, match=r"macs=2 is no fraction in \(0, 1\]"):
        front.within({"macs": 2})


@pytest.mark.parametrize(
    ("key", "value"), [("asked", 5), ("change", None), ("asked", {"macs": None}), ("macs", "x")]
)
def test_a_damaged_entry_of_a_forecast_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    found = plan(net(), X, macs=0.7, calibration=BATCHES, **GAUGE).to_dict()
    (tmp_path / "plan.json").write_text(json.dumps({**found, "forecast": {**found["forecast"], key: value}}))
    with pytest.raises(PlanError, match=r"plan.json: its forecast is damaged .*; make the plan again"):
        compress(net(), X, plan=tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps(found))
    assert "Planned for MACs" in str(plan_of(compress(net(), X, plan=tmp_path / "plan.json")))


@pytest.mark.parametrize("forecast", [[1], "soon", [["macs", 0.5]]], ids=str)
def test_a_forecast_that_is_no_dict_is_refused(tmp_path: Path, forecast: Any) -> None:
    content = plan_of(compress(net(), X)).to_dict() | {"forecast": forecast}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    for use in (lambda: load(net(), tmp_path), lambda: compress(net(), X, plan=tmp_path / "plan.json")):
        with pytest.raises(
            PlanError, match=r"plan.json: its forecast is damaged .* is no dict\); make the plan"
        ):
            use()


def spoiled(tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    tensors["0:moment"][0, 0, 0] += 1


def shortened(tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    about["counts"] = "{}"


def emptied(tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    about.pop("counts")


@pytest.mark.parametrize("damage", [spoiled, shortened, emptied])
def test_a_damaged_file_of_statistics_is_not_used(tmp_path: Path, damage: Callable[..., None]) -> None:
    path = tmp_path / "sums.safetensors"
    how = {"macs": 0.7, "calibration": BATCHES, "statistics": path, **GAUGE}
    first = plan(net(), X, **how)
    assert plan(net(), X, **how) == first
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = dict(file.metadata())
    damage(tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(
        InputError, match=r"sums.safetensors is damaged: its sums are not what was written; remove"
    ):
        plan(net(), X, **how)


def test_a_folder_that_is_called_like_an_image_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "folder.png" / "a.png")
    assert len(images_in(tmp_path, (3, 8, 8), Preparation())[0]) == 1
