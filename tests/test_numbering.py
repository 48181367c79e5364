"""Numbers, sizes, order, calls and statuses of the convolutions; the model is only looked at."""

import copy
import csv
import json
import random
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from fxbasis import (
    ConvRecord,
    ConvTable,
    FxBasisWarning,
    UsageError,
    compress,
    fold,
    load,
    number_convs,
    save,
    trace,
)

X = torch.zeros(2, 3, 8, 8)

RESNET18 = [
    "conv1",
    "layer1.0.conv1",
    "layer1.0.conv2",
    "layer1.1.conv1",
    "layer1.1.conv2",
    "layer2.0.conv1",
    "layer2.0.conv2",
    "layer2.0.downsample.0",
    "layer2.1.conv1",
    "layer2.1.conv2",
    "layer3.0.conv1",
    "layer3.0.conv2",
    "layer3.0.downsample.0",
    "layer3.1.conv1",
    "layer3.1.conv2",
    "layer4.0.conv1",
    "layer4.0.conv2",
    "layer4.0.downsample.0",
    "layer4.1.conv1",
    "layer4.1.conv2",
]


def quiet(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxBasisWarning)
        return function(*args, **kwargs)


class Backwards(nn.Module):
    """Defined a, b, c; called c, a, a; b never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 4, 1)
        self.c = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(F.max_pool2d(self.a(self.c(x)), 2))


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.part = nn.Sequential(nn.ReLU(), self.one)
        self.two = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.part(self.one(x)))


class Tied(nn.Module):
    """One Parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.two = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.two.weight = self.one.weight
        self.free = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.two(self.one(x)))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def resnet_table() -> ConvTable:
    return number_convs(resnet(), torch.zeros(1, 3, 64, 64))


def test_resnet18_gives_the_papers_twenty_numbers(resnet_table: ConvTable) -> None:
    assert [record.name for record in resnet_table] == RESNET18
    assert [record.index for record in resnet_table] == list(range(1, 21))
    assert [record.name for record in number_convs(resnet())] == RESNET18


def test_resnet18_runs_its_downsample_after_the_block(resnet_table: ConvTable) -> None:
    orders = {record.name: record.order for record in resnet_table}
    assert sorted(orders.values()) == list(range(1, 21))
    assert (orders["layer2.0.conv2"], orders["layer2.0.downsample.0"]) == (7, 8)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (1, ((7, 7), (2, 2), (3, 3), (32, 32), 32 * 32 * 64 * 3 * 49, 64 * 3 * 49)),
        (8, ((1, 1), (2, 2), (0, 0), (8, 8), 8 * 8 * 128 * 64, 128 * 64)),
        (20, ((3, 3), (1, 1), (1, 1), (2, 2), 2 * 2 * 512 * 512 * 9, 512 * 512 * 9)),
    ],
    ids=["stem", "downsample", "last"],
)
def test_resnet18_options_sizes_and_work(resnet_table: ConvTable, index: int, expected: Any) -> None:
    r = resnet_table[index - 1]
    assert (r.kernel_size, r.stride, r.padding, r.output_size, r.macs, r.params) == expected
    assert (r.dilation, r.groups, r.bias, r.calls) == ((1, 1), 1, False, 1)


def test_index_is_definition_and_order_is_execution() -> None:
    table = number_convs(Backwards(), X)
    assert [(r.index, r.name, r.order, r.calls) for r in table] == [
        (1, "a", 2, 2),
        (2, "b", None, 0),
        (3, "c", 1, 1),
    ]


def test_work_counts_every_call_at_its_own_size_and_the_whole_batch() -> None:
    a, b, c = number_convs(Backwards(), X)
    assert a.macs == 2 * (4 * 4 + 2 * 2) * 8 * 72
    assert a.output_size == (4, 4)
    assert (b.macs, b.output_size) == (0, None)
    assert c.macs == 2 * 4 * 4 * 8 * 27


