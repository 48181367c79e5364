"""What the zoo study checks of one model: a stage for each part of the way, and one row of results."""

from __future__ import annotations

import copy
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from zoo_models import enlivened, examples, finite, is_detector, sides

import fxbasis
from fxbasis.comparing import TOLERANCES, difference
from fxbasis.errors import FxBasisError, InputError
from fxbasis.models import load_model
from fxbasis.nests import map_tensors
from fxbasis.passes.numbering import conv_layers
from fxbasis.running import run

HEADS = ("backbone", "head", "rpn.head")


@dataclass
class Case:
    """A model, its inputs and outputs, and the relative difference that rounding accounts for."""

    model: nn.Module
    example: Any
    others: dict[str, Any]
    expected: Any
    allowed: float

    @classmethod
    def of(cls, name: str, model: nn.Module) -> Case:
        """The model on the smallest inputs that it takes."""
        example, others = examples(name, model)
        expected = observe(model, example)
        return cls(model, example, others, expected, _allowed(model, example, expected))

    def elsewhere(self, changed: nn.Module) -> dict[str, Any]:
        """With another batch and another size: the difference from the original, or what was raised."""
        return {key: self._on(changed, inputs) for key, inputs in self.others.items()}

    def _on(self, changed: nn.Module, inputs: Any) -> Any:
        try:
            expected = observe(self.model, inputs)
        except InputError:
            return "the original does not take it"
        try:
            found = difference(expected, observe(changed, inputs)).relative
        except FxBasisError as error:
            return "fails: " + _short(error)
        enough = found <= self.allowed or found <= _allowed(self.model, inputs, expected)
        return found if enough else f"fails: differs by {found:.1e}"


def observe(model: nn.Module, example: Any) -> Any:
    """The model's output; for a detector the outputs of its backbone and of its dense heads."""
    if not is_detector(model):
        return run(model, example)
    seen: list[Any] = []
    heads = [module for name, module in model.named_modules() if name in HEADS]
    hooks = [head.register_forward_hook(lambda _, args, output: seen.append(output)) for head in heads]
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _allowed(model: nn.Module, example: Any, expected: Any) -> float:
    """The tolerance of float32, or ten times what one rounding of the inputs does to the original."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return tensor * (1 + torch.finfo(tensor.dtype).eps * sign)

    floor = difference(expected, observe(model, map_tensors(moved, example))).relative
    return max(TOLERANCES[torch.float32], 10 * floor)


def examine(name: str, *, onnx: bool) -> Iterator[dict[str, Any]]:
    """Parts of the row as they are found; the last one has the status. Times are those of the CPU."""
    row: dict[str, Any] = {}
    before = 0.0
    try:
        for stage, part in _stages(name, onnx):
            now = time.process_time()
            row |= part | {"times": row.get("times", {}) | {stage: round(now - before, 1)}}
            before = now
            yield row
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])
        row |= {"error": _short(error), "where": where, "status": "FAIL"}
    yield row | {"seconds": round(time.process_time(), 1)}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _stages(name: str, onnx: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = enlivened(load_model(name))
    layers = len(conv_layers(model))
    if not layers:
        yield "build", {"convs": 0, "status": "no Conv2d"}
        return
    yield "build", {"convs": layers}
    case = Case.of(name, model)
    yield "inputs", {"inputs": sides(case.example), "allowed": case.allowed}
    yield "plain", plain(case)
    traced, row = trace(case)
    yield "trace", row
    checks = [("full", full), ("half", half), *([("onnx", export)] if onnx else [])]
    for stage, check in checks:
        part = check(case, traced)
        row |= part
        yield stage, part
    failed = _failed(row, case.allowed)
    yield "end", {"failed": failed, "status": "FAIL" if failed else "pass"}


def plain(case: Case) -> dict[str, Any]:
    """Whether plain symbolic tracing in eval() gives an equal graph; on other inputs too."""
    try:
        graph = fx.symbolic_trace(copy.deepcopy(case.model).eval())
        found = difference(case.expected, observe(graph, case.example)).relative
    except Exception as error:
        return {"plain": False, "plain_why": _short(error)[:150]}
    if not found <= case.allowed:
        return {"plain": False, "plain_why": f"outputs differ by {found:.1e}"}
    elsewhere = case.elsewhere(graph)
    return {"plain": True, "plain_everywhere": not any(_wrong(value) for value in elsewhere.values())}


def trace(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """The traced copy, which is compressed twice; and what became of its parts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = fxbasis.trace(case.model, case.example)
    said = [str(warning.message) for warning in caught if "stays Python" in str(warning.message)]
    return traced, {
        "graph": isinstance(traced, fx.GraphModule),
        "convs_in_graphs": _convs_in_graphs(traced),
        "python": "; ".join(said),
        "parts": {part.name: part.reason for part in fxbasis.parts_of(traced) if not part.graph},
    }


