"""export_onnx: files that equal the model, a model that stays as it was, and no file when they differ."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fxbasis import trace
from fxbasis.errors import ExportError, FxBasisWarning, InputError
from fxbasis.export import exporters
from fxbasis.export.exporting import ONNX_TOLERANCE, export_onnx, frozen_copy
from fxbasis.nests import tensors_of


class ConvNet(nn.Sequential):
    def __init__(self, groups: int = 1) -> None:
        conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups)
        super().__init__(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.body(x)).mean((2, 3)))


class Heads(Residual):
    """A dict in an order that is not alphabetic, with a nest and a None; ``relu`` is also a node's name."""

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.relu(self.body(x))
        return OrderedDict(relu=torch.relu(y - 0.1), aux=None, levels=(y.mean((2, 3)), y))


class TwoInputs(Residual):
    def forward(
        self,
        image: torch.Tensor,
        unused: torch.Tensor,
        levels: list[Any],
        times: int = 1,
        *,
        gain: torch.Tensor,
    ) -> Any:
        return self.body(image).mean((2, 3)) * gain * times + levels[0] - 2 * levels[1]["low"], image * 3


class RefusesDynamo(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("no torch.export here")
        return super().forward(x)


class Branch(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-2 * x)


def image(batch: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(batch))


def two_inputs(batch: int = 1) -> dict[str, Any]:
    """Keywords in another order than forward's; gain and the levels differ, so that a mix-up shows."""
    low, high = torch.full((batch, 4), 0.5), torch.ones(batch, 4)
    gain = torch.arange(4.0).repeat(batch, 1)
    return {"gain": gain, "levels": [high, {"low": low}], "times": 3, "unused": torch.zeros(batch, 7)} | {
        "image": image(batch)
    }


def run_file(path: Path, named: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {name: t.numpy() for name, t in named.items() if name in wanted})  # type: ignore


def first_dims(path: Path) -> dict[str, int | str]:
    inputs = onnx.load(str(path)).graph.input
    dims = {value.name: value.type.tensor_type.shape.dim[0] for value in inputs}
    return {name: dim.dim_value if dim.HasField("dim_value") else dim.dim_param for name, dim in dims.items()}


def only(monkeypatch: pytest.MonkeyPatch, exporter: str) -> None:
    """Let only one exporter work."""
    for name in set(exporters.EXPORTERS) - {exporter}:
        monkeypatch.setitem(exporters.EXPORTERS, name, refuse)  # type: ignore[misc]


def skip_where_none_cannot_be_returned(exporter: str) -> None:
    if exporter == "dynamo" and torch.__version__.startswith("2.8."):
        pytest.skip("torch 2.8's dynamo exporter cannot return None")


def refuse(job: Any, file: Path) -> None:
    raise RuntimeError("refused by the test")


NETS: dict[str, Callable[[], nn.Module]] = {
    "conv-bn-relu": ConvNet,
    "grouped": lambda: ConvNet(groups=2),
    "residual": Residual,
    "heads": Heads,
    "traced": lambda: torch.fx.symbolic_trace(Residual()),
    "one-sample-of-channels-last": lambda: Residual().to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", NETS)
def test_file_equals_model(name: str, exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "heads":
        skip_where_none_cannot_be_returned(exporter)
    only(monkeypatch, exporter)
    model, path = NETS[name](), tmp_path / "m.onnx"
    file = export_onnx(model, image(), path)
    for batch in (1, 5):
        expected = tensors_of(copy.deepcopy(model).eval()(image(batch)))
        (input_name,) = first_dims(path)
        actual = run_file(path, {input_name: image(batch)})
        assert len(actual) == len(expected)
        for a, b in zip(expected, actual, strict=True):
            np.testing.assert_allclose(b, a.detach().numpy(), atol=1e-5)
    assert isinstance(next(iter(first_dims(path).values())), str)
    assert (file.exporter, file.dynamic_batch, file.checked_batches) == (exporter, True, (1, 3))
    assert 0 <= file.difference.relative <= file.tolerance == ONNX_TOLERANCE
    assert file.size_bytes == path.stat().st_size
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_inputs_nested_by_keyword_and_partly_unused(
    exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, exporter)
    model, path = TwoInputs(), tmp_path / "m.onnx"
    export_onnx(model, two_inputs(), path)
    assert set(first_dims(path)) - {"unused"} == {"image", "levels_0", "levels_1_low", "gain"}
    inputs = two_inputs(4)
    levels = {"levels_0": inputs["levels"][0], "levels_1_low": inputs["levels"][1]["low"]}
    actual = run_file(path, levels | {name: inputs[name] for name in ("image", "gain", "unused")})
    for a, b in zip(model(**inputs), actual, strict=True):
        np.testing.assert_allclose(b, a.detach().numpy(), atol=1e-5)


def test_positional_tuple_that_ends_in_a_dict(tmp_path: Path) -> None:
    class Last(nn.Module):
        def forward(self, x: torch.Tensor, extra: dict[str, torch.Tensor]) -> torch.Tensor:
            return x - 2 * extra["b"] + extra["a"]

    inputs = (torch.ones(2, 3), {"b": torch.ones(2, 3), "a": torch.zeros(2, 3)})
    file = export_onnx(Last(), inputs, tmp_path / "m.onnx")
    assert file.exporter == "dynamo"
    assert set(first_dims(file.path)) == {"x", "extra_b", "extra_a"}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_output_names_are_the_dict_keys(
    exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clash(Residual):
        def forward(self, x: torch.Tensor) -> Any:
            y = torch.relu(self.body(x))
            return {"relu": torch.sigmoid(y - 0.1), "x": y * 2}

    skip_where_none_cannot_be_returned(exporter)
    only(monkeypatch, exporter)
    names = {
        model: [value.name for value in onnx.load(str(file.path)).graph.output]
        for model in (Heads, Clash, Residual)
        for file in [export_onnx(model(), image(), tmp_path / "m.onnx")]
    }
    assert names[Heads] == ["relu", "levels_0", "levels_1"]
    assert names[Clash] == [{"dynamo": "relu_", "torchscript": "relu"}[exporter], "x_"]
    assert names[Residual] == ["output"]
    assert first_dims(tmp_path / "m.onnx") == {"x": "batch"}


class Returns(nn.Conv2d):
    def forward(self, image: torch.Tensor, *rest: torch.Tensor) -> Any:  # type: ignore[override]
        return {"image": image, "conv": super().forward(image), "rest": list(rest)}


def test_an_input_that_is_returned_keeps_its_name(tmp_path: Path) -> None:
    file = export_onnx(Returns(4, 8, 3), (image(), image() + 1), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(file.path))
    assert [value.name for value in session.get_inputs()] == ["image", "rest_0"]
    assert [value.name for value in session.get_outputs()] == ["image_", "conv", "rest_0_"]


def test_resnet18(tmp_path: Path) -> None:
    model = resnet18()
    file = export_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / "m.onnx")
    assert (file.exporter, first_dims(file.path)) == ("dynamo", {"x": "batch"})
    assert file.size_bytes > 4 * 11_689_512
    assert "46.8" in str(file)
    assert "dynamic batch" in str(file)


def test_model_and_random_state_stay_as_they_are(tmp_path: Path) -> None:
    model = nn.Sequential(ConvNet(), nn.BatchNorm2d(8).eval())
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    generator = torch.get_rng_state()
    export_onnx(model, image(2), tmp_path / "m.onnx")
    assert [m.training for m in model.modules()] == modes
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_forward_that_writes_a_buffer_or_a_train_that_writes_weights(
    exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writes(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def train(self, mode: bool = True) -> Writes:
            with torch.no_grad():
                self.head.weight.mul_(2)
            return super().train(mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    only(monkeypatch, exporter)
    model = Writes()
    weight = model.head.weight.clone()
    export_onnx(model, image(), tmp_path / "m.onnx")
    assert model.calls.item() == 0
    assert torch.equal(model.head.weight, weight)


def test_copy_of_a_traced_model_shares_parameters_but_not_buffers() -> None:
    model = trace(ConvNet(), image())
    frozen = frozen_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), frozen.parameters(), strict=True))
    assert all(a is not b for a, b in zip(model.buffers(), frozen.buffers(), strict=True))
    assert not frozen.training
    assert model.training


def test_batch_of_one_is_traced_as_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(job: Any, file: Path) -> None:
        traced.append((job.traced["x"].shape[0], job.traced["table"].shape[0], sorted(job.dynamic)))
        export(job, file)

    class Table(nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return x @ table

    traced: list[Any] = []
    export = exporters.EXPORTERS["torchscript"]
    monkeypatch.setitem(exporters.EXPORTERS, "dynamo", note)
    path, table = tmp_path / "m.onnx", torch.randn(5, 3)
    export_onnx(Table(), {"x": torch.randn(1, 5), "table": table}, path)
    assert first_dims(path) == {"x": "batch", "table": 5}
    export_onnx(Table(), {"x": torch.randn(1, 5), "table": table}, path, dynamic_batch=False)
    export_onnx(Table(), {"x": torch.randn(4, 5), "table": table}, path)
    assert traced == [(2, 5, ["x"]), (1, 5, []), (4, 5, ["x"])]


def test_static_batch(tmp_path: Path) -> None:
    file = export_onnx(Residual(), image(3), tmp_path / "m.onnx", dynamic_batch=False)
    assert (first_dims(file.path), file.checked_batches) == ({"x": 3}, (3,))
    assert "static batch" in str(file)


def test_second_exporter_is_used_when_the_first_fails(tmp_path: Path) -> None:
    assert export_onnx(RefusesDynamo(), image(), tmp_path / "m.onnx").exporter == "torchscript"


def test_branch_on_data_is_not_frozen_in_silence(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"dynamo: .*torchscript: .*differ by .*tolerance 1e-04.*; pass dyn"
    ):
        export_onnx(Branch(), image().abs(), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"torchscript: .*; replace the code that the reasons name$"):
        export_onnx(Branch(), image().abs(), tmp_path / "m.onnx", dynamic_batch=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("scale", [1.001, 1.00001])
def test_wrong_file_is_refused_by_how_much_and_an_old_one_kept(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scaled(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * scale

    def wrong(job: Any, file: Path) -> None:
        other = Scaled()
        other.load_state_dict(job.model.state_dict())
        export(dataclasses.replace(job, model=other), file)

    export = exporters.EXPORTERS["torchscript"]
    only(monkeypatch, "torchscript")
    monkeypatch.setitem(exporters.EXPORTERS, "torchscript", wrong)
    path = tmp_path / "m.onnx"
    path.write_text("old")
    if scale == 1.00001:
        assert export_onnx(Residual(), image(), path).difference.relative > 5e-6
        return
    with pytest.raises(
        ExportError, match=r"refused by the test; torchscript: .* differ by 1.0e-03 of their larg"
    ):
        export_onnx(Residual(), image(), path)
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_silent_static_axis_is_refused(
    exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AnyBatch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    def static(job: Any, file: Path) -> None:
        export(dataclasses.replace(job, dynamic=frozenset()), file)

    export = exporters.EXPORTERS[exporter]  # type: ignore[index]
    only(monkeypatch, exporter)
    monkeypatch.setitem(exporters.EXPORTERS, exporter, static)  # type: ignore[misc]
    with pytest.raises(
        ExportError, match=r"input x has a static batch axis of 2.*; pass dynamic_batch=False"
    ):
        export_onnx(AnyBatch(), image(), tmp_path / "m.onnx")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_large_weights_lie_in_one_file_beside(
    exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, exporter)
    monkeypatch.setattr(exporters, "EXTERNAL_DATA_BYTES", 1000)
    model, path = nn.Conv2d(4, 64, 3), tmp_path / "m.onnx"
    file = export_onnx(model, image(), path)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert file.size_bytes == sum(part.stat().st_size for part in tmp_path.iterdir()) > 4 * 64 * 36
    (actual,) = run_file(path, {"input": image()})
    np.testing.assert_allclose(actual, model(image()).detach().numpy(), atol=1e-5)


def test_nothing_is_printed_logged_or_warned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    print("before")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(RefusesDynamo(), image(), tmp_path / "m.onnx")
        with pytest.raises(ExportError, match="eigvals"):
            export_onnx(Unknown(), image(), tmp_path / "m.onnx")
        with pytest.raises(ExportError, match=r"data-dependent|on a batch of 3 the outputs differ"):
            export_onnx(Branch(), image().abs(), tmp_path / "m.onnx")
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("before\nafter\n", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_opset(tmp_path: Path) -> None:
    file = export_onnx(Residual(), image(), tmp_path / "m.onnx", opset=18)
    assert file.opset == onnx.load(str(file.path)).opset_import[0].version == 18


def test_half_has_its_tolerance_and_float64_and_bfloat16_a_remedy(tmp_path: Path) -> None:
    conv = nn.Conv2d(4, 8, 3)
    assert export_onnx(copy.deepcopy(conv).half(), image().half(), tmp_path / "m.onnx").tolerance == 5e-3
    for dtype, said in ((torch.float64, "NOT_IMPLEMENTED"), (torch.bfloat16, "INVALID_GRAPH")):
        with pytest.raises(ExportError, match=rf"{said}.*; .*export model.float\(\) with float inputs$"):
            export_onnx(copy.deepcopy(conv).to(dtype), image().to(dtype), tmp_path / "n.onnx")


def test_model_that_cannot_be_copied(tmp_path: Path) -> None:
    model = nn.Conv2d(4, 8, 3)
    model.lock = Lock()
    with pytest.raises(ExportError, match=r"cannot be deep-copied .*lock.*off the model first"):
        export_onnx(model, image(), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"the model is a function; pass an nn.Module"):
        export_onnx(image, image(), tmp_path / "m.onnx")  # type: ignore[arg-type]


def test_inputs_that_the_model_does_not_take(tmp_path: Path) -> None:
    class OneSample(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[0] < 3
            return super().forward(x)

    path = tmp_path / "m.onnx"
    with pytest.raises(InputError, match="pass inputs of the shape"):
        export_onnx(Residual(), torch.zeros(1, 3, 8, 8), path)
    with pytest.raises(InputError, match="no sample; pass tensors with a batch"):
        export_onnx(Residual(), image()[:0], path)
    with pytest.raises(ExportError, match=r"in a batch of 3, .*pass dynamic_batch=False$"):
        export_onnx(OneSample(), image(), path)
    with pytest.raises(ExportError, match="returns no tensor; let it return"):
        export_onnx(NoTensor(), image(), path)
    assert export_onnx(OneSample(), image(), path, dynamic_batch=False).checked_batches == (1,)


@dataclasses.dataclass
class Answer:
    a: torch.Tensor


class Registered(Answer):
    pass


class Named(OrderedDict[str, torch.Tensor]):
    pass


class Answering(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return {"a": self.kind(a=self.conv(x)), "b": x}


def test_outputs_in_objects_need_a_registered_class(tmp_path: Path) -> None:
    for kind in (Answer, Named):
        message = f"tensors in a {kind.__name__}, which the exporters do not open; return a tuple"
        with pytest.raises(ExportError, match=message):
            export_onnx(Answering(kind), image(), tmp_path / "m.onnx")
    torch.export.register_dataclass(Registered)
    assert export_onnx(Answering(Registered), image(), tmp_path / "m.onnx").exporter == "dynamo"


class NoTensor(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return "nothing"


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Conv2d(4, 8, 1)
    with pytest.raises(ExportError, match=r"is a folder; give a file name, such as .*model.onnx"):
        export_onnx(model, image(), tmp_path)
    with pytest.raises(ExportError, match=r"missing is not a folder; make that folder first"):
        export_onnx(model, image(), tmp_path / "missing" / "m.onnx")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    only(monkeypatch, "torchscript")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match=r"m.onnx: No space left on device; give a path in a folder"):
        export_onnx(model, image(), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_weights_without_their_graph_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name == "m.onnx":
            raise OSError(28, "No space left on device")
        replace(source, target)

    only(monkeypatch, "torchscript")
    monkeypatch.setattr(exporters, "EXTERNAL_DATA_BYTES", 10)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(nn.Conv2d(4, 64, 3), image(), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(job: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(exporters.EXPORTERS, "dynamo", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(nn.Conv2d(4, 8, 1), image(), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_a_branch_that_tracing_froze_is_told(tmp_path: Path) -> None:
    class Frozen(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0 if float(x.abs().max()) > 100 else self.body(x)

    with pytest.warns(FxBasisWarning, match=r"tracing froze what Python computed .*test_exporting.py:\d+"):
        assert export_onnx(Frozen(), image(), tmp_path / "m.onnx").exporter == "torchscript"