def test_without_inputs_nothing_is_known_of_the_run() -> None:
    for record in number_convs(Backwards()):
        assert (record.order, record.calls, record.macs, record.output_size) == (None,) * 4
        assert record.params > 0
        assert record.status == "ok"


def test_conv_that_never_runs_has_a_reason() -> None:
    spare = number_convs(Backwards(), X)[1]
    assert (spare.status, spare.reason) == ("unsupported", "it is not called on these inputs")


def test_one_module_under_two_names_is_one_layer() -> None:
    table = number_convs(Aliased(), X)
    assert [(r.index, r.name, r.calls) for r in table] == [(1, "one", 2), (2, "two", 1)]
    assert table[0].macs == 2 * 2 * 8 * 8 * 3 * 27


def test_tied_parameter_is_refused_with_its_other_owner() -> None:
    table = number_convs(Tied(), X)
    assert [r.status for r in table] == ["unsupported", "unsupported", "ok"]
    assert "two.weight" in table[0].reason
    assert "one.weight" in table[1].reason


def test_tied_parameter_stays_tied_under_a_pattern() -> None:
    small = quiet(compress, Tied(), X, layers="re:.*", size=2)
    assert small.one.weight is small.two.weight
    assert quiet(fold, small).one.weight is not None


def test_weight_read_by_another_node_is_refused() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(self.conv(x), self.conv.weight)

    record = number_convs(trace(Decoder(), X), X)[0]
    assert record.status == "unsupported"
    assert "weight is also read" in record.reason


STATUSES: dict[str, tuple[Any, str, str]] = {
    "ok": (lambda: nn.Conv2d(3, 16, 3), "ok", ""),
    "no gain": (lambda: nn.Conv2d(1, 4, 1), "no gain at any rank", "break-even rank 0.8"),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3), "unsupported", "depthwise"),
    "one filter": (lambda: nn.Conv2d(3, 1, 3), "no gain at any rank", "break-even"),
    "complex": (lambda: nn.Conv2d(3, 8, 3, dtype=torch.complex64), "unsupported", "complex64"),
    "pads by itself": (lambda: OwnForward(3, 16, 3), "ok", ""),
    "own kernel": (lambda: OwnConvForward(3, 8, 3), "unsupported", "OwnConvForward convolves with another"),
    "plain subclass": (lambda: Renamed(3, 16, 3), "ok", ""),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)),
        "ok",
        "",
    ),
    "patched": (lambda: _patched(nn.Conv2d(3, 8, 3)), "unsupported", "replaced on the instance"),
    "spectral hook": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 16, 3)), "ok", ""),
    "weight is a buffer": (lambda: _buffered(nn.Conv2d(3, 8, 3)), "unsupported", "no parameter"),
}


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class Renamed(nn.Conv2d):
    pass


def _patched(conv: nn.Conv2d) -> nn.Conv2d:
    conv.forward = lambda x: x  # type: ignore[method-assign]
    return conv


def _buffered(conv: nn.Conv2d) -> nn.Conv2d:
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.register_buffer("weight", weight)
    return conv


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("key", STATUSES)
def test_status_and_reason(key: str) -> None:
    build, status, reason = STATUSES[key]
    record = number_convs(nn.Sequential(build()))[0]
    assert record.status == status
    assert reason in record.reason
    assert bool(record.reason) == bool(reason)


@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
def test_padding_is_reported_as_given(padding: Any) -> None:
    record = number_convs(nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding)), X)[0]
    expected = {"same": (8, 8), "valid": (6, 6), 1: (8, 8), (2, 0): (10, 6)}[padding]
    assert record.padding == ((1, 1) if padding == 1 else padding)
    assert record.output_size == expected


def test_unbatched_input_counts_one_image() -> None:
    assert number_convs(nn.Sequential(nn.Conv2d(3, 8, 1)), torch.zeros(3, 5, 4))[0].macs == 5 * 4 * 8 * 3


def test_linear_and_other_convolutions_are_not_numbered() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(512, 2))
    assert [record.name for record in number_convs(model, X)] == ["1"]


