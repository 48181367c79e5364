"""The verb compress: what it writes and says, and that nothing is written when it breaks off."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import KEEP, SIZE, Run, error_of

import fxbasis.reporting
import fxbasis.timing
from fxbasis import Plan, VerificationError

FILES = sorted(
    [
        *("plan.json", "model.safetensors", "original.onnx", "compressed.onnx"),
        *("report.md", "report.json", "table.csv", "layers.png", "layers.svg"),
    ]
)


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


def test_compress_as_json_with_every_option(run: Run, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    options = ["--layers", "1-2", "--size", "0.25", "--method", "qr", "--form", "output", "--threads", "1"]
    options.append(KEEP)
    code, text, err = run("compress", tiny, *SIZE, "--out", out, "--runs", "3", *options, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["profile"]["layers"][0]["ranks"] == [4]
    layers = [(layer.rank, layer.method) for layer in Plan.from_json(out / "plan.json")]
    assert layers == [(4, "qr"), (4, "qr"), (0, "")]
    assert sorted(entry.name for entry in out.iterdir()) == FILES


def test_compress_by_a_plan_and_over_an_old_folder(run: Run, tiny: str, done: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    line = ["compress", tiny, *SIZE, "--out", tmp_path, "--runs", "3", "--plan", done / "plan.json"]
    code, _, err = run(*line, KEEP)
    assert (code, err) == (0, "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "report.md").read_text() != "old"
    assert Plan.from_json(tmp_path / "plan.json") == Plan.from_json(done / "plan.json")


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_what_measures_slower_stays_dense_unless_it_is_to_be_kept(
    run: Run,
    tiny: str,
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
    planned: bool,
) -> None:
    asked: list[tuple[str, int]] = []

    def ratio(record: Any, form: str, ranks: Any, threads: int) -> float:
        asked.append((record.name, threads))
        return 1.31 if record.name == "body" else 0.5

    monkeypatch.setattr(fxbasis.timing, "time_ratio", ratio)
    rank = ["--plan", done / "plan.json"] if planned else ["--size", "4"]
    options = [*rank, "--runs", "3", "--threads", "2", *[KEEP] * kept]
    code, _, err = run("compress", tiny, *SIZE, "--out", tmp_path, *options)
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


def test_broken_promise_is_code_1_and_writes_nothing(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*_: Any, **__: Any) -> None:
        raise VerificationError("folded model: outputs differ by 1.00e+00; please report the model")

    monkeypatch.setattr(fxbasis.reporting, "check_all", differ)
    result = run("compress", tiny, *SIZE, "--runs", "3", "--out", tmp_path / "out", KEEP)
    assert "outputs differ by 1.00e+00" in error_of(result, 1)
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
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fxbasis.reporting, "measure", interrupt)
    code, out, err = run("compress", tiny, *SIZE, "--out", tmp_path / "out", KEEP)
    assert (code, out, err.splitlines()[-1]) == (130, "", "fxbasis: interrupted")
    assert list(tmp_path.iterdir()) == []
