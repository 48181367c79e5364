"""measure: what is timed, in which turns, and what it says about itself."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fxbasis.errors import ExportError, FxBasisWarning, InputError
from fxbasis.export import checking, exporters, measuring, runners
from fxbasis.export.exporting import export_onnx
from fxbasis.export.measuring import WARM_UP, Latency, measure

CALLS: list[str] = []


class Logged(nn.Module):
    """Notes each run, under a name that a deep copy keeps, and takes a known time."""

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        super().__init__()
        self.name, self.seconds, self.conv = name, seconds, nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(self.name)
        time.sleep(self.seconds)
        return self.conv(x)


class Named(nn.Module):
    def forward(self, x: torch.Tensor, *, gain: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": x * gain}


@pytest.fixture
def calls() -> list[str]:
    CALLS.clear()
    return CALLS


@pytest.fixture(scope="module")
def conv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "conv.onnx"
    return export_onnx(nn.Conv2d(3, 4, 3), image(), path).path


@pytest.fixture(scope="module")
def named_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "named.onnx"
    return export_onnx(Named(), {"x": torch.ones(2, 3), "gain": torch.ones(2, 3)}, path).path


def image(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8)


def latency(*samples_ms: float) -> Latency:
    runner = runners.Runner(lambda: None, "test", 1_500_000)
    return measuring._latency(samples_ms, runner, 1, 2)


def test_quartiles_and_words() -> None:
    found = latency(4.0, 1.0, 3.0, 2.0, 100.0)
    assert (found.lower_quartile_ms, found.median_ms, found.upper_quartile_ms) == (2.0, 3.0, 4.0)
    assert found.samples_ms == (4.0, 1.0, 3.0, 2.0, 100.0)
    conditions = "5 runs after 3 of warm-up, batch 2, 1 thread, test, 1.50 MB"
    assert str(found) == f"3.000 ms median (quartiles 2.000 to 4.000; {conditions})"
    assert json.loads(json.dumps(found.to_dict()))["samples_ms"] == [4.0, 1.0, 3.0, 2.0, 100.0]


def test_ratio_is_taken_round_by_round() -> None:
    a, b = latency(1.0, 10.0, 3.0), latency(2.0, 20.0, 2.0)
    assert a.ratio_to(b) == 0.5
    assert a.median_ms / b.median_ms == 1.5
    assert b.ratio_to(a) == 2.0
    with pytest.raises(ExportError, match=r"3 runs cannot be paired with 2; measure both models in one call"):
        a.ratio_to(latency(1.0, 2.0))


def test_two_models_take_turns(calls: list[str]) -> None:
    models = {"a": Logged("a", 0.004), "b": Logged("b")}
    found = measure(models, image(), runs=4, runtime="eager")
    assert list(found) == ["a", "b"]
    assert calls[:2] == ["a", "b"], "one run of each, which tells whether the inputs fit"
    assert calls[2:] == ["a", "b"] * WARM_UP + ["a", "b", "b", "a", "b", "a", "a", "b"]
    assert 4 <= found["a"].median_ms < 40
    assert found["b"].median_ms < 4
    assert found["a"].ratio_to(found["b"]) > 1


def test_every_model_runs_in_every_place() -> None:
    orders = [measuring._order(3, turn) for turn in range(6)]
    assert [sorted(order) for order in orders] == [[0, 1, 2]] * 6
    assert [sorted(places) for places in zip(*orders, strict=True)] == [[0, 0, 1, 1, 2, 2]] * 3
    assert [measuring._order(1, turn) for turn in range(2)] == [[0], [0]]


def test_eager_leaves_model_threads_modes_and_random_state() -> None:
    class Caching(nn.Module):
        cache: torch.Tensor | None = None

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.get_num_threads(), torch.is_inference_mode_enabled()))
            self.cache = self.norm(x + torch.rand(1))
            return self.cache

    seen: list[tuple[bool, int, bool]] = []
    model = Caching()
    model.norm.eval()
    inputs, threads = image(2), torch.get_num_threads()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = measure(model, inputs, runs=2, threads=threads + 1, runtime="eager")
    assert seen == [(False, threads + 1, True)] * (1 + WARM_UP + 2)
    assert (torch.get_num_threads(), torch.is_inference_mode_enabled()) == (threads, False)
    assert (model.training, model.norm.training, model.cache) == (True, False, None)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert (found.threads, found.batch, found.runtime) == (threads + 1, 2, f"torch {torch.__version__} eager")
    assert found.size_bytes == 4 * (3 + 3 + 3 + 3) + 8


def test_threads_come_back_after_a_failure() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(InputError, match="pass inputs of the shape"):
        measure(nn.Conv2d(3, 4, 3), torch.zeros(1, 4, 8, 8), threads=threads + 1, runtime="eager")
    assert torch.get_num_threads() == threads


def test_module_and_file_in_onnx_runtime(tmp_path: Path) -> None:
    model, inputs = resnet18(), torch.randn(1, 3, 64, 64)
    file = export_onnx(model, inputs, tmp_path / "m.onnx")
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU())
    found = measure({"module": model, "file": str(file.path), "tiny": tiny}, inputs, runs=8)
    assert all(value.runtime == f"onnxruntime {onnxruntime.__version__}" for value in found.values())
    assert all(len(value.samples_ms) == value.runs == 8 for value in found.values())
    assert found["file"].size_bytes == file.size_bytes
    assert found["module"].size_bytes == pytest.approx(file.size_bytes, rel=0.01)
    assert found["tiny"].ratio_to(found["file"]) < 0.5
    assert 0.4 < found["module"].ratio_to(found["file"]) < 2.5
    assert model.training
    assert list(tmp_path.iterdir()) == [file.path]


def test_example_inputs_run_as_they_are(conv_file: Path) -> None:
    found = measure(conv_file, image(5), runs=1)
    assert (found.batch, found.runs) == (5, 1)
    assert found.lower_quartile_ms == found.median_ms == found.upper_quartile_ms


def test_session_gets_the_stated_options(conv_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[Any] = []
    monkeypatch.setattr(
        runners,
        "open_session",
        lambda *args: sessions.append(checking.open_session(*args)) or sessions[-1],
    )
    assert measure(conv_file, image(), runs=1, threads=2).threads == 2
    options = sessions[0].get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert sessions[0].get_providers() == ["CPUExecutionProvider"]


def test_external_weights_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters, "EXTERNAL_DATA_BYTES", 10)
    file = export_onnx(nn.Conv2d(3, 64, 3), image(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size > 6000
    assert measure(file.path, image(), runs=1).size_bytes == file.size_bytes


def test_keywords_reach_a_module_and_a_file(named_file: Path) -> None:
    inputs = {"gain": torch.ones(2, 3), "x": torch.ones(2, 3)}
    assert measure({"module": Named(), "file": named_file}, inputs, runs=2)["file"].batch == 2
    assert measure(named_file, (inputs["x"], inputs["gain"]), runs=1).runs == 1


def test_inputs_that_the_file_does_not_take(conv_file: Path, named_file: Path) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"takes \['x', 'gain'\] and .* named \['x', 'bias'\]; pass a dict"):
        measure(named_file, {"x": x, "bias": x})
    with pytest.raises(
        InputError, match=r"takes \['x', 'gain'\] and the inputs are .*; pass one tensor for each"
    ):
        measure(named_file, (x,))
    with pytest.raises(InputError, match=r"conv.onnx takes input .* float64 cpu; pass inputs of that shape"):
        measure(conv_file, image().double())
    with pytest.raises(InputError, match=r"\(1, 4, 8, 8\) float32 cpu; pass inputs of that shape and dtype"):
        measure(conv_file, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": 0}, "runs=0 .*pass a whole number of at least 1"),
        ({"runs": 2.5}, "runs=2.5 .*pass a whole number"),
        ({"threads": 0}, "threads=0 .*pass a whole number of at least 1"),
        ({"runtime": "tensorrt"}, "runtime='tensorrt' is unknown; pass one of 'onnxruntime', 'eager'"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        measure(nn.Conv2d(3, 4, 3), image(), **settings)


def test_things_that_cannot_be_measured(tmp_path: Path, conv_file: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(conv_file.read_bytes()[:-40])
    with pytest.raises(ExportError, match=r"missing.onnx is not a file; export_onnx\(.*writes one"):
        measure(tmp_path / "missing.onnx", image())
    with pytest.raises(
        ExportError, match=r"cannot load .*broken.onnx .*; write the file again with export_onnx"
    ):
        measure(broken, image())
    with pytest.raises(ExportError, match=r"conv.onnx cannot run in eager PyTorch; pass the module"):
        measure(conv_file, image(), runtime="eager")
    with pytest.raises(ExportError, match=r"the mapping is empty; pass \{'name': model\}"):
        measure({}, image())
    with pytest.raises(ExportError, match=r"a int cannot be measured; pass a module or an .onnx path"):
        measure({"a": 3}, image())  # type: ignore[dict-item]


def test_short_measurements_show_no_bar(conv_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(conv_file, image(), runs=3)
    assert capsys.readouterr() == ("", "")


def test_long_measurements_show_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    measure(Logged("slow", 0.3), image(), runs=9, runtime="eager")
    assert "measuring" in capsys.readouterr().err


def test_more_threads_than_processors_are_warned_of_and_far_more_refused() -> None:
    threads = (os.cpu_count() or 1) + 1
    with pytest.warns(FxBasisWarning, match=rf"threads={threads} on a machine with {threads - 1} processors"):
        measure(nn.Conv2d(3, 8, 3), image(), runs=1, threads=threads, runtime="eager")
    with pytest.raises(ExportError, match="threads=100000 is more than 256; this machine has"):
        measure(nn.Conv2d(3, 8, 3), image(), runs=1, threads=100_000)
