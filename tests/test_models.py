"""Model specs, weight files and input texts: what they give, and how each mistake is refused."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from fxbasis.errors import FxBasisWarning, MissingExtraError, UsageError
from fxbasis.models import load_model, parse_input
from fxbasis.weights import load_weights

SOURCE = """
from dataclasses import dataclass
import torch
from torch import nn
from neighbour import WIDTH

@dataclass
class Config:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config or Config()
        self.conv = nn.Conv2d(3, self.config.width, 3)

ready = nn.Conv2d(3, 2, 1).train()
number = 3

def build_net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
def two_things(): return nn.Conv2d(3, 4, 3), 1
def needs_width(width): return nn.Conv2d(3, width, 3)
def breaks(): raise OSError("disk of the model is gone")
def leaves(): raise SystemExit("bye")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with nets.py, its neighbour, and a package pkg_of_nets."""
    (tmp_path / "nets.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    (tmp_path / "pkg_of_nets").mkdir()
    (tmp_path / "pkg_of_nets" / "inner.py").write_text("from nets import *\n")
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1))


def equal(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# What a spec gives


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("torchvision:squeezenet1_1", "SqueezeNet"),
        ("torchvision:SqueezeNet1_1", "SqueezeNet"),
        ("torchvision.models:squeezenet1_1", "SqueezeNet"),
        ("torch.nn:Identity", "Identity"),
        ("nets.py:build_net", "Sequential"),
        ("./nets.py:Net", "Net"),
        ("nets:Net", "Net"),
        ("nets.py:ready", "Conv2d"),
        ("pkg_of_nets.inner:build_net", "Sequential"),
    ],
)
def test_a_spec_gives_a_model_in_eval_mode(folder: Path, spec: str, kind: str) -> None:
    before = list(sys.path)
    model = load_model(spec)
    assert type(model).__name__ == kind
    assert not any(module.training for module in model.modules())
    assert sys.path == before


def test_timm_model() -> None:
    pytest.importorskip("timm")
    assert type(load_model("timm:test_resnet")).__name__ == "ResNet"
    assert type(load_model("timm:test_resnet.r160_in1k")).__name__ == "ResNet"  # a tag names the same net


def test_a_file_elsewhere_finds_its_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for spec in (f"{folder}/nets.py:Net", "../nets.py:Net"):
        assert load_model(spec).conv.out_channels == 5


def test_classes_of_a_file_pickle_and_copy(folder: Path) -> None:
    first, second = load_model("nets.py:Net"), load_model("nets.py:Net")
    assert type(first).__module__ != type(second).__module__
    for model in (first, second):
        assert equal(pickle.loads(pickle.dumps(model)), model)
        assert equal(copy.deepcopy(model), model)


def test_a_ready_module_is_copied(folder: Path) -> None:
    model = load_model("nets:ready")
    assert model is not sys.modules["nets"].ready
    assert sys.modules["nets"].ready.training


def test_random_weights_follow_the_seed_and_leave_the_callers_state(folder: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (load_model("nets.py:build_net", seed=seed) for seed in (0, 0, 1))
    parse_input("1x3x4x4")
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, again)
    assert not equal(first, other)


def test_googlenet_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model("torchvision:googlenet")
    assert type(model).__name__ == "GoogLeNet"


def test_detectors_download_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert type(load_model("torchvision:lraspp_mobilenet_v3_large")).__name__ == "LRASPP"


# How a spec is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", r"'resnet18' is not of the form source:name; write torchvision:resnet18, timm"),
        ("nets.py", r"'nets.py' is not of the form"),
        ("torchvision:", r"'torchvision:' is not of the form"),
        (":build_net", r"':build_net' is not of the form"),
        (
            "torchvision:ResNet81",
            r"no torchvision model 'ResNet81', did you mean .*resnet18.*list_models\(\)",
        ),
        ("torchvision:qqqq", r"no torchvision model 'qqqq'; torchvision.models.list_models\(\) lists all"),
        ("nowhere.py:build_net", r"no file nowhere.py in .*; check the path"),
        ("no/such/file:build_net", r"no file no/such/file in .*; check the path"),
        ("notes/net.txt:build_net", r"notes/net.txt is not a Python file; name a file that ends in .py"),
        (
            "no_such_module:net",
            r"no_such_module cannot .*No module named 'no_such_module'; check the spelling",
        ),
        ("pkg_of_nets.absent:net", r"No module named 'pkg_of_nets.absent'; check the spelling"),
        ("needs.py:net", r"needs.py cannot be imported.*No module named 'absent_thing'; .*mend the code"),
        ("wrong.py:net", r"wrong.py cannot be imported.*SyntaxError: .*mend the code"),
        ("exits.py:net", r"exits.py cannot be imported.*SystemExit: 3; .*mend the code"),
        ("nets.py:bild_net", r"nets.py has no 'bild_net', did you mean build_net\?; name a function"),
        ("nets:qqqq", r"nets has no 'qqqq'; name a function in it that returns the model"),
        ("nets:number", r"nets:number is of type int; name a function that returns the model"),
        ("nets:two_things", r"two_things returned a tuple, not an nn.Module; name a function"),
        ("nets:needs_width", r"TypeError: .*missing 1 required .*'width'; .*takes no argument"),
        ("nets:breaks", r"nets:breaks raised OSError: disk of the model is gone; name a function"),
        ("nets:leaves", r"nets:leaves raised SystemExit: bye; name a function"),
    ],
)
def test_a_wrong_spec_is_refused(folder: Path, spec: str, message: str) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "net.txt").write_text(SOURCE)
    (folder / "needs.py").write_text("import absent_thing\n")
    (folder / "wrong.py").write_text("def net(:\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    before = list(sys.path)
    with pytest.raises(UsageError, match=message):
        load_model(spec)
    assert sys.path == before


def test_unknown_timm_models_are_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"no timm model 'ResNet5O', did you mean .*; timm.list_models\(\)"):
        load_model("timm:ResNet5O")
    with pytest.raises(UsageError, match=r"raised RuntimeError: Invalid pretrained tag.*; name a function"):
        load_model("timm:resnet18.nope")


def test_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r'timm:resnet50 needs timm .*pip install "fxbasis\[timm\]"$'):
        load_model("timm:resnet50")


# Weights that fit


def test_weights_of_every_kind_are_loaded(tmp_path: Path) -> None:
    old = small()
    state = old.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "a.st")
    torch.save(state, tmp_path / "b.pth")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for key in ("state_dict", "model", "model_state_dict"):
        torch.save({"epoch": 3, "best": torch.tensor(0.5), key: state}, tmp_path / f"{key}.pt")
    for path in sorted(tmp_path.iterdir()):
        new = small()
        load_weights(new, path)
        assert equal(new, old), path


def test_load_model_takes_weights(folder: Path) -> None:
    old = load_model("nets.py:build_net", seed=5)
    save_file(old.state_dict(), folder / "net.safetensors")
    assert equal(load_model("nets.py:build_net", weights="net.safetensors"), old)


def test_a_pickled_model_is_read_only_when_allowed(folder: Path) -> None:
    old = load_model("nets:Net", seed=5)
    torch.save(old, "whole.pt")
    torch.save({"model": old}, "wrapped.pt")
    for path in ("whole.pt", "wrapped.pt"):
        with pytest.raises(
            UsageError, match=r"more than tensors \(nets.Net\); .*--allow-pickle .*runs the code"
        ):
            load_model("nets:Net", weights=path)
        assert equal(load_model("nets:Net", weights=path, allow_pickle=True), old)


def test_refused_pickle_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Trap()}, tmp_path / "zip.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Trap(), protocol=2))
    for name in ("zip.pt", "raw.pkl"):
        with pytest.raises(UsageError, match="pass --allow-pickle"):
            load_weights(small(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_dataparallel_prefix_is_left_out_with_a_warning(tmp_path: Path) -> None:
    old, new = small(), small()
    torch.save(nn.DataParallel(old).state_dict(), tmp_path / "parallel.pt")
    with pytest.warns(FxBasisWarning, match=r"parallel.pt: every key begins with 'module.' .*without it"):
        load_weights(new, tmp_path / "parallel.pt")
    assert equal(new, old)


def test_a_models_own_name_module_stays(tmp_path: Path) -> None:
    old, new = (nn.ModuleDict({"module": small()}) for _ in range(2))
    torch.save(old.state_dict(), tmp_path / "own.pt")
    load_weights(new, tmp_path / "own.pt")
    assert equal(new, old)


def test_files_without_batch_counters_are_loaded(tmp_path: Path) -> None:
    old, new = small(), small()
    state = {key: value for key, value in old.state_dict().items() if "num_batches" not in key}
    save_file(state, tmp_path / "ancient.safetensors")
    load_weights(new, tmp_path / "ancient.safetensors")
    assert equal(new, old)


def test_a_tied_weight_that_safetensors_names_once_is_loaded(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        conv = nn.Conv2d(2, 2, 1)
        return nn.Sequential(conv, nn.ReLU(), conv)

    old, new = tied(), tied()
    save_model(old, str(tmp_path / "tied.safetensors"))
    load_weights(new, tmp_path / "tied.safetensors")
    assert equal(new, old)
    with pytest.raises(UsageError, match=r"2 missing \(2.weight, 2.bias\)"):  # not tied: truly missing
        load_weights(
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)), tmp_path / "tied.safetensors"
        )


def test_a_lazy_model_takes_the_shapes_of_the_file(tmp_path: Path) -> None:
    old, new = nn.Conv2d(3, 4, 1), nn.LazyConv2d(4, 1)
    save_file(old.state_dict(), tmp_path / "lazy.safetensors")
    load_weights(new, tmp_path / "lazy.safetensors")
    assert equal(new, old)


# How weights are refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("2.bias"),
            r"do not fit Sequential: 1 missing \(2.bias\); build the model with",
        ),
        (lambda state: state.update(more=torch.ones(1)), r"1 unexpected \(more\); build the model with"),
        (lambda state: state.update(epoch=3), r"1 unexpected \(epoch\); build the model with"),
        (
            lambda state: state.update({"2.weight": torch.ones(9, 2, 1, 1)}),
            r"1 of another shape \(2.weight: file \(9, 2, 1, 1\), model \(3, 2, 1, 1\)\); build the model",
        ),
        (lambda state: state.update({"2.weight": 3}), r"2.weight: file None, model \(3, 2, 1, 1\)\); build"),
        (
            lambda state: [state.update({f"x.{key}": state.pop(key)}) for key in list(state)[:4]],
            r"4 missing \(0.weight, 0.bias, 1.weight\); 4 unexpected \(x.0.weight, x.0.bias, x.1.weight\)",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(tmp_path: Path, change: Any, message: str) -> None:
    state = dict(small().state_dict())
    change(state)
    torch.save(state, tmp_path / "other.pt")
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(UsageError, match=r"other.pt .*" + message):
        load_weights(model, tmp_path / "other.pt")
    assert equal(model, before)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "bytes", "head", "cut"])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_damaged_weight_files_are_refused(
    tmp_path: Path, suffix: str, damage: str, allow_pickle: bool
) -> None:
    path = tmp_path / f"net.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(small().state_dict(), path)
    whole = path.read_bytes()
    parts = {"empty": b"", "text": b"hello world\n" * 9, "bytes": bytes(range(128)), "head": whole[:99]}
    path.write_bytes(parts.get(damage, whole[:-40]))
    with pytest.raises(
        UsageError, match=r"net.* are damaged or no weight file \(\w+.*\); copy the file again"
    ):
        load_weights(small(), path, allow_pickle=allow_pickle)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(1)], r"holds a list and no weights; save the model's state_dict\(\)"),
        ({"epoch": 3, "lr": 0.1}, r"holds a dict of \['epoch', 'lr'\] and no weights; save the"),
        ({}, r"holds a dict of \[\] and no weights; save the"),
        ({0: torch.ones(1)}, r"holds a dict of \[0\] and no weights; save the"),
        (torch.ones(1), r"holds a Tensor and no weights; save the"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, held: Any, message: str) -> None:
    torch.save(held, tmp_path / "held.pt")
    with pytest.raises(UsageError, match=r"held.pt " + message):
        load_weights(small(), tmp_path / "held.pt")


def test_missing_weight_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UsageError, match=rf"no weight file {path} in .*; check the path"):
            load_weights(small(), path)


# Input texts


@pytest.mark.parametrize("text", ["1x3x224x224", "2x3x8", "10x1x1x1"])
def test_parse_input(text: str) -> None:
    tensor = parse_input(text)
    assert "x".join(map(str, tensor.shape)) == text
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, parse_input(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1x3xax8",
        "1x3x8.0x8",
        "1,3,8,8",
        "1x3x0x8",
        "-1x3x8x8",
        "8x8",
        "1x1x1x1x1",
        "1X3X8X8",
        "1x3x8x",
    ],
)
def test_wrong_inputs_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=rf"input '{text}' is not 3 or 4 whole .*write batch.*1x3x224x224$"):
        parse_input(text)


@pytest.mark.parametrize("size", ["9" * 8, "9" * 30, "9" * 5000])
def test_inputs_beyond_memory_are_refused(size: str) -> None:
    with pytest.raises(UsageError, match=r"does not fit into memory; use smaller sizes$"):
        parse_input(f"{size}x3x{size}x{size}")