def _convs_in_graphs(traced: nn.Module) -> int:
    """How many convolutions have their innermost part in a graph."""
    graphs = {part.name: part.graph for part in fxbasis.parts_of(traced)}
    count = 0
    for name in conv_layers(traced):
        owner = name
        while owner and owner not in graphs:
            owner = owner.rpartition(".")[0]
        count += graphs.get(owner, False)
    return count


def full(case: Case, traced: nn.Module) -> dict[str, Any]:
    """Every convolution at full rank: equal outputs, on other inputs and folded too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = fxbasis.compress(traced, case.example, layers="re:.*", size=1.0)
    table = fxbasis.number_convs(net, case.example)
    ran = [record for record in table if record.calls]
    left = [re.sub(r"[\w.]*\.\w+", "…", record.reason) for record in ran if record.status != "compressed"]
    return {
        "executed": len(ran),
        "rewritten": sum(record.status == "compressed" for record in ran),
        "left": {reason: left.count(reason) for reason in sorted(set(left))},
        "full": difference(case.expected, observe(net, case.example)).relative,
        "elsewhere": case.elsewhere(net),
        "fold": difference(case.expected, observe(fxbasis.fold(net), case.example)).relative,
    }


def half(case: Case, traced: nn.Module) -> dict[str, Any]:
    """Half of the filters where that is cheaper: finite, smaller, counted, saved and loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = fxbasis.compress(traced, case.example)
        work = fxbasis.profile(small, case.example)
        with tempfile.TemporaryDirectory() as folder:
            loaded = fxbasis.load(case.model, fxbasis.save(small, folder))
    layers = sum(record.status == "compressed" for record in fxbasis.number_convs(small))
    output = observe(small, case.example)
    return {
        "half_layers": layers,
        "half_macs": round(work.macs / work.macs_before, 3) if work.macs_before else 1.0,
        "smaller": work.macs < work.macs_before if layers else work.macs == work.macs_before,
        "counted": not work.disagreements,
        "finite": finite(output),
        "loaded": difference(output, observe(loaded, case.example)).relative == 0.0,
    }


class Dense(nn.Module):
    """A detector up to its dense heads, for a batch of images: what follows sorts boxes."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, images: torch.Tensor) -> Any:
        """The outputs of backbone and head."""
        features = self.backbone(images)
        return features, self.head(list(features.values()))


def export(case: Case, traced: nn.Module) -> dict[str, Any]:
    """Original and compressed as ONNX with a dynamic batch, each compared in ONNX Runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = {"onnx_original": case.model, "onnx_compressed": fxbasis.compress(traced, case.example)}
        detector = is_detector(case.model)
        inputs = torch.rand(2, 3, 128, 128) if detector else case.example
        return {key: _exported(Dense(net) if detector else net, inputs) for key, net in nets.items()}


def _exported(net: nn.Module, inputs: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = fxbasis.export_onnx(net, inputs, Path(folder, "model.onnx"))
        except FxBasisError as error:
            return {"error": _short(error)}
    return {
        "exporter": file.exporter,
        "dynamic": file.dynamic_batch,
        "difference": file.difference.relative,
    }


def _wrong(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("fails")


def _failed(row: dict[str, Any], allowed: float) -> list[str]:
    """The checks that failed; a model whose original does not export need not export compressed."""
    failed = [key for key in ("full", "fold") if not row[key] <= allowed]
    failed += [key for key in ("smaller", "counted", "finite", "loaded") if not row[key]]
    failed += [f"another {key}" for key, value in row["elsewhere"].items() if _wrong(value)]
    if "error" in row.get("onnx_compressed", {}) and "error" not in row["onnx_original"]:
        failed.append("onnx")
    return failed
