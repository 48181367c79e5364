"""The grammar of ``layers=`` and ``size=``: what is chosen, at which rank, and what is refused."""

import math
import re
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fxbasis import (
    ConvTable,
    FxBasisError,
    FxBasisWarning,
    LayerError,
    LayerPlan,
    Plan,
    SelectionError,
    compress,
    number_convs,
    plan_of,
)
from fxbasis.passes.ranking import ranks_by_size
from fxbasis.passes.selection import select

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """1 stem, 2 a.conv1, 3 a.conv2, 4 a.depthwise, 5 a.down (no gain at half size), 6 head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.a = nn.Module()
        self.a.conv1 = nn.Conv2d(16, 16, 3)
        self.a.conv2 = nn.Conv2d(16, 16, 3, groups=2)
        self.a.depthwise = nn.Conv2d(16, 16, 1, groups=16)
        self.a.down = nn.Conv2d(16, 32, 1)
        self.head = nn.Conv2d(32, 10, 1)


NAMES = ["stem", "a.conv1", "a.conv2", "a.depthwise", "a.down", "head"]


@pytest.fixture(scope="module")
def table() -> ConvTable:
    return number_convs(Net())


def quietly(*args: Any, **kwargs: Any) -> tuple[Plan, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = select(*args, **kwargs)
    return plan, [str(entry.message) for entry in caught if entry.category is FxBasisWarning]


def chosen(plan: Plan) -> list[int]:
    return [layer.number for layer in plan.compressed]


def ranks(plan: Plan) -> dict[int, int]:
    return {layer.number: layer.rank for layer in plan.compressed}


def only_convs(record: Any) -> bool:
    return record.kernel_size == (3, 3)


SELECTORS: dict[str, tuple[Any, list[int]]] = {
    "a number": (1, [1]),
    "a numpy number": (np.int64(3), [3]),
    "the last number": (6, [6]),
    "numbers": ([1, 3], [1, 3]),
    "a tuple": ((3, 1), [1, 3]),
    "a set": ({2, 6}, [2, 6]),
    "a range object": (range(1, 4), [1, 2, 3]),
    "a generator": ((i for i in (1, 2)), [1, 2]),
    "a name": ("a.conv2", [3]),
    "names": (["stem", "head"], [1, 6]),
    "digits": ("3", [3]),
    "a range": ("1-3", [1, 2, 3]),
    "a range of one": ("2-2", [2]),
    "ranges, numbers and names": ("1-2,a.down,6", [1, 2, 5, 6]),
    "spaces": (" 1 , 3 ", [1, 3]),
    "twice the same": ("1,1-2,stem", [1, 2]),
    "a list of strings": (["1-2", "head"], [1, 2, 6]),
    "a pattern": (r"re:a\.conv\d", [2, 3]),
    "a pattern for all": ("re:.*", [1, 2, 3, 5, 6]),
    "a pattern matches whole names": ("re:.*conv1", [2]),
    "a function": (only_convs, [1, 2, 3]),
    "a list of a pattern and a number": ([r"re:a\.conv1", 6], [2, 6]),
    "all": ("all", [1, 2, 3, 6]),
}


@pytest.mark.parametrize("key", SELECTORS)
def test_selects(table: ConvTable, key: str) -> None:
    selector, expected = SELECTORS[key]
    plan, _ = quietly(table, selector, size=0.5)
    assert chosen(plan) == expected
    assert [layer.name for layer in plan] == NAMES
    assert [layer.number for layer in plan] == [1, 2, 3, 4, 5, 6]


UNKNOWN: dict[str, tuple[Any, str]] = {
    "index 0": (0, "conv 0 does not exist: the numbers of this model run from 1 to 6; see"),
    "past the end": (7, "conv 7 does not exist.*from 1 to 6"),
    "negative": (-1, "conv -1 does not exist"),
    "index 0 as text": ("0", "conv 0 does not exist"),
    "negative as text": ("-3", "conv -3 does not exist"),
    "range past the end": ("5-9", "conv 9 does not exist"),
    "range from 0": ("0-2", "conv 0 does not exist"),
    "range backwards": ("5-2", "runs backwards; write 2-5"),
    "a typing mistake": (
        "a.conv3",
        r"layers='a\.conv3': no convolution.*close matches: a\.conv[12], a\.conv[12]",
    ),
    "a mistake in a list": ("1,haed", "layers='haed'.*close matches: head"),
    "nothing near": ("zzz", r"no convolution has this name; see number_convs\(model\)"),
    "a parent's name": ("a", "no convolution has this name"),
    "pattern of nothing": ("re:layer9.*", "matches no whole name"),
    "pattern of a part of a name": ("re:conv1", "matches no whole name.*close matches: a.conv1"),
    "pattern of a beginning": (r"re:a\.conv", "matches no whole name.*close matches: a.conv"),
    "broken pattern": ("re:(", r"layers='re:\('.*write a Python regular expression"),
    "function of nothing": (lambda record: False, "true for no convolution; see"),
    "empty text": ("", "the selection is empty; use"),
    "blank text": ("  ", "the selection is empty; use"),
    "only commas": (",", "no convolution has this name"),
    "empty list": ([], "the selection is empty; see"),
    "empty tuple": ((), "the selection is empty; see"),
    "empty dict": ({}, "selects nothing; use"),
    "None": (None, "is no selector; pass"),
    "True": (True, "is no selector; pass"),
    "a fraction": (0.5, "is no selector; pass"),
    "one unknown among known": (["stem", "haed"], "close matches: head"),
    "unknown in a dict": ({"stem": {"size": 2}, "haed": None}, "close matches: head"),
    "None for a pattern of nothing": ({"all": {}, "re:x": None}, "matches no whole name"),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_selector_that_matches_nothing_is_refused(table: ConvTable, key: str) -> None:
    selector, message = UNKNOWN[key]
    with pytest.raises(SelectionError, match=message):
        select(table, selector)


SIZES: dict[str, tuple[Any, dict[int, int]]] = {
    "a count": (5, {1: 5, 2: 5}),
    "one": (1, {1: 1, 2: 1}),
    "a half": (0.5, {1: 8, 2: 8}),
    "a tiny fraction gives one": (1e-9, {1: 1, 2: 1}),
    "a fraction is rounded": (0.28, {1: 4, 2: 4}),
    "everything": (1.0, {1: 16, 2: 16}),
    "a numpy fraction": (np.float32(0.25), {1: 4, 2: 4}),
    "a numpy count": (np.int64(4), {1: 4, 2: 4}),
    "the largest count": (16, {1: 16, 2: 16}),
}


@pytest.mark.parametrize("key", SIZES)
def test_size_is_a_count_or_a_fraction_of_the_filters(table: ConvTable, key: str) -> None:
    size, expected = SIZES[key]
    plan, _ = quietly(table, [1, 2], size=size)
    assert ranks(plan) == expected


@pytest.mark.parametrize("size", [i / 40 for i in range(1, 41)])
def test_fraction_is_rounded_from_out_channels_and_capped(table: ConvTable, size: float) -> None:
    stem, *_, down, head = table
    assert ranks_by_size(stem, size)[0] == max(1, round(size * 16))
    assert ranks_by_size(down, size)[0] == min(16, max(1, round(size * 32)))
    assert ranks_by_size(head, size)[0] == max(1, round(size * 10))


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 2), (3, 4), (0.5, 8), (1.0, 16), (0.01, 2), (16, 16), (0.3, 4)]
)
def test_grouped_layer_has_the_same_rank_in_each_group(table: ConvTable, size: Any, expected: int) -> None:
    assert ranks_by_size(table[2], size)[0] == expected


BAD_SIZES = [0, -3, 1.5, -0.5, 0.0, "half", "0.5", True, False, None, math.nan, math.inf, [2], 2 + 0j]


@pytest.mark.parametrize("size", BAD_SIZES, ids=repr)
@pytest.mark.parametrize("where", ["argument", "rule"])
def test_meaningless_size_is_refused(table: ConvTable, size: Any, where: str) -> None:
    layers, given = ("all", size) if where == "argument" else ({"all": {"size": size}}, 0.5)
    message = rf"size={re.escape(repr(size))} is neither .*; pass for example size=16 or size=0\.5"
    with pytest.raises(SelectionError, match=message):
        select(table, layers, size=given)


@pytest.mark.parametrize("selector", [6, "head", "6", [6], {"head": {"size": 11}}], ids=repr)
def test_rank_above_the_cap_is_refused_when_asked_for_by_number_or_name(
    table: ConvTable, selector: Any
) -> None:
    message = r"conv 6 \(head\), weight \(10, 32, 1, 1\): rank 11 exceeds 10.*; pass size=10 or less"
    with pytest.raises(LayerError, match=message):
        select(table, selector, size=11)


def test_cap_is_the_fan_in_where_that_is_smaller(table: ConvTable) -> None:
    with pytest.raises(LayerError, match=r"conv 5 \(a\.down\).*rank 17 exceeds 16"):
        select(table, 5, size=17)


def test_rank_above_the_cap_is_capped_under_a_pattern(table: ConvTable) -> None:
    plan, _ = quietly(table, "re:.*", size=1000)
    assert ranks(plan) == {1: 16, 2: 16, 3: 16, 5: 16, 6: 10}


@pytest.mark.parametrize(
    "selector", [5, "a.down", "5", "re:a.down", lambda r: r.index == 5, ["all", 5], [5, "all"]]
)
def test_layer_that_does_not_gain_is_rewritten_with_a_warning_when_asked_for(
    table: ConvTable, selector: Any
) -> None:
    plan, messages = quietly(table, selector, size=0.5)
    assert ranks(plan)[5] == 16
    assert len(messages) == 1
    assert re.search(
        r"conv 5 \(a\.down\), weight \(32, 16, 1, 1\): rank 16 costs 1\.50 times .*asked for", messages[0]
    )


def test_layer_that_does_not_gain_is_left_alone_under_all(table: ConvTable) -> None:
    plan, messages = quietly(table, "all", size=0.5)
    assert messages == []
    down = plan.layers[4]
    assert not down.compressed
    assert re.search(r"rank 16 costs 1\.50 times its dense MACs \(break-even rank 10\.7\)", down.reason)


def test_layer_at_exactly_the_break_even_rank_is_left_alone_under_all() -> None:
    table = number_convs(nn.Sequential(nn.Conv2d(8, 8, 1)))
    assert table[0].shape.break_even_rank == 4.0
    assert chosen(quietly(table, "all", size=4)[0]) == []
    assert chosen(quietly(table, "all", size=3)[0]) == [1]


@pytest.mark.parametrize("selector", [4, "a.depthwise", "1-4", ["all", 4], [4, "re:.*"], {4: {}}], ids=repr)
def test_layer_that_cannot_be_rewritten_is_an_error_by_number_or_name(
    table: ConvTable, selector: Any
) -> None:
    message = r"conv 4 \(a\.depthwise\), weight .* cannot be rewritten: depthwise.*; leave it out of layers="
    with pytest.raises(LayerError, match=message):
        quietly(table, selector)


@pytest.mark.parametrize("selector", ["all", "re:.*", lambda r: True, {"all": {}}, {"re:.*": {}}])
def test_layer_that_cannot_be_rewritten_is_left_alone_with_its_reason_otherwise(
    table: ConvTable, selector: Any
) -> None:
    plan, _ = quietly(table, selector, size=2)
    assert not plan.layers[3].compressed
    assert "depthwise" in plan.layers[3].reason


def test_unselected_layers_say_so(table: ConvTable) -> None:
    plan, _ = quietly(table, [1], size=2)
    assert {layer.reason for layer in plan.layers[1:]} == {"not selected"}


RULES: dict[str, tuple[Any, dict[int, int]]] = {
    "settings for each": ({1: {"size": 2}, "a.conv1": {"size": 3}}, {1: 2, 2: 3}),
    "missing settings come from the arguments": ({1: {}, 2: {"size": 3}}, {1: 4, 2: 3}),
    "a later pattern beats an earlier one": (
        {"re:a.*": {"size": 2}, "re:a.conv1": {"size": 3}},
        {2: 3, 3: 2, 5: 2},
    ),
    "order decides, not length": ({"re:a.conv1": {"size": 3}, "re:a.*": {"size": 2}}, {2: 2, 3: 2, 5: 2}),
    "a name beats a later pattern": ({"a.conv1": {"size": 3}, "re:a.conv.*": {"size": 2}}, {2: 3, 3: 2}),
    "a number beats a later pattern": ({2: {"size": 3}, "re:a.conv.*": {"size": 2}}, {2: 3, 3: 2}),
    "a range beats a later pattern": (
        {"2-3": {"size": 6}, "re:.*": {"size": 2}},
        {1: 2, 2: 6, 3: 6, 5: 2, 6: 2},
    ),
    "a later name beats an earlier number": ({2: {"size": 3}, "a.conv1": {"size": 2}}, {2: 2}),
    "None leaves alone": ({"re:a.conv.*": {"size": 2}, "a.conv1": None}, {3: 2}),
    "None by name beats a later pattern": ({"a.conv1": None, "re:a.conv.*": {"size": 2}}, {3: 2}),
    "None by pattern is beaten by a name": ({"re:.*": None, "stem": {"size": 2}}, {1: 2}),
    "None by pattern is beaten by an earlier name": ({"stem": {"size": 2}, "re:.*": None}, {1: 2}),
    "None for one that cannot be rewritten": (
        {"re:.*": {"size": 2}, 4: None},
        {1: 2, 2: 2, 3: 2, 5: 2, 6: 2},
    ),
    "all but one": ({"all": {"size": 2}, "head": None}, {1: 2, 2: 2, 3: 2, 5: 2}),
    "a function as a rule": ({only_convs: {"size": 2}}, {1: 2, 2: 2, 3: 2}),
    "a tuple as a rule": ({("stem", "head"): {"size": 2}}, {1: 2, 6: 2}),
    "an OrderedDict": (OrderedDict([("re:a.conv.*", {"size": 2}), ("a.conv2", {"size": 4})]), {2: 2, 3: 4}),
}


@pytest.mark.parametrize("key", RULES)
def test_rules_of_a_dict(table: ConvTable, key: str) -> None:
    rules, expected = RULES[key]
    plan, _ = quietly(table, rules, size=4)
    assert ranks(plan) == expected


def test_method_of_a_rule(table: ConvTable) -> None:
    plan, _ = quietly(table, {1: {"method": "qr"}, 2: {}}, size=2, method="eigen")
    assert [layer.method for layer in plan.compressed] == ["qr", "eigen"]
    assert {layer.form for layer in plan.compressed} == {"output"}


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown form": ({"form": "banana"}, "form='banana' is not known; choose one of output, gauge"),
    "unknown method": (
        {"method": "pca"},
        "method='pca' is not known for the output form; choose",
    ),
    "unknown form in a rule": ({"layers": {1: {"form": "x"}}}, "form='x' is not known"),
    "unknown method in a rule": ({"layers": {1: {"method": 3}}}, "method=3 is not known"),
    "unknown setting": ({"layers": {1: {"rank": 3}}}, "not a dict of size, macs_ratio"),
    "a bare size as a rule": (
        {"layers": {1: 0.5}},
        "settings 0.5 are not a dict of size, macs_ratio",
    ),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_bad_settings_are_refused(table: ConvTable, key: str) -> None:
    arguments, message = SETTINGS[key]
    with pytest.raises(SelectionError, match=message):
        select(table, **arguments)


def test_bad_settings_are_refused_before_the_layers_are_looked_at() -> None:
    with pytest.raises(SelectionError, match="size=0"):
        compress(nn.Sequential(nn.Flatten()), X, size=0)


@pytest.fixture(scope="module")
def resnet_table() -> ConvTable:
    return number_convs(resnet18(weights=None))


def test_resnet18_downsamples_cost_one_and_a_half_times_at_half_size(resnet_table: ConvTable) -> None:
    plan, messages = quietly(resnet_table)
    assert messages == []
    dense = [layer for layer in plan if not layer.compressed]
    assert [layer.name for layer in dense] == [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
    assert all("costs 1.50 times its dense MACs" in layer.reason for layer in dense)


@pytest.mark.parametrize("selector", [8, "layer2.0.downsample.0", r"re:layer2\.0\.downsample\.0"])
def test_resnet18_downsample_is_rewritten_with_a_warning_when_asked_for(
    resnet_table: ConvTable, selector: Any
) -> None:
    plan, messages = quietly(resnet_table, selector)
    assert chosen(plan) == [8]
    assert "rank 64 costs 1.50 times its dense MACs (break-even rank 42.7)" in messages[0]


def test_papers_selection_by_pattern(resnet_table: ConvTable) -> None:
    plan, messages = quietly(resnet_table, r"re:layer3\..*\.conv\d", size=128)
    assert ranks(plan) == {11: 128, 12: 128, 14: 128, 15: 128}
    assert messages == []


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False))


def test_selection_reaches_the_model() -> None:
    small = compress(small_net(), X, layers={"re:0": {"size": 2, "method": "qr"}, 2: {"size": 0.25}})
    layers = [(layer.rank, layer.method) for layer in plan_of(small)]
    assert layers == [(2, "qr"), (4, "svd")]
    assert small.get_submodule("0.basis").weight.shape == (2, 3, 3, 3)
    assert small.get_submodule("2.basis").weight.shape == (4, 16, 3, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layers", ["all", 2], ids=repr)
def test_weights_that_are_not_finite_are_named_before_anything_is_changed(bad: float, layers: Any) -> None:
    model = small_net()
    with torch.no_grad():
        model[2].weight[1, 2, 0, 0] = bad
        model[2].weight[3, 2, 0, 0] = bad
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = r"conv 2 \(2\), weight \(16, 16, 3, 3\): 2 of its weights are NaN or infinite; repair them"
    with pytest.raises(LayerError, match=message):
        compress(model, X, layers=layers, size=2)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key].nan_to_num(), before[key].nan_to_num()) for key in before)


def test_layer_with_weights_that_are_not_finite_can_be_left_out() -> None:
    model = small_net()
    model[2].weight.data.fill_(math.nan)
    small = compress(model, X, layers=1, size=2)
    assert [layer.rank for layer in plan_of(small)] == [2, 0]


@pytest.mark.filterwarnings("ignore:.*stays Python.*meta device:fxbasis.FxBasisWarning")
def test_meta_weights_are_refused() -> None:
    with pytest.raises(LayerError, match=r"conv 1 .*meta device.*; load the weights first"):
        compress(small_net().to("meta"), X.to("meta"), size=2)


def test_nothing_selected_equals_the_original_and_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1))
    with pytest.warns(FxBasisWarning, match="nothing is compressed: no gain at any rank"):
        small = compress(model, X[:, :1])
    assert list(small.state_dict()) == list(model.state_dict())
    assert torch.equal(small(X[:, :1] + 1), model(X[:, :1] + 1))


@pytest.mark.parametrize("layers", ["all", 1, "re:.*"], ids=repr)
def test_compressing_twice_is_refused_with_a_remedy(layers: Any) -> None:
    small = compress(small_net(), X, size=2)
    with pytest.raises(FxBasisError, match=r"; (fold the model first|use .*uncompressed)"):
        compress(small, X, layers=layers, size=1)


def test_layer_plans_are_made_for_every_layer_with_its_shape(table: ConvTable) -> None:
    plan, _ = quietly(table, 3, size=4)
    assert plan.layers[2] == LayerPlan(
        number=3,
        name="a.conv2",
        in_channels=16,
        out_channels=16,
        kernel_size=(3, 3),
        groups=2,
        form="output",
        method="svd",
        ranks=(4,),
        reason="",
    )
