"""``report``: check and measure a compressed model against its original, and write everything down.

The folder gets ``plan.json``, ``model.safetensors``, ``original.onnx``, ``compressed.onnx``, ``report.md``,
``report.json`` and ``table.csv``, and with matplotlib ``layers.png`` and ``layers.svg``: all of them, or none
when a step fails.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path

import torch
from torch import nn

from .arguments import as_path
from .comparing import Difference, check_equal
from .compression import plan_of
from .copying import copy_model
from .errors import PlanError
from .export.exporting import export_onnx
from .export.measuring import measure
from .files import cannot_write, made_folder
from .passes.folding import fold
from .passes.profiling import profile
from .pictures import layers_for_report
from .proving import rewrite_difference
from .reports import Report
from .running import ExampleInputs, describe, run
from .saving import load, save

__all__ = ["report"]


def report(
    original: nn.Module,
    compressed: nn.Module,
    example_inputs: ExampleInputs,
    folder: str | Path,
    *,
    title: str = "",
    remarks: tuple[str, ...] = (),
    runs: int = 30,
    threads: int = 1,
) -> Report:
    """Check, export and measure both models, and write the folder.

    Args:
        original, compressed: the pair; neither is touched.
        example_inputs: what both run on; latency is measured at this batch size.
        folder: made if needed; files of the same names are replaced, once everything has succeeded.
        title: a heading; the class name of the original if empty.
        remarks: sentences to put on top.
        runs, threads: of the latency measurement in ONNX Runtime.

    Raises:
        VerificationError, ExportError: when a check or an export fails; then nothing is written.
        UsageError: when the folder cannot be written.
    """
    folder = as_path(folder)
    try:
        with made_folder(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
            draft = Path(temporary)
            found = _examine(original, compressed, example_inputs, draft, title, remarks, runs, threads)
            text = f"{found.to_markdown()}\n{layers_for_report(found.profile, draft)}\n"
            (draft / "report.md").write_text(text, encoding="utf-8")
            (draft / "report.json").write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
            (draft / "table.csv").write_text(found.to_csv(), encoding="utf-8")
            for file in sorted(draft.iterdir()):
                os.replace(file, folder / file.name)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return found


def _examine(
    original: nn.Module,
    compressed: nn.Module,
    example_inputs: ExampleInputs,
    folder: Path,
    title: str,
    remarks: tuple[str, ...],
    runs: int,
    threads: int,
) -> Report:
    work = profile(compressed, example_inputs)
    if not work.convs:
        raise PlanError(
            f"{type(original).__name__} has no Conv2d, so there is nothing to report on; use profile"
        )
    differences = check_all(original, compressed, example_inputs, folder)
    files = {
        name: export_onnx(model, example_inputs, folder / f"{name}.onnx")
        for name, model in (("original", original), ("compressed", compressed))
    }
    for name, file in files.items():
        differences[f"ONNX Runtime, {name}, other inputs and batch sizes"] = file.difference
    paths = {name: file.path for name, file in files.items()}
    times = measure(paths, example_inputs, runs=runs, threads=threads)
    return Report(
        title=title or type(original).__name__,
        inputs=describe(example_inputs),
        profile=work,
        original=times["original"],
        compressed=times["compressed"],
        original_onnx=files["original"],
        compressed_onnx=files["compressed"],
        differences=differences,
        machine=machine(),
        remarks=remarks,
        forecast=plan_of(compressed).forecast,
    )


def check_all(
    original: nn.Module, compressed: nn.Module, example_inputs: ExampleInputs, folder: Path
) -> dict[str, Difference]:
    """Compare the compressed model with its reconstruction, its fold, and itself saved and loaded."""
    expected = run(compressed, example_inputs)
    loaded = run(load(original, save(compressed, folder)), example_inputs)
    folded = fold(compressed)
    return {
        "rewritten, to the original with the folded weights (worst layer)": rewrite_difference(
            _with_weights_of(folded, original), compressed, example_inputs
        ),
        "folded, to the compressed model (worst layer)": rewrite_difference(
            folded, compressed, example_inputs
        ),
        "saved and loaded, to the compressed model": check_equal(
            expected, loaded, "loaded model", "save it again; report the model if that does not help"
        ),
    }


def _with_weights_of(folded: nn.Module, original: nn.Module) -> nn.Module:
    """A copy of the original with what a fit, training or recalibration changed: biases, BatchNorms, ..."""
    copied = copy_model(original)
    changed = {**dict(folded.named_parameters()), **dict(folded.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
            if name in changed and changed[name].shape == tensor.shape:
                tensor.copy_(changed[name])
    return copied


def machine() -> dict[str, str]:
    """Processor, operating system and versions that a measurement depends on."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = processor or "unknown processor"
    return {
        "processor": f"{processor} ({os.cpu_count()} cores)",
        "system": platform.system(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
