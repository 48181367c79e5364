"""Saved folders: bit-equal when loaded, free of pickle, written whole or not at all, refused when damaged."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxbasis.saving
import fxbasis.stored_state
from fxbasis import (
    FxBasisWarning,
    LayerError,
    PlanError,
    UsageError,
    compress,
    fold,
    load,
    plan_of,
    save,
)
from fxbasis.forms import BasisConv2d

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Plain, grouped and aliased convs, BatchNorm, a Linear and a buffer outside of the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1, padding_mode="reflect")
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.shared
        self.head = nn.Linear(8, 4)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.bn(self.stem(x))))
        return self.head(self.alias(F.relu(self.shared(x))).mean((2, 3))) * self.scale


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else super().forward(x) * 2


def make(kind: type[Net] = Net, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = kind().eval()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2.0)
    return net


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxBasisWarning)
        return function(*args, **kwargs)


def small_net(kind: type[Net] = Net) -> Any:
    return quietly(compress, make(kind), X, layers="re:.*", size=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(small_net(), tmp_path / "saved")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "plan.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def resign(folder: Path) -> None:
    """Make the checksum fit the weight file again: damage beyond it must be seen too."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda content: content.update(weights_sha256=digest))


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    resign(folder)


@pytest.mark.parametrize("kind", [Net, Branching])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loaded_is_bit_equal_whatever_the_fresh_weights(tmp_path: Path, kind: type[Net], dtype: Any) -> None:
    inputs = X.to(dtype)
    small = quietly(compress, make(kind).to(dtype), inputs, layers="re:.*", size=2)
    fresh = make(kind, seed=9).to(dtype)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = quietly(load, fresh, save(small, tmp_path))
    assert torch.equal(small(inputs), loaded(inputs))
    assert isinstance(loaded, fx.GraphModule) == isinstance(small, fx.GraphModule) == (kind is Net)
    assert list(loaded.state_dict()) == list(small.state_dict())
    assert all(torch.equal(small.state_dict()[key], value) for key, value in loaded.state_dict().items())
    assert plan_of(loaded) == plan_of(small)
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())


def test_folder_holds_two_files_and_no_pickle(folder: Path) -> None:
    assert sorted(entry.name for entry in folder.iterdir()) == ["model.safetensors", "plan.json"]
    assert json.loads((folder / "plan.json").read_text())["format"] == 2
    assert len(load_file(folder / "model.safetensors")) > 0
    for entry in folder.iterdir():
        assert not entry.read_bytes().startswith((b"\x80", b"PK"))
        assert entry.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_sharing_survives(folder: Path) -> None:
    loaded = load(make(seed=3), folder)
    assert loaded.shared is loaded.alias
    assert isinstance(loaded.shared, BasisConv2d)


def test_trained_weights_are_saved(tmp_path: Path) -> None:
    small = small_net()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    small.bn.running_mean.add_(1)
    assert torch.equal(small(X), load(make(), save(small, tmp_path))(X))


def test_loading_draws_no_random_numbers_and_decomposes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr("fxbasis.passes.rewriting.fit", refuse)
    fresh = make()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    load(fresh, folder)
    assert torch.equal(state, torch.get_rng_state())


def test_mode_and_frozen_parameters_are_the_fresh_models(folder: Path) -> None:
    fresh = make().train()
    fresh.stem.weight.requires_grad_(False)
    loaded = load(fresh, folder)
    assert loaded.training
    assert loaded.stem.basis.training
    assert not loaded.stem.basis.weight.requires_grad
    assert loaded.shared.basis.weight.requires_grad
    assert not load(make(), folder).training


def test_loaded_can_be_saved_folded_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    loaded = load(make(seed=1), folder)
    again = load(make(seed=2), save(loaded, tmp_path / "again"))
    assert torch.equal(loaded(X), again(X))
    original = make(seed=5)
    original.load_state_dict(fold(again).state_dict())
    assert (original(X) - loaded(X)).abs().max() <= 1e-5 * loaded(X).abs().max()


def test_a_model_that_is_one_convolution(tmp_path: Path) -> None:
    small = compress(nn.Conv2d(3, 16, 3), X, size=3)
    loaded = load(nn.Conv2d(3, 16, 3), save(small, tmp_path))
    assert torch.equal(small(X), loaded(X))


