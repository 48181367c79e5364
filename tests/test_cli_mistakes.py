"""Mistakes at the command line: exit code 2, one error that names the remedy, nothing written."""

from pathlib import Path

import pytest
import torch
from cli_runs import SIZE, Run, error_of
from safetensors.torch import save_file

from fxbasis.cli import main


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


def test_weights_are_used(run: Run, tiny: str, tmp_path: Path) -> None:
    state = {"stem.weight": torch.zeros(16, 3, 3, 3)}
    save_file(state, tmp_path / "part.safetensors")
    result = run("layers", tiny, *SIZE, "--weights", tmp_path / "part.safetensors")
    assert "missing (" in error_of(result, 2)


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
    assert message in error_of(run(verb, spec.format(source=source), *SIZE, *out), 2)
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
    run: Run, tiny: str, key: str, verb: str, tmp_path: Path
) -> None:
    text, message = INPUTS[key]
    out = {"compress": ["--out", tmp_path / "o"], "export": ["--out", tmp_path / "o.onnx"]}.get(verb, [])
    assert message in error_of(run(verb, tiny, "--input", text, *out), 2)
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
def test_wrong_choice_is_code_2_and_writes_nothing(run: Run, tiny: str, key: str, tmp_path: Path) -> None:
    options, message = CHOICES[key]
    assert message in error_of(run("compress", tiny, *SIZE, "--out", tmp_path / "out", *options), 2)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_named(run: Run, source: Path, tmp_path: Path) -> None:
    result = run("compress", f"{source}:broken", *SIZE, "--out", tmp_path / "out")
    assert "conv 2 (body), weight (16, 16, 3, 3): 2304 of its weights are NaN" in error_of(result, 2)
    assert list(tmp_path.iterdir()) == []


def test_model_without_convolutions_cannot_be_reported(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", f"{source}:linear", "--input", "2x3x8x8", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "no Conv2d" in err
    assert list(tmp_path.iterdir()) == []


def test_plan_of_another_model_is_code_2(run: Run, source: Path, done: Path, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "out", "--plan", done / "plan.json"]
    result = run("compress", f"{source}:one", *SIZE, *options)
    assert "the plan has 3 convolutions, Conv2d has 1" in error_of(result, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["layers", "fold", "profile", "export", "measure"])
def test_damaged_or_missing_compressed_folder_is_code_2(
    run: Run, tiny: str, done: Path, verb: str, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "file"] if verb in ("fold", "export") else []
    assert "cannot read" in error_of(run(verb, tiny, *SIZE, *out, "--compressed", tmp_path / "none"), 2)
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "plan.json").write_bytes((done / "plan.json").read_bytes())
    (folder / "model.safetensors").write_bytes((done / "model.safetensors").read_bytes()[:-1])
    assert "SHA-256 differs" in error_of(run(verb, tiny, *SIZE, *out, "--compressed", folder), 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


UNWRITABLE: dict[str, list[str]] = {
    "compress": ["--runs", "3", "--out", "{}/folder"],
    "fold": ["--compressed", "{done}", "--out", "{}/folded.safetensors"],
    "export": ["--out", "{}/model.onnx"],
    "layers": ["--csv", "{}/table.csv"],
}


@pytest.mark.parametrize("verb", UNWRITABLE)
def test_unwritable_path_is_code_2(run: Run, tiny: str, done: Path, verb: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    options = [option.format(tmp_path / "file", done=done) for option in UNWRITABLE[verb]]
    assert f"cannot write {tmp_path}/file" in error_of(run(verb, tiny, *SIZE, *options), 2)
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
    run: Run, tiny: str, done: Path, arguments: list[str], message: str
) -> None:
    assert message in error_of(run("measure", *(a.format(net=tiny, done=done) for a in arguments), *SIZE), 2)


OUTS = {
    "fold": ["--compressed", "{done}"],
    "compress": ["--runs", "3"],
    "plan": ["--macs", "0.5"],
    "export": [],
    "demo": [],
}


@pytest.mark.parametrize("verb", OUTS)
@pytest.mark.parametrize(
    ("name", "message"), [("", "--out: an empty text is no path"), ("a" * 300, "too long")]
)
def test_a_name_that_no_file_can_have_is_code_2(
    run: Run,
    tiny: str,
    done: Path,
    verb: str,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [] if verb == "demo" else [tiny, *SIZE, *(option.format(done=done) for option in OUTS[verb])]
    assert message in error_of(run(verb, *options, "--out", name), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--csv", "--compressed", "--weights"])
def test_an_empty_path_is_not_taken_for_none(run: Run, tiny: str, option: str) -> None:
    assert f"{option}: an empty text is no path" in error_of(run("layers", tiny, *SIZE, option, ""), 2)


def test_models_own_message_is_kept(run: Run, source: Path) -> None:
    code, _, err = run("layers", f"{source}:two_lines", *SIZE)
    assert code == 2
    assert "ValueError: first line" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "0"], "'0' is no whole number from 1"),
        (["--seed", "-1"], "'-1' is no whole number from 0"),
        (["--seed", str(2**32)], "is no whole number from 0 to 4294967295"),
    ],
)
def test_numbers_out_of_range_are_code_2(
    tiny: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compress", tiny, "--out", str(tmp_path / "o"), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_and_a_selection_exclude_each_other(run: Run, tiny: str, done: Path, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "o", "--plan", done / "plan.json", "--layers", "1", "--size", "2"]
    assert "--plan decides instead of --layers, --size" in error_of(run("compress", tiny, *SIZE, *options), 2)


def test_two_ways_to_say_the_rank_are_refused(run: Run, tiny: str, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "o", "--size", "2", "--macs-ratio", "0.5"]
    assert "--size and --macs-ratio both say the rank" in error_of(run("compress", tiny, *SIZE, *options), 2)


def test_a_model_named_twice_is_refused(run: Run, tiny: str) -> None:
    assert "is named more than once" in error_of(run("measure", tiny, tiny, *SIZE), 2)
