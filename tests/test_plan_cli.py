"""The verbs that plan, on a tiny model: files for the next verb, exit codes, one line for a mistake."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fxbasis.latency
import fxbasis.timing
from fxbasis import Plan
from fxbasis.cli import main
from fxbasis.passes.records import ConvRecord

INPUT = ["--input", "2x3x8x8"]
QUICK = ["--forms", "gauge"]
CALIBRATION = ["--calibration", "images"]
RUNS = ["--runs", "3"]
SOURCE = """
import torch
from torch import nn

CALLS = []


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten())


def net():
    torch.manual_seed(0)
    return Net().eval()


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def score(model):
    with open("calls.txt", "a") as file:
        file.write("x")
    return float(model(torch.ones(1, 3, 8, 8)).sum())
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(SOURCE)
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).save(folder / f"{number}.png")

    def run_line(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(list(arguments))
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_line


def result(run: Run, *arguments: str) -> Any:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_sensitivities_prints_and_writes_a_table(run: Run) -> None:
    code, out, _ = run("sensitivities", "tiny.py:net", *INPUT, *QUICK, *CALIBRATION, "--csv", "table.csv")
    assert code == 0
    assert "change: fisher, nats, over 6 images" in out
    with open("table.csv") as file:
        assert {row["form"] for row in csv.DictReader(file)} == {"gauge"}
    found = result(
        run, "sensitivities", "tiny.py:net", *INPUT, *QUICK, "--layers", "2", "--estimator", "weight"
    )
    assert {row["number"] for row in found["rows"]} == {2}


def test_a_score_from_a_file_resumes(run: Run) -> None:
    line = ["sensitivities", "tiny.py:net", *INPUT, *QUICK, "--evaluate", "tiny.py:score"]
    first = result(run, *line, "--jsonl", "points.jsonl")
    calls = Path("calls.txt").read_text()
    assert result(run, *line, "--jsonl", "points.jsonl") == first
    assert Path("calls.txt").read_text() == calls
    assert first["estimator"] == "evaluate"
    assert result(run, *line, "--minutes", "0")["missing"] == len(first["rows"])


def test_a_plan_is_a_file_that_compress_reads(run: Run) -> None:
    line = [*INPUT, *QUICK, *CALIBRATION, "--images", "4", "--macs", "0.6", "--out", "plan.json"]
    found = result(run, "plan", "tiny.py:net", *line, "--keep-if-slower")
    assert found["forecast"]["asked"] == {"macs": 0.6}
    assert found["forecast"]["macs"] <= 0.6
    assert found["forecast"]["images"] == 4
    assert Plan.from_json("plan.json").to_dict() == Plan.from_dict(found).to_dict()
    line = ["compress", "tiny.py:net", *INPUT, *RUNS, "--keep-if-slower"]
    done = result(run, *line, "--plan", "plan.json", "--out", "small")
    assert "fit" not in done["forecast"]
    done = result(run, *line, "--plan", "plan.json", *CALIBRATION, "--out", "fitted")
    assert done["forecast"]["fit"]["images"] == 6
    assert done["profile"]["macs"] / done["profile"]["macs_before"] == found["forecast"]["macs"]
    assert "fit" not in result(run, *line, "--plan", "fitted/plan.json", "--out", "again")["forecast"]


def test_compress_plans_and_fits_by_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["compress", "tiny.py:net", *INPUT, *QUICK, *RUNS, *CALIBRATION, "--macs", "0.6", "--out", "small"]
    monkeypatch.setattr(fxbasis.latency, "_measured", lambda *_: 0.8)  # of the original's time
    monkeypatch.setattr(fxbasis.latency, "layer_ms", lambda record, form, *_: 0.5 + (form == "dense"))
    code, out, err = run(*line)
    assert code == 0, err
    assert "written to small" in out
    text = Path("small/report.md").read_text()
    assert "Planned for MACs at most 0.6" in text
    assert "Fitted to 6 images" in text
    assert "Calibration images of images were prepared by mean (0.485" in text
    assert "promise failed: MACs" not in text
    for verb, out in (("profile", []), ("fold", ["--out", "folded.safetensors"])):
        code, _, err = run(verb, "tiny.py:net", *INPUT, "--compressed", "small", *out)
        assert code == 0, err


def test_largest_drop_score_and_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["plan", "tiny.py:net", *INPUT, *QUICK, "--out", "plan.json"]
    found = result(run, *line, *CALIBRATION, "--max-drop", "0.01", "--keep-if-slower")["forecast"]
    assert found["change"] <= 0.01
    code, out, err = run(*line, "--evaluate", "tiny.py:score", "--macs", "0.7", "--keep-if-slower")
    assert code == 0, err
    assert "of the score (evaluate; before the sequential refit; the best of these candidates)" in out
    monkeypatch.setattr(fxbasis.latency, "layer_ms", lambda record, form, ranks, threads: record.macs / 1e6)
    monkeypatch.setattr(fxbasis.latency, "_measured", lambda *_: 0.65)
    assert result(run, *line, *CALIBRATION, "--latency", "0.7")["forecast"]["measured latency"] == 0.65


def test_a_plan_keeps_its_budget_in_compress(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {1: 2.0, 2: 0.5}  # times of dense: the first layer is slower in every form

    def took(record: ConvRecord, form: str, *_: object) -> float:
        return 1.0 if form == "dense" else slow[record.index]

    monkeypatch.setattr(fxbasis.latency, "layer_ms", took)
    monkeypatch.setattr(fxbasis.timing, "time_ratio", lambda record, *_: slow[record.index])
    monkeypatch.setattr(fxbasis.latency, "_measured", lambda *_: 0.8)
    line = ["tiny.py:net", *INPUT, *QUICK, *CALIBRATION]
    found = result(run, "plan", *line, "--macs", "0.6", "--out", "plan.json")
    assert [layer["form"] for layer in found["layers"]] == ["dense", "gauge"]
    done = result(
        run, "compress", "tiny.py:net", *INPUT, *RUNS, *CALIBRATION, "--plan", "plan.json", "--out", "s"
    )
    assert done["profile"]["macs"] <= 0.6 * done["profile"]["macs_before"]


def test_images_are_prepared_by_the_transform_beside_the_model(run: Run) -> None:
    with open("tiny.py", "a") as file:
        file.write("\n\ntransform = lambda image: torch.full((3, 8, 8), float(image.size[0]))\n")
    line = ["compress", "tiny.py:net", *INPUT, *QUICK, *RUNS, *CALIBRATION, "--macs", "0.6", "--out", "small"]
    done = result(run, *line, "--keep-if-slower")
    assert done["forecast"]["fit"]["images"] == 6
    assert "of images were prepared by the transform of tiny.py" in Path("small/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--out", "p.json"], "pass macs=, params=, latency= or max_drop="),
        (["plan", "--out", "p.json", "--macs", "0.01"], "cannot be reached: the least is 0."),
        (["plan", "--out", "p.json", "--macs", "7"], "pass for example macs=0.5"),
        (["plan", "--out", "p.json", "--macs", "0.5", "--max-drop", "1"], "pass one of them"),
        (["plan", "--out", "nowhere/p.json", "--macs", "0.5"], "nowhere"),
        (["plan", "--out", "p.json", "--macs", "0.5", "--calibration", "none"], "name a folder of images"),
        (["plan", "--out", "p.json", "--macs", "0.5", "--estimator", "fisher"], "needs calibration="),
        (["plan", "--out", "p.json", "--macs", "0.5", "--forms", "cup"], "cannot be planned; choose of"),
        (["plan", "--out", "p.json", "--macs", "0.5", "--evaluate", "score"], "write module:function"),
        (["plan", "--out", "p.json", "--macs", "0.5", "--evaluate", "tiny.py:no"], "name one that takes"),
        (["sensitivities", "--layers", "9"], "conv 9 does not exist"),
        (["sensitivities", "--csv", "nowhere/table.csv"], "nowhere"),
        (["sensitivities", "--estimator", "measured"], "needs calibration="),
        (["compress", "--out", "d", "--macs", "0.5", "--size", "4"], "--size and --macs both say the rank"),
        (["compress", "--out", "d", "--macs", "0.5", "--form", "gauge"], "pass forms= instead of form="),
        (["compress", "--out", "d", "--macs", "0.5", "--plan", "p.json"], "--plan decides instead of --macs"),
        (["compress", "--out", "d", "--forms", "gauge"], "pass a budget too"),
        (["compress", "--out", "d", "--plan", "missing.json"], "cannot read missing.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    verb, *rest = arguments
    code, out, err = run(verb, "tiny.py:net", *INPUT, *rest)
    assert (code, out) == (2, "")
    told = err.rpartition("\r")[2]  # behind the progress bar, on slow machines
    assert message in told
    assert told.startswith("fxbasis: error: ")
    assert told.count("\n") == 1


def test_a_model_without_convolutions(run: Run) -> None:
    code, _, err = run("plan", "tiny.py:linear", *INPUT, "--macs", "0.5", "--out", "p.json")
    assert code == 2
    assert "nothing to plan" in err


def test_help_names_every_verb_as_the_readme_does(run: Run) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    _, out, _ = run("--help")
    for verb in ("sensitivities", "plan"):
        assert re.search(rf"^ +{verb}$|^ +{verb}  ", out, re.MULTILINE)
        assert f"| {verb} |" in readme
        assert run(verb, "--help")[0] == 0
