"""Every verb on tiny models: what it prints and writes, its exit code, and no traceback for a mistake."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxbasis.reporting
import fxbasis.timing
from fxbasis import Plan, VerificationError
from fxbasis.cli import main

VERBS = ("layers", "compress", "fold", "profile", "export", "measure", "demo")
FILES = sorted(
    [
        *("plan.json", "model.safetensors", "original.onnx", "compressed.onnx"),
        *("report.md", "report.json", "table.csv", "layers.png", "layers.svg"),
    ]
)
SIZE = ["--input", "2x3x8x8"]
KEEP = "--keep-if-slower"  # what is rewritten here is small, hence slower than dense

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3)
        self.down = nn.Conv2d(16, 32, 1)

    def forward(self, x):
        return self.down(F.relu(self.body(F.relu(self.bn(self.stem(x)))))).mean((2, 3))


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if x.shape[1] == 3 else x


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Standard(Net):
    def __init__(self):
        super().__init__()
        self.body = Standardised(16, 16, 3)

    def forward(self, x):
        return F.conv2d(super().forward(x)[:, :, None, None], torch.ones(2, 32, 1, 1)).flatten(1)


class Strings(Net):
    def forward(self, x):
        return "no tensor"


def net():
    torch.manual_seed(0)
    return Net()


def broken():
    net = Net()
    net.body.weight.data.fill_(float("nan"))
    return net


def fails():
    raise RuntimeError("no such checkpoint")


def number():
    return 3


def two_lines():
    class Shouts(Net):
        def forward(self, x):
            if x.sum() > 0 or True:
                raise ValueError("first line\\nsecond line")
    return Shouts()


standard = Standard
branching, strings, linear, needs = Branching, Strings, lambda: nn.Linear(8, 2), lambda size: Net()
one = lambda: nn.Conv2d(3, 16, 3)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "nets.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def net(source: Path) -> str:
    return f"{source}:net"


@pytest.fixture(scope="module")
def done(net: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``compress`` wrote, made once."""
    out = tmp_path_factory.mktemp("cli") / "done"
    options = ["--runs", "3", "--size", "4", KEEP]
    assert main(["compress", net, *SIZE, "--out", str(out), *options]) == 0
    return out


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse: --help, --version and mistakes in options
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def fails_with(result: tuple[int, str, str], code: int, message: str) -> None:
    """The exit code, one error on stderr that holds the message, and nothing on stdout."""
    found, out, err = result
    assert (found, out) == (code, "")
    assert message in err
    assert "error: " in err