def test_nothing_compressed_can_be_saved_too(tmp_path: Path) -> None:
    with pytest.warns(FxBasisWarning, match="nothing is compressed"):
        small = compress(make(), X, layers={"all": None})
    loaded = load(make(seed=2), save(small, tmp_path))
    assert torch.equal(small(X), loaded(X))


def test_channels_last_is_saved(tmp_path: Path) -> None:
    small = quietly(
        compress,
        make().to(memory_format=torch.channels_last),
        X.to(memory_format=torch.channels_last),
        layers="re:.*",
        size=2,
    )
    loaded = load(make().to(memory_format=torch.channels_last), save(small, tmp_path))
    assert loaded.shared.basis.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small(X), loaded(X))


def test_saving_again_replaces_both_files(folder: Path) -> None:
    other = compress(make(seed=7), X, layers=[1], size=1)
    save(other, folder)
    assert sorted(entry.name for entry in folder.iterdir()) == ["model.safetensors", "plan.json"]
    assert torch.equal(other(X), load(make(), folder)(X))


def test_uncompressed_model_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Net was not made by compress; compress it first"):
        save(make(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def truncate(folder: Path, name: str, size: int) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])


def flip(folder: Path, position: int) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def swap(folder: Path) -> None:
    """Weights of another save of the same model."""
    other = save(quietly(compress, make(), X, layers="re:.*", size=1), folder.parent / "other")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")


def signed_garbage(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    resign(folder)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"cannot read .*plan\.json: No such file.*; give the file that save wrote"),
    "no plan": (lambda f: (f / "plan.json").unlink(), r"cannot read .*plan\.json"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"cannot read .*model\.safetensors.*; give a folder that save wrote",
    ),
    "truncated plan": (lambda f: truncate(f, "plan.json", 300), r"plan\.json is damaged"),
    "empty plan": (lambda f: truncate(f, "plan.json", 0), r"plan\.json is damaged"),
    "truncated weights": (
        lambda f: truncate(f, "model.safetensors", 900),
        "SHA-256 differs.*save the model",
    ),
    "empty weights": (lambda f: truncate(f, "model.safetensors", 0), "SHA-256 differs"),
    "one bit of the header": (lambda f: flip(f, 20), "SHA-256 differs"),
    "one bit of the weights": (lambda f: flip(f, -5), "SHA-256 differs"),
    "weights of another save": (swap, "SHA-256 differs"),
    "no checksum": (lambda f: edit(f, lambda c: c.pop("weights_sha256") and c), "SHA-256 differs"),
    "checksum is null": (
        lambda f: edit(f, lambda c: c.update(weights_sha256=None)),
        "SHA-256 differs",
    ),
    "signed garbage": (
        lambda f: signed_garbage(f, b"not safetensors at all"),
        r"model\.safetensors is damaged.*; save the model again",
    ),
    "signed pickle": (
        lambda f: (torch.save({"a": X}, f / "model.safetensors"), resign(f)),
        r"model\.safetensors is damaged",
    ),
    "signed and truncated": (
        lambda f: (truncate(f, "model.safetensors", 900), resign(f)),
        r"model\.safetensors is damaged",
    ),
    "signed and empty": (lambda f: signed_garbage(f, b""), r"model\.safetensors is damaged"),
    "a tensor less": (
        lambda f: rewrite_weights(f, lambda t: t.__delitem__("head.bias")),
        r"lacks \['head\.bias'\].*; use the model that was compressed",
    ),
    "a tensor more": (lambda f: rewrite_weights(f, lambda t: t.update(x=X)), r"has \['x'\] beyond"),
    "a tensor of another shape": (
        lambda f: rewrite_weights(f, lambda t: t.update({"stem.basis.weight": torch.zeros(2, 3, 1, 1)})),
        r"stem\.basis\.weight is \(2, 3, 1, 1\) torch\.float32, the model has \(2, 3, 3, 3\)",
    ),
    "a tensor of another dtype": (
        lambda f: rewrite_weights(f, lambda t: t.update({"head.bias": t["head.bias"].double()})),
        r"head\.bias is \(4,\) torch\.float64, the model has \(4,\) torch\.float32",
    ),
    "another rank": (
        lambda f: edit(f, lambda c: c["layers"][0].update(ranks=[3])),
        r"is \(2, 3, 3, 3\)",
    ),
    "a layer made dense": (
        lambda f: edit(f, lambda c: c["layers"][0].update(form="dense", ranks=[], method="")),
        r"lacks \['stem\.weight'\]",
    ),
    "a layer less": (
        lambda f: edit(f, lambda c: c["layers"].pop() and c),
        "plan has 2 convolutions",
    ),
    "another name": (
        lambda f: edit(f, lambda c: c["layers"][0].update(name="stam")),
        r"plan's conv 1 \(stam\).* meets conv 1 \(stem\)",
    ),
    "another form": (lambda f: edit(f, lambda c: c["layers"][0].update(form="banana")), "'banana'"),
    "another format": (
        lambda f: edit(f, lambda c: c.update(format=99)),
        "format 99, this version",
    ),
    "graphs is a text": (lambda f: edit(f, lambda c: c.update(graphs="no")), "graphs is 'no'; save"),
    "graphs is missing": (lambda f: edit(f, lambda c: c.pop("graphs") and c), "graphs is None; save"),
    "arguments are a text": (lambda f: edit(f, lambda c: c.update(graphs={"": "x"})), "graphs is .*; save"),
    "argument is a number": (
        lambda f: edit(f, lambda c: c.update(graphs={"": {"given": [1], "calls": []}})),
        r"graphs is .*; save",
    ),
    "plan is a list": (lambda f: edit(f, lambda c: [c]), 'has no list "layers"'),
}


