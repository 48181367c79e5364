"""The verbs on tiny models: what they print and write; compress and the mistakes have their own files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import SIZE, Run
from safetensors.torch import load_file

import fxbasis

VERBS = ("layers", "compress", "fold", "profile", "export", "measure", "demo")


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


def test_layers_prints_the_numbered_table(run: Run, tiny: str) -> None:
    code, text, err = run("layers", tiny, *SIZE)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["1", "stem"], ["2", "body"], ["3", "down"]]
    macs = 2 * (8 * 8 * 16 * 27 + 6 * 6 * 16 * 144 + 6 * 6 * 32 * 16)
    assert lines[-1] == f"3 convolutions, {macs:,} MACs (FLOPs = 2 x MACs) for input 2x3x8x8"


def test_layers_as_json_and_csv(run: Run, tiny: str, tmp_path: Path) -> None:
    code, text, err = run("layers", tiny, *SIZE, "--json", "--csv", tmp_path / "t.csv")
    assert (code, err) == (0, "")
    columns = json.loads(text)
    assert (columns["name"], columns["index"]) == (["stem", "body", "down"], [1, 2, 3])
    assert columns["macs"][2] == 2 * 6 * 6 * 32 * 16
    assert columns["functional"] == []
    with (tmp_path / "t.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == columns["name"]


def test_layers_of_the_compressed_model(run: Run, tiny: str, done: Path) -> None:
    code, text, _ = run("layers", tiny, *SIZE, "--compressed", done, "--json")
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


def test_layers_of_torchvision(run: Run) -> None:
    code, text, err = run("layers", "torchvision:squeezenet1_1", "--input", "1x3x32x32", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(text)["name"]) == 26


def test_fold_writes_weights_that_the_next_verb_reads(
    run: Run, tiny: str, done: Path, tmp_path: Path
) -> None:
    file = tmp_path / "folded.safetensors"
    code, text, err = run("fold", tiny, *SIZE, "--compressed", done, "--out", file)
    assert (code, err) == (0, "")
    assert str(file) in text
    assert sorted(load_file(file)) == sorted(
        [
            *(f"{name}.{kind}" for name in ("stem", "body", "down") for kind in ("weight", "bias")),
            *(f"bn.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")),
            "bn.num_batches_tracked",
        ]
    )
    code, text, _ = run("layers", tiny, *SIZE, "--weights", file, "--json")
    assert code == 0
    assert json.loads(text)["status"] == ["ok"] * 3
    code, text, _ = run("fold", tiny, *SIZE, "--compressed", done, "--out", file, "--json")
    assert json.loads(text)["relative_difference"] <= 1e-5


def test_profile_before_and_after(run: Run, tiny: str, done: Path) -> None:
    code, text, err = run("profile", tiny, *SIZE, "--json")
    assert (code, err) == (0, "")
    before = json.loads(text)
    code, text, _ = run("profile", tiny, *SIZE, "--compressed", done, "--json")
    after = json.loads(text)
    assert before["macs"] == before["counted"] == after["macs_before"]
    assert after["macs"] == after["counted"] < before["macs"]
    code, text, _ = run("profile", tiny, *SIZE, "--compressed", done)
    assert "formula = count" in text


def test_profile_of_a_training_step(run: Run, tiny: str, done: Path) -> None:
    code, text, err = run("profile", tiny, "--input", "4x3x8x8", "--compressed", done, "--training", "--json")
    assert (code, err) == (0, "")
    step = json.loads(text)
    code, text, _ = run("profile", tiny, "--input", "4x3x8x8", "--compressed", done, "--json")
    assert 2 * json.loads(text)["macs"] < step["macs"] == step["counted"] < step["macs_before"]


def test_export_and_measure_the_files(run: Run, tiny: str, done: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.onnx"
    code, text, err = run(
        "export", tiny, *SIZE, "--compressed", done, "--out", file, "--static-batch", "--json"
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


def test_measure_in_eager_with_the_compressed_model(run: Run, tiny: str, done: Path) -> None:
    options = ["--runs", "3", "--runtime", "eager"]
    code, text, err = run("measure", tiny, *SIZE, "--compressed", done, *options)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert [line.split(": ")[0] for line in lines] == [tiny, str(done)]
    assert lines[0].endswith("1.000 of the first")


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


def test_as_a_process(tiny: str, tmp_path: Path) -> None:
    done = command("layers", tiny, *SIZE, "--json", cwd=tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["name"] == ["stem", "body", "down"]
    failed = command("layers", f"{tiny}2", *SIZE, cwd=tmp_path, stdout=subprocess.PIPE)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("fxbasis: error: ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX pipe")
def test_reader_that_goes_away_is_no_error(tiny: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = command("layers", tiny, *SIZE, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_model_prints_is_not_in_the_json(run: Run, source: Path) -> None:
    code, text, err = run("doctor", f"{source}:prints", *SIZE, "--json")
    assert code == 0
    assert len(json.loads(text)["convs"]) == 3
    assert "built" in err
    assert "runs" in err