def test_help_of_the_program_and_of_every_verb(run: Run) -> None:
    code, text, _ = run("--help")
    assert code == 0
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        code, text, _ = run(verb, "--help")
        assert code == 0
        assert "--json" in text
        assert verb == "demo" or "torchvision:NAME" in text


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"fxbasis {fxbasis.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VERB"),
        (["shrink", "x"], "invalid choice: 'shrink'"),
        (["layers"], "MODEL"),
        (["compress", "x:y"], "--out"),
        (["fold", "x:y", "--out", "f"], "--compressed"),
        (["layers", "x:y", "--colour"], "--colour"),
        (["measure", "x:y", "--runs", "many"], "--runs"),
        (["layers", "x:y", "--seed", "none"], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_in_the_command_are_code_2_with_usage(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "usage: fxbasis" in err


def test_layers_prints_the_numbered_table(run: Run, net: str) -> None:
    code, text, err = run("layers", net, *SIZE)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["1", "stem"], ["2", "body"], ["3", "down"]]
    macs = 2 * (8 * 8 * 16 * 27 + 6 * 6 * 16 * 144 + 6 * 6 * 32 * 16)
    assert lines[-1] == f"3 convolutions, {macs:,} MACs (FLOPs = 2 x MACs) for input 2x3x8x8"


def test_layers_as_json_and_csv(run: Run, net: str, tmp_path: Path) -> None:
    code, text, err = run("layers", net, *SIZE, "--json", "--csv", tmp_path / "t.csv")
    assert (code, err) == (0, "")
    columns = json.loads(text)
    assert (columns["name"], columns["index"]) == (["stem", "body", "down"], [1, 2, 3])
    assert columns["macs"][2] == 2 * 6 * 6 * 32 * 16
    assert columns["functional"] == []
    with (tmp_path / "t.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == columns["name"]


def test_layers_of_the_compressed_model(run: Run, net: str, done: Path) -> None:
    code, text, _ = run("layers", net, *SIZE, "--compressed", done, "--json")
    assert code == 0
    columns = json.loads(text)
    assert columns["status"] == ["compressed"] * 3
    assert columns["name"] == ["stem", "body", "down"]


def test_layers_lists_functional_convolutions(run: Run, source: Path) -> None:
    code, text, _ = run("layers", f"{source}:standard", *SIZE, "--json")
    assert code == 0
    columns = json.loads(text)
    assert columns["effective"] == [False, True, False]
    assert columns["reason"][1].endswith("effective_weights=True compresses that")
    (conv,) = columns["functional"]
    assert (conv["weight"], conv["macs"], conv["calls"]) == ([2, 32, 1, 1], 2 * 2 * 32, 1)
    assert f"{source}:" in conv["source"]
    assert "functional: not a Conv2d module" in run("layers", f"{source}:standard", *SIZE)[1]


@pytest.mark.parametrize("asked", [False, True])
def test_effective_weights(run: Run, source: Path, tmp_path: Path, asked: bool) -> None:
    options = [f"{source}:standard", *SIZE, "--out", tmp_path / "out", "--size", "4", "--runs", "3", KEEP]
    code, _, err = run("compress", *options, *["--effective-weights"] * asked)
    assert code == 0
    assert ("effective weight is rewritten" in err) == asked
    plan = Plan.from_json(tmp_path / "out" / "plan.json")
    assert [layer.rank for layer in plan] == [4, 4 * asked, 4]
    assert [layer.effective for layer in plan] == [False, asked, False]
    folded = run(
        "fold", f"{source}:standard", *SIZE, "--compressed", tmp_path / "out", "--out", tmp_path / "f"
    )
    assert folded[0] == 0


def test_layers_of_torchvision(run: Run) -> None:
    code, text, err = run("layers", "torchvision:squeezenet1_1", "--input", "1x3x32x32", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(text)["name"]) == 26


def test_compress_writes_exactly_the_seven_files(done: Path) -> None:
    assert sorted(entry.name for entry in done.iterdir()) == FILES
    assert [entry.name for entry in done.parent.iterdir()] == ["done"]


def test_compress_wrote_what_it_says(done: Path) -> None:
    plan = Plan.from_json(done / "plan.json")
    assert [(layer.name, layer.rank) for layer in plan] == [("stem", 4), ("body", 4), ("down", 4)]
    report = json.loads((done / "report.json").read_text())
    assert report["profile"]["counted"] == report["profile"]["macs"] < report["profile"]["macs_before"]
    assert report["original"]["runs"] == report["compressed"]["runs"] == 3
    assert report["size_bytes"]["compressed"] == (done / "compressed.onnx").stat().st_size
    assert all(difference["relative"] <= 1e-4 for difference in report["differences"].values())
    with (done / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["number"], row["name"], row["ranks"]) for row in rows] == [
        ("1", "stem", "4"),
        ("2", "body", "4"),
        ("3", "down", "4"),
    ]
    text = (done / "report.md").read_text()
    assert "3 of 3 convolutions are rewritten" in text


def test_compress_as_json_with_every_option(run: Run, net: str, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    options = ["--layers", "1-2", "--size", "0.25", "--method", "qr", "--form", "output", "--threads", "1"]
    options.append(KEEP)
    code, text, err = run("compress", net, *SIZE, "--out", out, "--runs", "3", *options, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["profile"]["layers"][0]["ranks"] == [4]
    layers = [(layer.rank, layer.method) for layer in Plan.from_json(out / "plan.json")]
    assert layers == [(4, "qr"), (4, "qr"), (0, "")]
    assert sorted(entry.name for entry in out.iterdir()) == FILES


def test_compress_by_a_plan_and_over_an_old_folder(run: Run, net: str, done: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run("compress", net, *SIZE, "--out", tmp_path, "--runs", "3", "--plan", done / "plan.json")
    assert (code, err) == (0, "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "report.md").read_text() != "old"
    assert Plan.from_json(tmp_path / "plan.json") == Plan.from_json(done / "plan.json")


@pytest.mark.parametrize("kept", [False, True])
def test_what_measures_slower_stays_dense_unless_it_is_to_be_kept(
    run: Run, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    asked: list[tuple[str, int]] = []

    def ratio(record: Any, form: str, ranks: Any, threads: int) -> float:
        asked.append((record.name, threads))
        return 1.31 if record.name == "body" else 0.5

    monkeypatch.setattr(fxbasis.timing, "time_ratio", ratio)
    options = ["--size", "4", "--runs", "3", "--threads", "2", *[KEEP] * kept]
    code, _, err = run("compress", net, *SIZE, "--out", tmp_path, *options)
    assert code == 0
    assert set(asked) == (set() if kept else {("stem", 2), ("body", 2), ("down", 2)})
    assert ("(body), weight (16, 16, 3, 3): rank 4 of the output form measured 1.31" in err) == (not kept)
    plan = Plan.from_json(tmp_path / "plan.json")
    assert [layer.rank for layer in plan] == [4, 4 * kept, 4]
    reason = "measured 1.31 times dense in ONNX Runtime, 2 threads"
    assert (reason in (tmp_path / "report.md").read_text()) == (not kept)


def test_warnings_are_one_line_each_on_stderr(run: Run, source: Path, tmp_path: Path) -> None:
    options = ["--layers", "3,2", "--size", "0.5", "--runs", "3", "--json", KEEP]
    code, text, err = run("compress", f"{source}:branching", *SIZE, "--out", tmp_path, *options)
    assert code == 0
    json.loads(text)
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("fxbasis: warning: Branching stays Python")
    assert lines[1].startswith(
        "fxbasis: warning: conv 3 (down), weight (32, 16, 1, 1): rank 16 costs 1.50 times"
    )


def test_fold_writes_weights_that_the_next_verb_reads(run: Run, net: str, done: Path, tmp_path: Path) -> None:
    file = tmp_path / "folded.safetensors"
    code, text, err = run("fold", net, *SIZE, "--compressed", done, "--out", file)
    assert (code, err) == (0, "")
    assert str(file) in text
    assert sorted(load_file(file)) == sorted(
        [
            *(f"{name}.{kind}" for name in ("stem", "body", "down") for kind in ("weight", "bias")),
            *(f"bn.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")),
            "bn.num_batches_tracked",
        ]
    )
    code, text, _ = run("layers", net, *SIZE, "--weights", file, "--json")
    assert code == 0
    assert json.loads(text)["status"] == ["ok"] * 3
    code, text, _ = run("fold", net, *SIZE, "--compressed", done, "--out", file, "--json")
    assert json.loads(text)["relative_difference"] <= 1e-5


def test_profile_before_and_after(run: Run, net: str, done: Path) -> None:
    code, text, err = run("profile", net, *SIZE, "--json")
    assert (code, err) == (0, "")
    before = json.loads(text)
    code, text, _ = run("profile", net, *SIZE, "--compressed", done, "--json")
    after = json.loads(text)
    assert before["macs"] == before["counted"] == after["macs_before"]
    assert after["macs"] == after["counted"] < before["macs"]
    code, text, _ = run("profile", net, *SIZE, "--compressed", done)
    assert "formula = count" in text


def test_profile_of_a_training_step(run: Run, net: str, done: Path) -> None:
    code, text, err = run("profile", net, "--input", "4x3x8x8", "--compressed", done, "--training", "--json")
    assert (code, err) == (0, "")
    step = json.loads(text)
    code, text, _ = run("profile", net, "--input", "4x3x8x8", "--compressed", done, "--json")
    assert 2 * json.loads(text)["macs"] < step["macs"] == step["counted"] < step["macs_before"]


def test_export_and_measure_the_files(run: Run, net: str, done: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.onnx"
    code, text, err = run(
        "export", net, *SIZE, "--compressed", done, "--out", file, "--static-batch", "--json"
    )
    assert (code, err) == (0, "")
    written = json.loads(text)
    assert written["size_bytes"] == file.stat().st_size
    assert not written["dynamic_batch"]
    assert written["relative_difference"] <= written["tolerance"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.onnx"]

    code, text, err = run("measure", file, done / "original.onnx", *SIZE, "--runs", "3", "--json")
    assert (code, err) == (0, "")
    times = json.loads(text)
    assert list(times) == [str(file), str(done / "original.onnx")]
    assert all(time["runs"] == 3 and time["batch"] == 2 for time in times.values())


def test_measure_in_eager_with_the_compressed_model(run: Run, net: str, done: Path) -> None:
    options = ["--runs", "3", "--runtime", "eager"]
    code, text, err = run("measure", net, *SIZE, "--compressed", done, *options)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert [line.split(": ")[0] for line in lines] == [net, str(done)]
    assert lines[0].endswith("1.000 of the first")


def test_weights_are_used(run: Run, net: str, tmp_path: Path) -> None:
    state = {"stem.weight": torch.zeros(16, 3, 3, 3)}
    save_file(state, tmp_path / "part.safetensors")
    result = run("layers", net, *SIZE, "--weights", tmp_path / "part.safetensors")
    fails_with(result, 2, "missing (")


def with_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return write


MODEL_MISTAKES: dict[str, tuple[str, str]] = {
    "no source": ("resnet18", "is not of the form source:name"),
    "unknown torchvision": ("torchvision:resnet1", "did you mean resnet18"),
    "missing file": ("/nowhere/nets.py:net", "no file /nowhere/nets.py"),
    "missing module": ("no_such_module_x:net", "cannot be imported"),
    "missing name": ("{source}:nett", "did you mean net"),
    "callable that raises": ("{source}:fails", "RuntimeError: no such checkpoint"),
    "callable of something else": ("{source}:number", "returned a int, not an nn.Module"),
    "callable with arguments": ("{source}:needs", "takes no argument"),
}


@pytest.mark.parametrize("verb", ["layers", "compress"])
@pytest.mark.parametrize("key", MODEL_MISTAKES)
def test_unusable_model_is_code_2(run: Run, source: Path, key: str, verb: str, tmp_path: Path) -> None:
    spec, message = MODEL_MISTAKES[key]
    out = ["--out", tmp_path / "out"] if verb == "compress" else []
    fails_with(run(verb, spec.format(source=source), *SIZE, *out), 2, message)
    assert list(tmp_path.iterdir()) == []


INPUTS = {
    "text": ("small", "write batch, channels, height and width"),
    "two sizes": ("3x8", "write batch"),
    "zero": ("1x0x8x8", "write batch"),
    "wrong channels": ("1x4x8x8", "the model failed on the example inputs ((1, 4, 8, 8) float32 cpu)"),
    "too small": ("1x3x1x1", "pass inputs of the shape"),
    "too large": ("99999x99999x99999x99999", "does not fit into memory"),
}


@pytest.mark.parametrize("verb", ["layers", "compress", "profile", "export", "measure"])
@pytest.mark.parametrize("key", INPUTS)
def test_wrong_input_is_code_2_and_writes_nothing(
    run: Run, net: str, key: str, verb: str, tmp_path: Path
) -> None:
    text, message = INPUTS[key]
    out = {"compress": ["--out", tmp_path / "o"], "export": ["--out", tmp_path / "o.onnx"]}.get(verb, [])
    fails_with(run(verb, net, "--input", text, *out), 2, message)
    assert list(tmp_path.iterdir()) == []


CHOICES: dict[str, tuple[list[str], str]] = {
    "unknown name": (["--layers", "stam"], "close matches: stem"),
    "index 0": (["--layers", "0"], "conv 0 does not exist"),
    "past the end": (["--layers", "2-9"], "conv 9 does not exist"),
    "empty selection": (["--layers", ""], "the selection is empty"),
    "pattern of nothing": (["--layers", "re:x"], "matches no whole name"),
    "size 0": (["--size", "0"], "size=0 is neither"),
    "size 1.5": (["--size", "1.5"], "size=1.5 is neither"),
    "size -3": (["--size", "-3"], "size=-3 is neither"),
    "size half": (["--size", "half"], "size='half' is neither"),
    "size nan": (["--size", "nan"], "size=nan is neither"),
    "rank above the cap": (["--layers", "1", "--size", "17"], "rank 17 exceeds 16"),
    "unknown form": (["--form", "banana"], "form='banana' is not known"),
    "unknown method": (["--method", "pca"], "method='pca' is not known"),
    "missing plan": (["--plan", "/nowhere/plan.json"], "cannot read /nowhere/plan.json"),
    "no runs": (["--runs", "0"], "--runs"),
    "no threads": (["--threads", "0"], "--threads"),
}


@pytest.mark.parametrize("key", CHOICES)
def test_wrong_choice_is_code_2_and_writes_nothing(run: Run, net: str, key: str, tmp_path: Path) -> None:
    options, message = CHOICES[key]
    fails_with(run("compress", net, *SIZE, "--out", tmp_path / "out", *options), 2, message)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_named(run: Run, source: Path, tmp_path: Path) -> None:
    result = run("compress", f"{source}:broken", *SIZE, "--out", tmp_path / "out")
    fails_with(result, 2, "conv 2 (body), weight (16, 16, 3, 3): 2304 of its weights are NaN")
    assert list(tmp_path.iterdir()) == []


def test_model_without_convolutions_cannot_be_reported(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", f"{source}:linear", "--input", "2x3x8x8", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "no Conv2d" in err
    assert list(tmp_path.iterdir()) == []


def test_plan_of_another_model_is_code_2(run: Run, source: Path, done: Path, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "out", "--plan", done / "plan.json"]
    result = run("compress", f"{source}:one", *SIZE, *options)
    fails_with(result, 2, "the plan has 3 convolutions, Conv2d has 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["layers", "fold", "profile", "export", "measure"])
def test_damaged_or_missing_compressed_folder_is_code_2(
    run: Run, net: str, done: Path, verb: str, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "file"] if verb in ("fold", "export") else []
    fails_with(run(verb, net, *SIZE, *out, "--compressed", tmp_path / "none"), 2, "cannot read")
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "plan.json").write_bytes((done / "plan.json").read_bytes())
    (folder / "model.safetensors").write_bytes((done / "model.safetensors").read_bytes()[:-1])
    fails_with(run(verb, net, *SIZE, *out, "--compressed", folder), 2, "SHA-256 differs")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


UNWRITABLE: dict[str, list[str]] = {
    "compress": ["--runs", "3", "--out", "{}/folder"],
    "fold": ["--compressed", "{done}", "--out", "{}/folded.safetensors"],
    "export": ["--out", "{}/model.onnx"],
    "layers": ["--csv", "{}/table.csv"],
}


@pytest.mark.parametrize("verb", UNWRITABLE)
def test_unwritable_path_is_code_2(run: Run, net: str, done: Path, verb: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    options = [option.format(tmp_path / "file", done=done) for option in UNWRITABLE[verb]]
    fails_with(run(verb, net, *SIZE, *options), 2, f"cannot write {tmp_path}/file")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.onnx"], "missing.onnx is not a file"),
        (["{net}", "--runtime", "tensorrt"], "tensorrt"),
        (["{net}", "--runs", "0"], "--runs"),
        (["{net}", "--threads", "-1"], "--threads"),
        (["{done}/compressed.onnx", "--runtime", "eager"], "cannot run in eager PyTorch"),
        (["{done}/compressed.onnx", "--compressed", "{done}"], "--compressed needs a model"),
        (["{net}", "{net}2", "--weights", "w.safetensors"], "--weights fits one model only"),
        (["{done}/report.md.onnx"], "is not a file"),
    ],
    ids=["missing file", "runtime", "runs", "threads", "eager file", "compressed file", "weights", "other"],
)
def test_mistakes_in_measure_are_code_2(
    run: Run, net: str, done: Path, arguments: list[str], message: str
) -> None:
    fails_with(run("measure", *(a.format(net=net, done=done) for a in arguments), *SIZE), 2, message)


def test_broken_promise_is_code_1_and_writes_nothing(
    run: Run, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*_: Any, **__: Any) -> None:
        raise VerificationError("folded model: outputs differ by 1.00e+00; please report the model")

    monkeypatch.setattr(fxbasis.reporting, "check_all", differ)
    result = run("compress", net, *SIZE, "--runs", "3", "--out", tmp_path / "out", KEEP)
    fails_with(result, 1, "outputs differ by 1.00e+00")
    assert list(tmp_path.iterdir()) == []


def test_failed_export_is_code_1_and_keeps_what_was_there(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    options = ["--runs", "3", "--out", tmp_path, KEEP]
    code, out, err = run("compress", f"{source}:strings", *SIZE, *options)
    assert (code, out) in ((1, ""), (2, ""))
    assert "fxbasis: error: " in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "mine"


def test_interruption_is_quiet_and_writes_nothing(
    run: Run, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fxbasis.reporting, "measure", interrupt)
    code, out, err = run("compress", net, *SIZE, "--out", tmp_path / "out", KEEP)
    assert (code, out, err.splitlines()[-1]) == (130, "", "fxbasis: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_models_own_message_is_kept(run: Run, source: Path) -> None:
    code, _, err = run("layers", f"{source}:two_lines", *SIZE)
    assert code == 2
    assert "ValueError: first line" in err


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", "fxbasis", *map(str, arguments)],
        text=True,
        timeout=120,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=False,
        stderr=subprocess.PIPE,
        **options,
    )


def test_as_a_process(net: str, tmp_path: Path) -> None:
    done = command("layers", net, *SIZE, "--json", cwd=tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["name"] == ["stem", "body", "down"]
    failed = command("layers", f"{net}2", *SIZE, cwd=tmp_path, stdout=subprocess.PIPE)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("fxbasis: error: ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX pipe")
def test_reader_that_goes_away_is_no_error(net: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = command("layers", net, *SIZE, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "0"], "'0' is no whole number from 1"),
        (["--seed", "-1"], "'-1' is no whole number from 0"),
        (["--seed", str(2**32)], "is no whole number from 0 to 4294967295"),
    ],
)
def test_numbers_out_of_range_are_code_2(
    net: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compress", net, "--out", str(tmp_path / "o"), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_and_a_selection_exclude_each_other(run: Run, net: str, done: Path, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "o", "--plan", done / "plan.json", "--layers", "1", "--size", "2"]
    fails_with(run("compress", net, *SIZE, *options), 2, "--plan decides instead of --layers, --size")


def test_two_ways_to_say_the_rank_are_refused(run: Run, net: str, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "o", "--size", "2", "--macs-ratio", "0.5"]
    fails_with(run("compress", net, *SIZE, *options), 2, "--size and --macs-ratio both say the rank")


def test_a_model_named_twice_is_refused(run: Run, net: str) -> None:
    fails_with(run("measure", net, net, *SIZE), 2, "is named more than once")