def test_a_model_that_is_one_conv_has_the_empty_name() -> None:
    assert [(r.index, r.name, r.calls) for r in number_convs(nn.Conv2d(3, 8, 3), X)] == [(1, "", 1)]


def test_numbers_do_not_change_through_the_whole_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Backwards()
    expected = [(r.index, r.name, r.order, r.calls) for r in number_convs(model, X)]
    traced = trace(model, X)
    small = quiet(compress, model, X, layers=[1, 3], size=2)
    once = quiet(compress, model, X, layers=[3], size=2)
    loaded = load(model, save(small, tmp_path))
    for name, one in {
        "traced": traced,
        "compressed": small,
        "one layer compressed": once,
        "copied": copy.deepcopy(small),
        "loaded": loaded,
        "folded": fold(small),
        "folded after loading": fold(loaded),
    }.items():
        found = [(r.index, r.name, r.order, r.calls) for r in number_convs(one, X)]
        assert found == expected, name


def test_numbers_of_a_compressed_resnet18(resnet_table: ConvTable) -> None:
    small = compress(resnet(), torch.zeros(1, 3, 64, 64), layers="2-5,10", size=0.25)
    table = number_convs(small)
    assert [record.name for record in table] == RESNET18
    compressed = [record.index for record in table if record.status == "compressed"]
    assert compressed == [2, 3, 4, 5, 10]
    assert [record.name for record in number_convs(fold(small))] == RESNET18
    assert {r.reason for r in table if r.index in (1, 20)} == {"left dense: not selected"}


def test_compressed_layer_reports_its_own_work_and_form() -> None:
    small = quiet(compress, Backwards(), X, layers=[1], size=2)
    record = number_convs(small, X)[0]
    assert record.macs == 2 * (4 * 4 + 2 * 2) * 2 * (72 + 8)
    assert record.params == 2 * (72 + 8) + 8
    assert (record.status, record.reason) == ("compressed", "output form, svd, rank 2 of 8")


def test_to_dict_has_one_column_for_each_field_of_plain_values() -> None:
    columns = number_convs(Backwards(), X).to_dict()
    assert list(columns) == [field.name for field in fields(ConvRecord)]
    assert columns["name"] == ["a", "b", "c"]
    assert columns["order"] == [2, None, 1]
    again = json.loads(json.dumps(columns))
    assert again["kernel_size"] == [[3, 3], [1, 1], [3, 3]]


def test_to_csv_writes_header_and_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    number_convs(Backwards(), X).to_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert list(rows[0]) == [field.name for field in fields(ConvRecord)]
    assert (rows[0]["index"], rows[0]["macs"], rows[1]["order"]) == ("1", str(2 * 20 * 8 * 72), "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]


def test_to_csv_names_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("kept")
    with pytest.raises(UsageError, match=r"cannot write .*table\.csv.*; give a path"):
        number_convs(Backwards()).to_csv(blocker / "table.csv")
    assert blocker.read_text() == "kept"


def test_is_a_sequence_that_prints_as_a_table() -> None:
    table = number_convs(Backwards(), X)
    assert (len(table), table[0].name, table[-1].name) == (3, "a", "c")
    assert isinstance(table[:2], ConvTable)
    assert [record.name for record in table[1:]] == ["b", "c"]
    lines = str(table).splitlines()
    assert len(lines) == 5
    assert "unsupported: it is not called" in lines[3]
    assert "1,152" not in lines[2]
    assert f"{2 * 20 * 8 * 72:,}" in lines[2]


@pytest.mark.parametrize("inputs", [X, None], ids=["with inputs", "without"])
def test_the_model_is_only_looked_at(inputs: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 2, 1))
    model.train()
    model[1].eval()
    model[1].train()
    model[3].eval()
    statistics = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state, python = torch.get_rng_state(), random.getstate()

    number_convs(model, inputs)

    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    assert all(torch.equal(statistics[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