@pytest.mark.parametrize("key", DAMAGES)
def test_damaged_folder_is_refused(folder: Path, key: str) -> None:
    damage, message = DAMAGES[key]
    damage(folder)
    fresh = make(seed=3)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(PlanError, match=message):
        load(fresh, folder)
    assert list(fresh.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_signing_again_alone_is_no_damage(folder: Path) -> None:
    """Or the table above would prove nothing."""
    rewrite_weights(folder, lambda tensors: None)
    assert torch.equal(load(make(seed=3), folder)(X), small_net()(X))


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


class Untied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.alias = nn.Conv2d(8, 8, 3, padding=1)


def compressed_already() -> Any:
    return small_net()


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no convolutions": (lambda: nn.Linear(2, 2), "plan has 3 convolutions, Linear has 0; use the model"),
    "another net": (lambda: nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(3)]), r"meets conv 1 \(0\)"),
    "another head": (Wider, r"head\.(weight|bias) is \(4.*the model has \(5"),
    "another layer": (Deeper, r"lacks \['extra\.bias', 'extra\.weight'\]"),
    "untied": (Untied, "plan has 3 convolutions, Untied has 4"),
    "another dtype": (lambda: make().double(), r"float32, the model has .* torch\.float64; .*model\.to"),
}


@pytest.mark.parametrize("key", OTHERS)
def test_folder_of_another_model_is_refused(folder: Path, key: str) -> None:
    build, message = OTHERS[key]
    with pytest.raises(PlanError, match=message):
        load(build(), folder)


def test_a_compressed_model_in_place_of_a_fresh_one_is_refused(folder: Path) -> None:
    with pytest.raises(LayerError, match=r"is compressed already .*fold the model first"):
        load(compressed_already(), folder)


@pytest.mark.parametrize("below", ["file", "file/saved", "file/a/b"])
def test_folder_that_cannot_be_made_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match=r"cannot write .*file.*; give a path in a folder"):
        save(small_net(), tmp_path / below)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_file_that_cannot_be_replaced_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=rf"cannot write .*{name}.*; give a path"):
        save(small_net(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


FAILURES: dict[str, tuple[str, type[Exception], type[Exception]]] = {
    "disk full at the weights": ("save_file", OSError, UsageError),
    "interrupted at the weights": ("save_file", KeyboardInterrupt, KeyboardInterrupt),
    "disk full at the plan": ("_sha256", OSError, UsageError),
    "a plan that is no JSON": ("_sha256", TypeError, TypeError),
}


@pytest.mark.parametrize("key", FAILURES)
def test_nothing_half_written_stays(folder: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first save stands in the folder; the second one fails on its way."""
    name, error, seen = FAILURES[key]
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}

    def half(*args: Any, **_: Any) -> None:
        if name == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise error(28, "No space left on device")

    owner = fxbasis.stored_state if name == "save_file" else fxbasis.saving
    monkeypatch.setattr(owner, name, half)
    with pytest.raises(seen):
        save(quietly(compress, make(seed=8), X, layers="re:.*", size=1), folder)
    monkeypatch.undo()
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before


def test_failed_first_save_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fxbasis.stored_state, "save_file", full)
    with pytest.raises(UsageError, match=r"cannot write .*: No space left on device; give a path"):
        save(small_net(), tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []
