"""What ``sensitivities`` tells of a model, by every estimator; and that it leaves the model alone."""

import csv
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FunctionalNet, PlainNet, build
from scipy.stats import spearmanr
from torch import nn

from fxbasis import (
    FxBasisError,
    InputError,
    LayerError,
    SelectionError,
    compress,
    profile,
    sensitivities,
)
from fxbasis.demo.digits import load_digits_split
from fxbasis.demo.network import digits_resnet
from fxbasis.proposals import PROPOSED
from fxbasis.sensitivities import ESTIMATORS

DATA = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
FAST: dict[str, Any] = {"forms": ["gauge"], "calibration": DATA}
CALLS: list[nn.Module] = []


def counted(model: nn.Module) -> float:
    """A score that notes that it was asked for."""
    CALLS.append(model)
    return -float(sum(parameter.numel() for parameter in model.parameters()))


def training(model: nn.Module) -> float:
    """A score that changes what it is given, and draws random numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        return float(sum(parameter.sum() for parameter in model.parameters()))


class Tanh(PlainNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(torch.tanh(self.bn(self.conv1(x))))


def changes(**settings: Any) -> list[float]:
    net = build("plain")
    return [row.change for row in sensitivities(net, net.example, **{**FAST, **settings})]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_has_a_finite_change_for_each_row(estimator: str) -> None:
    net = build("plain")
    evaluate = counted if estimator == "evaluate" else None
    table = sensitivities(net, net.example, estimator=estimator, evaluate=evaluate, **FAST)
    assert table.estimator == estimator
    assert {row.layer.name for row in table} == {"conv1", "conv2"}
    assert all(torch.tensor([row.change, row.error]).isfinite().all() for row in table)
    assert all(0 < row.macs_ratio < 1 for row in table)
    assert table.unit in str(table)


@pytest.mark.parametrize("estimator", ["fisher", "kfac", "output", "weight", "measured"])
def test_a_larger_rank_changes_less_and_something(estimator: str) -> None:
    net = build("plain")
    table = sensitivities(net, net.example, estimator=estimator, layers="conv2", **FAST)
    found = {row.layer.rank: row.change for row in table}
    assert found[min(found)] > found[max(found)] > 0


def test_a_first_look_rules_out_forms_of_all_that_stand_by_default() -> None:
    net, given = build("plain"), {"calibration": DATA, "estimator": "kfac"}
    table = sensitivities(net, net.example, **given)
    whole = sensitivities(net, net.example, forms=PROPOSED, **given)
    assert whole.ruled_out == {}
    assert set(PROPOSED) == {row.layer.form for row in whole}
    for name in ("conv1", "conv2"):
        kept = {row.layer.form for row in table if row.layer.name == name}
        assert kept
        assert kept.isdisjoint(table.ruled_out[name])
        assert kept | {*table.ruled_out[name]} == {r.layer.form for r in whole if r.layer.name == name}
        looked = [row for row in whole if row.layer.name == name]
        nearest = {f: min(_of(looked, f), key=lambda r: abs(r.macs_ratio - 0.3)) for f in PROPOSED}
        scores = {form: row.change * row.macs_ratio**2 for form, row in nearest.items()}
        first, second = sorted(scores.keys() - {"output"}, key=lambda form: scores[form])[:2]
        close = [second] if scores[second] <= 2 * scores[first] else []
        assert kept == {"gauge", "output", "spatial", first, *close}
    assert [row for row in whole if row.layer.form not in table.ruled_out[row.layer.name]] == [*table]
    assert "ruled out at a first look: " in str(table)
    assert table.to_dict()["ruled_out"]["conv2"] == list(table.ruled_out["conv2"])


def _of(rows: list[Any], form: str) -> list[Any]:
    return [row for row in rows if row.layer.form == form]


def test_the_model_stays_as_it_was() -> None:
    net = build("plain").train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    before = torch.get_rng_state()
    for estimator in ("fisher", "measured"):
        sensitivities(net, net.example, estimator=estimator, **FAST)
    sensitivities(net, net.example, evaluate=training, forms=["gauge"])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_fisher_ranks_as_measured() -> None:
    model, digits = digits_resnet(), load_digits_split()
    data = list(digits.train_images[:256].split(128))
    both = [
        sensitivities(model, data[0][:1], calibration=data, forms=["gauge"], estimator=estimator)
        for estimator in ("fisher", "measured")
    ]
    predicted, measured = ([row.change for row in table] for table in both)
    assert spearmanr(predicted, measured).statistic >= 0.9
    ratios = sorted(b / a for a, b in zip(predicted, measured, strict=True) if b < 0.1)
    assert 0.5 < ratios[len(ratios) // 2] < 2  # both with the mean outputs that compress gives


def test_costs_are_those_of_the_built_model() -> None:
    net = build("shared")  # whose conv is called at two sizes
    for row in sensitivities(net, net.example, **FAST):
        name = row.layer.name
        small = compress(net, net.example, layers={name: {"size": row.layer.rank, "form": "gauge"}})
        (found,) = [layer for layer in profile(small, net.example).convs if layer.name == name]
        assert (found.macs, found.params) == (row.macs, row.params)


def test_labels_and_batch_forms_do_not_matter() -> None:
    plain = changes()
    assert changes(calibration=[(batch, torch.arange(4)) for batch in DATA]) == plain
    assert changes(calibration=[[batch, {"any": "thing"}] for batch in DATA]) == plain
    assert changes(calibration=[{"x": batch} for batch in DATA]) == plain


def test_a_score_sees_a_copy_and_a_fixed_seed() -> None:
    first = changes(evaluate=training, calibration=None)
    torch.manual_seed(5)
    assert changes(evaluate=training, calibration=None) == first
    assert any(first)


@pytest.mark.parametrize("settings", [{"estimator": "measured"}, {"evaluate": counted, "calibration": None}])
def test_measured_points_are_resumed(settings: dict[str, Any], tmp_path: Path) -> None:
    CALLS.clear()
    path = tmp_path / "points.jsonl"
    first = changes(path=path, **settings)
    lines, calls = path.read_text().splitlines(), len(CALLS)
    assert len(lines) >= len(first)
    assert changes(path=path, minutes=0, **settings) == first
    assert path.read_text().splitlines() == lines
    assert len(CALLS) == calls


def test_another_model_data_or_score_does_not_reuse_points(tmp_path: Path) -> None:
    path, how = tmp_path / "points.jsonl", {"estimator": "measured", "minutes": 0, "forms": ["gauge"]}
    changes(path=path, estimator="measured")
    net, tanh = build("plain"), Tanh().eval()
    tanh.load_state_dict(net.state_dict())
    assert sensitivities(net, net.example, calibration=DATA[::-1], path=path, **how).missing
    assert sensitivities(tanh, net.example, calibration=DATA, path=path, **how).missing
    with torch.no_grad():
        net.bn.running_mean += 1
    assert sensitivities(net, net.example, calibration=DATA, path=path, **how).missing
    changes(path=path, evaluate=counted)
    assert not changes(path=path, evaluate=training, minutes=0)
    assert changes(path=path, evaluate=counted, minutes=0)


def test_a_score_can_be_any_callable() -> None:
    assert any(changes(evaluate=functools.partial(counted)))
    assert any(changes(evaluate=lambda model: counted(model)))


def test_executors_give_the_same_numbers() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as processes:
        for settings in ({"estimator": "measured"}, {"evaluate": training}):
            alone = changes(layers="conv2", **settings)
            assert changes(layers="conv2", executor=processes, **settings) == alone


def test_points_of_threads_take_turns() -> None:
    inside: list[nn.Module] = []
    together: set[int] = set()

    def score(model: nn.Module) -> float:
        inside.append(model)
        time.sleep(0.05)  # for the other thread
        together.add(len(inside))
        inside.remove(model)
        return training(model)

    with ThreadPoolExecutor(2) as threads:
        found = changes(layers="conv2", executor=threads, evaluate=score)
    assert together == {1}
    assert found == changes(layers="conv2", evaluate=training)


def test_dask_gives_the_same_numbers() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = changes(layers="conv2", estimator="measured", executor=client.get_executor())
    assert found == changes(layers="conv2", estimator="measured")


def test_without_time_all_is_missing() -> None:
    net = build("plain")
    table = sensitivities(net, net.example, estimator="measured", minutes=0, **FAST)
    assert not len(table)
    assert table.missing > 0
    assert f"{table.missing} were not computed" in str(table)


def test_one_image_is_enough() -> None:
    for estimator in ("fisher", "measured"):
        assert all(change == change for change in changes(calibration=[DATA[0][:1]], estimator=estimator))


def test_layers_forms_and_multiple_choose_the_rows() -> None:
    net = build("plain")
    table = sensitivities(net, net.example, calibration=DATA, layers=[2], forms=["cp", "output"], multiple=2)
    assert {row.layer.name for row in table} == {"conv2"}
    assert {row.layer.form for row in table} == {"cp", "output"}
    assert all(rank % 2 == 0 for row in table for rank in row.layer.ranks)
    assert table.left_out == {"conv1": "not asked for"}


def test_what_is_left_out_has_its_reason() -> None:
    net = build("depthwise")
    net.idle = nn.Conv2d(3, 8, 3)
    left = sensitivities(net, net.example, **FAST).left_out
    assert list(left) == ["depthwise", "idle"]
    assert "depthwise" in left["depthwise"]
    assert "not called" in left["idle"]


def test_a_kernel_of_one_tap_is_gauge_instead_of_cp() -> None:
    net = build("depthwise")
    table = sensitivities(net, net.example, calibration=DATA, forms=["cp"])
    assert {row.layer.form for row in table} == {"gauge"}


def test_functional_convolutions_have_no_rows_and_do_no_harm() -> None:
    net = FunctionalNet().eval()
    assert {row.layer.name for row in sensitivities(net, net.example, **FAST)} == {"conv"}


def test_the_table_is_a_file(tmp_path: Path) -> None:
    net = build("plain")
    table = sensitivities(net, net.example, **FAST)
    table.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["change"]) for row in rows] == [row.change for row in table]
    assert table.to_dict()["rows"][0]["form"] == "gauge"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"calibration": (batch for batch in DATA)}, InputError, "read only once; pass a list"),
        ({"calibration": []}, InputError, "no batch; pass at least one"),
        ({"calibration": DATA[0]}, InputError, "pass a list of batches"),
        (
            {"calibration": [torch.zeros(1, 2, 8, 8)]},
            InputError,
            r"\(1, 2, 8, 8\).*; pass inputs of the shape",
        ),
        ({"calibration": [torch.full((1, 3, 8, 8), torch.nan)]}, InputError, "NaN or infinite; repair"),
        ({"calibration": None, "estimator": "fisher"}, InputError, "needs calibration=, some batches"),
        ({"estimator": "evaluate"}, InputError, "needs evaluate=, a function"),
        ({"estimator": "guess"}, SelectionError, "choose one of fisher"),
        ({"forms": "gauge"}, SelectionError, "pass for example forms="),
        ({"forms": []}, SelectionError, "pass for example forms="),
        ({"forms": ["weight"]}, SelectionError, "cannot be planned; choose of output"),
        ({"layers": "conv9"}, SelectionError, "close matches: conv"),
        ({"layers": {"conv1": {"size": 2}}}, SelectionError, "pass a list of layers"),
    ],
)
def test_mistakes_end_with_the_remedy(settings: Any, error: type[FxBasisError], message: str) -> None:
    with pytest.raises(error, match=message):
        changes(**settings)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    net = PlainNet().eval()
    with torch.no_grad():
        net.conv2.weight[0] = torch.nan
    with pytest.raises(LayerError, match="repair them"):
        sensitivities(net, net.example, **FAST)


def test_outputs_that_cannot_be_compared_leave_two_ways() -> None:
    class Text(PlainNet):
        def forward(self, x: torch.Tensor) -> Any:
            super().forward(x)
            return "text"

    net = Text().eval()
    with pytest.raises(InputError, match=r'pass evaluate=.*, estimator="output"'):
        sensitivities(net, net.example, **FAST)
    assert len(sensitivities(net, net.example, estimator="output", **FAST))


def test_a_failing_score_is_named() -> None:
    def broken(model: nn.Module) -> float:
        raise ValueError("no labels")

    with ThreadPoolExecutor(2) as threads, pytest.raises(FxBasisError, match="no labels; mend it"):
        changes(evaluate=broken, executor=threads)
