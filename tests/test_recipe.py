"""Plans: what they hold, JSON in and out, and the refusal of every damaged one."""

import copy
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxbasis import LayerPlan, Plan, PlanError, SelectionError, UsageError, compress, plan_of

X = torch.zeros(1, 3, 8, 8)


def example() -> Plan:
    """A dense, a compressed and a grouped compressed layer."""
    shape: dict[str, Any] = {"out_channels": 8, "kernel_size": (3, 3)}
    return Plan(
        (
            LayerPlan(number=1, name="stem", in_channels=3, **shape, reason="not selected"),
            LayerPlan(number=2, name="a.b", in_channels=8, **shape, form="output", method="svd", ranks=(5,)),
            LayerPlan(
                number=3, name="c", in_channels=8, **shape, groups=2, form="output", method="qr", ranks=(4,)
            ),
        )
    )


def test_json_round_trip(tmp_path: Path) -> None:
    plan = example()
    plan.to_json(tmp_path / "plan.json")
    assert Plan.from_json(tmp_path / "plan.json") == plan
    assert Plan.from_json(str(tmp_path / "plan.json")) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["", "модель.слой", 'quo"te', "a\nb", "x" * 1000], ids=ascii)
def test_any_name_survives(tmp_path: Path, name: str) -> None:
    first, *others = example()
    plan = Plan((LayerPlan(**{**vars(first), "name": name}), *others))
    plan.to_json(tmp_path / "plan.json")
    assert Plan.from_json(tmp_path / "plan.json") == plan


def test_dict_is_plain_json_with_every_field() -> None:
    data = example().to_dict()
    assert data["format"] == 2
    assert [set(layer) for layer in data["layers"]] == [{field.name for field in fields(LayerPlan)}] * 3
    assert json.loads(json.dumps(data))["layers"][1]["kernel_size"] == [3, 3]


def test_plan_of_a_model_without_convolutions_is_empty() -> None:
    assert len(Plan.from_dict(Plan(()).to_dict())) == 0


def test_reading() -> None:
    plan = example()
    assert [layer.name for layer in plan] == ["stem", "a.b", "c"]
    assert [layer.name for layer in plan.compressed] == ["a.b", "c"]
    assert len(plan) == 3
    assert str(plan.layers[2]) == "conv 3 (c), weight (8, 4, 3, 3)"
    assert (plan.layers[2].shape.fan_in, plan.layers[2].shape.largest_rank) == (36, 8)


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        example().layers[0].rank = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        example().layers = ()  # type: ignore[misc]


