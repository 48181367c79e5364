"""compress(keep_if_slower=False): what stays dense and what is warned of, under times that are given."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import fxbasis
import fxbasis.timing
from fxbasis import ExportError, FxBasisWarning, Plan, PlanError, compress, plan_of
from fxbasis.errors import LayerError
from fxbasis.passes.records import ConvRecord

EXAMPLE = torch.zeros(2, 16, 8, 8)
Asked = list[tuple[str, str, tuple[int, ...], int]]


def net() -> nn.Module:
    torch.manual_seed(0)
    convs = OrderedDict(a=nn.Conv2d(16, 64, 3), b=nn.Conv2d(64, 64, 3), c=nn.Conv2d(64, 96, 1))
    return nn.Sequential(convs).eval()


@pytest.fixture
def asked() -> Asked:
    return []


def give(monkeypatch: pytest.MonkeyPatch, asked: Asked, times: dict[tuple[str, int], float]) -> None:
    """Times by layer and first rank; half of dense for all others."""

    def time_ratio(record: ConvRecord, form: str, ranks: Any, threads: int) -> float:
        asked.append((record.name, form, ranks, threads))
        return times.get((record.name, ranks[0]), 0.5)

    monkeypatch.setattr(fxbasis.timing, "time_ratio", time_ratio)


def test_nothing_is_timed_by_default(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    give(monkeypatch, asked, {("b", 32): 9.0})
    assert [layer.rank for layer in plan_of(compress(net(), EXAMPLE, size=0.5, layers="1-2"))] == [32, 32, 0]
    assert asked == []


def test_slower_layers_stay_dense_with_the_measured_ratio(
    monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    give(monkeypatch, asked, {("b", 32): 1.312, ("a", 32): 1.004})
    with pytest.warns(FxBasisWarning, match=r"conv 2 \(b\).* rank 32 .* dense; keep_if_slower=True") as found:
        small = compress(net(), EXAMPLE, layers=[1, 2], size=32, keep_if_slower=False, threads=2)
    assert len(found) == 1
    assert found[0].filename == __file__
    first, second, third = plan_of(small)
    assert (first.rank, first.reason) == (32, "")  # what prints as 1.00 is not slower
    assert (second.form, second.ranks, second.method) == ("dense", (), "")
    assert second.reason == "measured 1.31 times dense in ONNX Runtime, 2 threads"
    assert third.reason == "not selected"
    assert {(name, threads) for name, *_, threads in asked} == {("a", 2), ("b", 2)}
    assert Plan.from_dict(plan_of(small).to_dict()) == plan_of(small)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            {33: 0.83, 32: 0.6},
            r"rank 33 .* lies just above a step: it measured 0.83 .*; pass rank 32, .* 0.60",
        ),
        ({33: 0.83, 32: 0.78}, ""),  # the MACs are 0.97 too
        ({47: 0.9, 32: 0.62}, ""),  # 15 ranks for their share
        (
            {47: 1.2, 32: 0.9},
            r"rank 47 .* measured 1.20 .* so it stays dense; pass rank 32, which measured 0.90",
        ),
        ({48: 0.9, 32: 0.1}, ""),  # a multiple of 16 itself
        ({15: 0.9}, ""),  # there is no block below
    ],
    ids=["above", "share", "far above", "slower", "multiple", "first block"],
)
def test_a_rank_just_above_a_step_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, asked: Asked, times: dict[int, float], message: str
) -> None:
    give(monkeypatch, asked, {("b", rank): time for rank, time in times.items()})
    rank = next(iter(times))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        small = compress(net(), EXAMPLE, layers=2, size=rank, keep_if_slower=False)
    texts = [str(warning.message) for warning in found if "(b)" in str(warning.message)]
    assert len(texts) == bool(message)
    if message:
        assert re.search(message, texts[0])
    assert plan_of(small).layers[1].rank == (0 if "dense" in message else rank)


def test_a_block_is_one_of_each_group(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    give(monkeypatch, asked, {("0", 34): 0.9})
    grouped = nn.Sequential(nn.Conv2d(64, 64, 3, groups=2))
    with pytest.warns(FxBasisWarning, match="pass rank 32, which measured 0.50"):
        compress(grouped, torch.zeros(1, 64, 8, 8), layers=1, size=34, keep_if_slower=False)
    assert [ranks for _, _, ranks, _ in asked] == [(34,), (32,)]


def test_the_weight_form_is_not_timed(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    give(monkeypatch, asked, {})
    compress(net(), EXAMPLE, layers=2, size=8, form="weight", keep_if_slower=False)
    assert asked == []


def test_a_plan_is_judged_too_and_nothing_may_be_left(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    plan = plan_of(compress(net(), EXAMPLE, layers=2, size=8))
    give(monkeypatch, asked, {("b", 8): 2.0})
    with (
        pytest.warns(FxBasisWarning, match="nothing is compressed: measured 2.00 times"),
        pytest.warns(FxBasisWarning, match="so it stays dense"),
    ):
        small = compress(net(), EXAMPLE, plan=plan, keep_if_slower=False)
    assert plan_of(small).compressed == ()
    with pytest.raises(PlanError, match="the plan has 3 convolutions"):
        compress(nn.Conv2d(16, 4, 3), EXAMPLE, plan=plan, keep_if_slower=False)


def test_a_weight_that_is_not_finite_is_refused_before_the_timing(
    monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    give(monkeypatch, asked, {})
    broken = net()
    broken.get_submodule("b").weight.data.fill_(float("nan"))
    with pytest.raises(LayerError, match=r"conv 2 \(b\).*NaN"):
        compress(broken, EXAMPLE, layers=2, size=8, keep_if_slower=False)
    assert asked == []


def test_threads_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ExportError, match="threads=0 cannot be measured; pass a whole number"):
        compress(net(), EXAMPLE, layers=2, size=8, keep_if_slower=False, threads=0)
