"""Arguments of another type than is asked for: an error that names them, and nothing is done or written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxbasis import (
    ExportError,
    FxBasisError,
    InputError,
    PlanError,
    SelectionError,
    UsageError,
    compress,
    export_onnx,
    load,
    measure,
    measure_layer,
    number_convs,
    plan_of,
    profile,
    report,
    save,
    sensitivities,
)
from fxbasis.recipe import Plan
from fxbasis.weights import load_weights

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()


@pytest.mark.parametrize("value", [1, None, "no", np.True_], ids=repr)
@pytest.mark.parametrize("flag", ["fixed_basis", "effective_weights", "keep_if_slower", "evbmf"])
def test_a_flag_of_compress_that_is_no_bool_is_refused(flag: str, value: Any) -> None:
    with pytest.raises(SelectionError, match=rf"{flag}=.* is neither True nor False; pass one of them"):
        compress(net(), X, layers=[1], **{flag: value})


WRONG: Any = "no"
FLAGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of a layer": (lambda _: compress(net(), X, layers={"0": {"fixed_basis": WRONG}}), "fixed_basis"),
    "table": (lambda _: number_convs(net(), X, effective_weights=WRONG), "effective_weights"),
    "profile": (lambda _: profile(net(), X, training=WRONG), "training"),
    "export": (lambda path: export_onnx(net(), X, path / "a", dynamic_batch=WRONG), "dynamic_batch"),
    "pickle": (lambda path: load_weights(net(), path / "w", allow_pickle=WRONG), "allow_pickle"),
}


@pytest.mark.parametrize("key", FLAGS)
def test_other_flags_that_are_no_bool_are_refused(key: str, tmp_path: Path) -> None:
    verb, named = FLAGS[key]
    with pytest.raises(SelectionError, match=f"{named}='no' is neither True nor False; pass one of them"):
        verb(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["runs", "threads"])
@pytest.mark.parametrize("value", [True, 2.0, "2", 0])
def test_a_count_that_is_none_is_refused(what: str, value: Any) -> None:
    with pytest.raises(ExportError, match=rf"{what}={value!r} cannot be measured; pass a whole number"):
        measure(net(), X, **{what: value})


CHOICES: dict[str, dict[str, Any]] = {
    "form in a list": {"form": ["output"]},
    "form of a layer": {"layers": {"0": {"form": [1]}}},
    "layers None": {"layers": None},
    "layers in bytes": {"layers": b"\x01"},
    "layers of a tensor": {"layers": torch.tensor([9])},
    "layers of an array": {"layers": np.array(9)},
}


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_of_another_type_is_refused(key: str) -> None:
    with pytest.raises(SelectionError, match=r"; (choose|pass|see)"):
        compress(net(), X, **CHOICES[key])


def test_numbers_of_layers_may_come_in_a_tensor_or_an_array() -> None:
    expected = plan_of(compress(net(), X, layers=[2], size=2))
    for layers in (torch.tensor([2]), torch.tensor(2), np.array([2])):
        assert plan_of(compress(net(), X, layers=layers, size=2)) == expected


@pytest.mark.parametrize("record", [None, "0", 1])
def test_what_is_no_record_has_no_time(record: Any) -> None:
    with pytest.raises(InputError, match=r"the record is a \w+; pass one of number_convs"):
        measure_layer(record)


PATHS: dict[str, tuple[Callable[[Any], Any], type[FxBasisError]]] = {
    "save": (lambda path: save(compress(net(), X), path), UsageError),
    "load": (lambda path: load(net(), path), PlanError),
    "export": (lambda path: export_onnx(net(), X, path), ExportError),
    "report": (lambda path: report(net(), compress(net(), X), X, path, runs=1), UsageError),
    "write a plan": (lambda path: plan_of(compress(net(), X)).to_json(path), UsageError),
    "read a plan": (Plan.from_json, PlanError),
    "table": (lambda path: number_convs(net(), X).to_csv(path), UsageError),
    "sensitivities": (lambda path: sensitivities(net(), X, forms=["gauge"]).to_csv(path), UsageError),
    "times": (lambda path: measure_layer(number_convs(net(), X)[0], cache=path), UsageError),
}


@pytest.mark.parametrize("path", [None, 3, b"a", "", "a\0b", "a" * 300, "a" * 300 + "/b"], ids=repr)
@pytest.mark.parametrize("key", PATHS)
def test_what_is_no_path_is_refused(
    key: str, path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, kind = PATHS[key]
    with pytest.raises(kind, match=r" is no path.*; give (the name of a file or folder|another name)"):
        verb(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", ["13", True, 17.0, 1, 99])
def test_an_opset_that_there_is_not_is_refused(tmp_path: Path, opset: Any) -> None:
    with pytest.raises(ExportError, match=rf"opset={opset!r} cannot be written; pass a whole number"):
        export_onnx(net(), X, tmp_path / "n.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