def layer(position: int, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Change one layer entry."""

    def damage(data: dict[str, Any]) -> Any:
        data["layers"][position].update(changes)
        return data

    return damage


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    def damage(data: dict[str, Any]) -> Any:
        del data["layers"][0][key]
        return data

    return damage


def outer(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data | changes


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda data: data["layers"], 'has no list "layers"'),
    "a text": (lambda data: "plan", 'has no list "layers"'),
    "null": (lambda data: None, 'has no list "layers"'),
    "empty": (lambda data: {}, 'has no list "layers"'),
    "layers is a dict": (outer(layers={}), 'has no list "layers"'),
    "later format": (outer(format=3), "format 3, this version reads 2; make the plan again"),
    "no format": (lambda data: {"layers": data["layers"]}, "format None, this version reads 2"),
    "entry is no dict": (outer(layers=[3]), "layer entry 1 does not have the keys of a layer"),
    "missing key": (without("ranks"), "layer entry 1 does not have the keys"),
    "unknown key": (layer(1, colour="red"), "layer entry 2 does not have the keys"),
    "number is text": (layer(0, number="1"), "layer entry 1: number is '1'"),
    "number is null": (layer(0, number=None), "number is None"),
    "number is 0": (layer(0, number=0), "not the shape of a convolution"),
    "rank is a fraction": (layer(1, ranks=[0.5]), r"layer entry 2: ranks is \[0\.5\]"),
    "rank is a whole float": (layer(1, ranks=[5.0]), r"ranks is \[5\.0\]"),
    "rank is true": (layer(1, ranks=[True]), "ranks is .True"),
    "rank is negative": (layer(1, ranks=[-2]), r"ranks \(-2,\) are not between 1"),
    "rank is 0": (
        layer(1, ranks=[0]),
        r"conv 2 \(a\.b\).*ranks \(0,\) are not between 1 and \(8,\), the largest",
    ),
    "rank is too large": (layer(1, ranks=[9]), r"ranks \(9,\) are not between 1 and \(8,\)"),
    "rank is huge": (layer(1, ranks=[10**30]), r"are not between 1 and \(8,\)"),
    "rank is no multiple of the groups": (
        layer(2, ranks=[3]),
        r"ranks \(3,\) are no multiples of its 2 groups",
    ),
    "rank of a dense layer": (layer(0, ranks=[2]), r"stem.*dense.*ranks \(2,\)"),
    "name is a number": (layer(0, name=1), "name is 1"),
    "kernel is a number": (layer(0, kernel_size=3), "kernel_size is 3"),
    "kernel of one": (layer(0, kernel_size=[3]), r"kernel_size is \[3\]"),
    "kernel of three": (layer(0, kernel_size=[3, 3, 3]), r"kernel_size is \[3, 3, 3\]"),
    "kernel of text": (layer(0, kernel_size=["3", 3]), "kernel_size is"),
    "kernel of 0": (layer(0, kernel_size=[0, 3]), "not the shape of a convolution"),
    "kernel is negative": (layer(0, kernel_size=[3, -3]), "not the shape of a convolution"),
    "no groups": (layer(0, groups=0), "not the shape of a convolution"),
    "groups do not divide": (layer(0, groups=2), "not the shape of a convolution"),
    "no inputs": (layer(0, in_channels=0), "not the shape of a convolution"),
    "no filters": (layer(1, out_channels=0), "not the shape of a convolution"),
    "unknown form": (layer(1, form="banana"), "form is 'banana'"),
    "empty form": (layer(1, form=""), "form is ''"),
    "form is null": (layer(1, form=None), "form is None"),
    "unknown method": (layer(1, method="magic"), "method is 'magic'"),
    "reason is null": (layer(0, reason=None), "reason is None"),
}


@pytest.mark.parametrize("key", DAMAGES)
def test_damaged_plan_is_refused_with_its_place_and_a_remedy(tmp_path: Path, key: str) -> None:
    damage, message = DAMAGES[key]
    data = damage(json.loads(json.dumps(example().to_dict())))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict(data, "my plan")
    assert "my plan" in str(caught.value)
    assert "; make the plan again" in str(caught.value) or "; write it again" in str(caught.value)

    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(path)
    assert str(path) in str(caught.value)


def test_the_undamaged_plan_passes() -> None:
    assert Plan.from_dict(copy.deepcopy(example().to_dict()), "my plan") == example()


CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "half": json.dumps(example().to_dict()).encode()[:200],
    "one brace less": json.dumps(example().to_dict()).encode()[:-1],
    "no JSON": b"layers: all",
    "binary": bytes(range(256)),
    "other encoding": json.dumps(example().to_dict()).encode("utf-16"),
    "two documents": b"{}{}",
    "nested too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("key", CONTENTS)
def test_damaged_file_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(CONTENTS[key])
    with pytest.raises(PlanError, match=r"plan\.json is damaged \(.*\); write it again"):
        Plan.from_json(path)


@pytest.mark.parametrize(
    "path", ["missing.json", "", "folder"], ids=["missing", "a folder", "another folder"]
)
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match=r"cannot read .*; give the file that save wrote"):
        Plan.from_json(tmp_path / path)


@pytest.mark.parametrize("below", ["file/plan.json", "missing/plan.json", "folder"])
def test_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*; give a path in a folder"):
        example().to_json(tmp_path / below)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_plan_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("x" * 100_000)
    example().to_json(path)
    assert Plan.from_json(path) == example()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2)).eval()


def test_plan_decides_instead_of_the_selection(tmp_path: Path) -> None:
    small = compress(model(), X, layers={1: {"size": 3, "method": "qr"}, 3 - 1: {"size": 4}})
    plan = plan_of(small)
    plan.to_json(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        again = compress(model(), X, plan=given)
        assert plan_of(again) == plan
        assert torch.equal(small(X + 1), again(X + 1))


@pytest.mark.parametrize("given", [3, {"layers": []}, ["plan.json"], True], ids=repr)
def test_what_is_no_plan_is_refused(given: Any) -> None:
    with pytest.raises(PlanError, match=r"plan=.*; pass"):
        compress(model(), X, plan=given)


def test_plan_with_an_unknown_method_is_refused_before_anything_is_changed() -> None:
    plan = plan_of(compress(model(), X, size=2))
    bad = Plan(tuple(LayerPlan(**{**vars(entry), "method": "magic"}) for entry in plan))
    with pytest.raises((PlanError, SelectionError), match=r"method.*magic.*; "):
        compress(model(), X, plan=bad)


def test_plan_of_an_uncompressed_model_is_refused() -> None:
    with pytest.raises(PlanError, match="Sequential was not made by compress; compress it first"):
        plan_of(model())


def test_plan_of_keeps_the_reasons_of_dense_layers() -> None:
    plan = plan_of(compress(model(), X, layers=[2], size=2))
    assert [(entry.number, entry.name, entry.rank, entry.reason) for entry in plan] == [
        (1, "0", 0, "not selected"),
        (2, "2", 2, ""),
    ]
