"""Every torchvision model and one timm model of each module file through the whole way of a model.

    python examples/studies/zoo.py --out zoo.jsonl --table zoo.md [--only REGEX] [--minutes 5] [--gib 8]

For each model, with random weights: trace, number, compress every convolution at full rank (outputs must
equal the original's), compress at half rank (finite, fewer MACs), fold (equal), save and load (bit-equal),
and for a sample export to ONNX with a dynamic batch, original and compressed. One process for each model,
with a limit of time and memory; the JSON lines are appended as they come, so that an interrupted run goes
on where it stopped. Detectors are compared on the outputs of backbone and heads, before the boxes are
sorted: these move under a change of 1e-6 of the original too.

Random weights are badly conditioned: ``allowed`` is the float32 tolerance of 1e-5, or ten times what one
rounding of the inputs does to the original's own outputs, where that is more.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxbasis
from fxbasis.comparing import TOLERANCES, difference
from fxbasis.models import load_model
from fxbasis.running import map_tensors, run

SMALL = ("test", "atto", "femto", "pico", "nano", "xxs", "xs", "tiny", "mini", "small", "_s", "b0", "_t")


def model_names() -> list[str]:
    """All torchvision models that are not quantized, and one small timm model of each module file."""
    import timm
    import torchvision

    names = [f"torchvision:{name}" for name in torchvision.models.list_models() if "quantized" not in name]
    for module in timm.list_modules():
        models = timm.list_models(module=module)
        ranked = sorted(models, key=lambda name: (not any(mark in name for mark in SMALL), len(name), name))
        names += [f"timm:{name}" for name in ranked[:1]]
    return names


def example_for(name: str, model: nn.Module) -> Any:
    """Two samples in the shape that the model was made for, or the smallest that it takes."""
    kind = name.partition(":")[2]
    if name.startswith("timm:"):
        size = model.default_cfg["input_size"]
        return torch.randn(2, *(size if max(size) < 300 else (size[0], 224, 224)))
    if hasattr(model, "transform") and hasattr(model, "backbone"):
        return ([torch.rand(3, 128, 160), torch.rand(3, 128, 128)],)
    if kind.startswith("raft"):
        return (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    if re.match(r"(r3d|mc3|r2plus1d|s3d|mvit|swin3d)", kind):
        return torch.randn(1, 3, 16, 224 if "mvit" in kind or "swin" in kind else 112, 224)
    side = 299 if "inception" in kind else 224
    return torch.randn(2, 3, side, side)


def observe(model: nn.Module, example: Any) -> Any:
    """The model's output; for a detector the outputs of its backbone and of its heads."""
    if not (hasattr(model, "transform") and hasattr(model, "backbone")):
        return run(model, example)
    seen: list[Any] = []
    names = [name for name in ("backbone", "head", "rpn.head", "roi_heads.box_head") if _has(model, name)]
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(output))
        for name in names
    ]
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[:2]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def examine(name: str, *, onnx: bool) -> dict[str, Any]:
    """One row: what was reached, what was left and why, and each comparison."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = load_model(name)
    example = example_for(name, model)
    table = fxbasis.number_convs(model, example)
    row: dict[str, Any] = {"name": name, "convs": len(table)}
    row["executed"] = sum(bool(record.calls) for record in table)
    if not table:
        return row | {"status": "no Conv2d"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        full = fxbasis.compress(model, example, layers="re:.*", size=1.0)
    said = [str(warning.message) for warning in caught if "stays Python" in str(warning.message)]
    row["graph"] = isinstance(full, torch.fx.GraphModule)
    row["python"] = said[0].partition(": ")[2] if said else ""
    after = fxbasis.number_convs(full, example)
    row["compressed"] = sum(record.status == "compressed" for record in after)
    left = [record.reason for record in after if record.status != "compressed"]
    row["left"] = {reason: left.count(reason) for reason in sorted(set(left))}
    expected = observe(model, example)
    allowed = max(TOLERANCES[torch.float32], 10 * _floor(model, example, expected))
    row["allowed"] = allowed
    row["full"] = difference(expected, observe(full, example)).relative
    row["fold"] = difference(expected, observe(fxbasis.fold(full), example)).relative
    row |= _half(model, example)
    if onnx:
        row |= _onnx(model, fxbasis.compress(model, example), example)
    row["seconds"] = round(time.perf_counter() - start, 1)
    sound = row["full"] <= allowed and row["fold"] <= allowed and row["half_finite"] and row["loaded_equal"]
    return row | {"status": "pass" if sound else "FAIL"}


def _floor(model: nn.Module, example: Any, expected: Any) -> float:
    """The relative change of the outputs when every input element moves by one rounding."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return tensor * (1 + torch.finfo(tensor.dtype).eps * sign)

    return difference(expected, observe(model, map_tensors(moved, example))).relative


def _half(model: nn.Module, example: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = fxbasis.compress(model, example)
        work = fxbasis.profile(small, example)
        with tempfile.TemporaryDirectory() as folder:
            loaded = fxbasis.load(model, fxbasis.save(small, folder))
    output = observe(small, example)
    return {
        "half_macs": round(work.macs / work.macs_before, 3) if work.macs_before else 1.0,
        "agrees": not work.disagreements,
        "half_finite": difference(output, output).relative == 0.0,
        "loaded_equal": difference(output, observe(loaded, example)).relative == 0.0,
    }


def _onnx(model: nn.Module, small: nn.Module, example: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, net in (("onnx_original", model), ("onnx_compressed", small)):
            try:
                file = fxbasis.export_onnx(net, example, Path(folder, "model.onnx"))
                found[key] = f"{file.exporter} {file.difference.relative:.0e}"
            except fxbasis.FxBasisError as error:
                found[key] = f"{type(error).__name__}: {str(error)[:150]}"
    return found


def limited(gib: float) -> Callable[[], None]:
    """What a child process does first: bound its memory."""
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)


def one(name: str, minutes: float, gib: float, onnx: bool) -> dict[str, Any]:
    """The row of one model, from a process of its own."""
    command = [sys.executable, __file__, "--one", name, *(["--onnx", "."] if onnx else [])]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60 * minutes,
            preexec_fn=limited(gib),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "status": "FAIL", "error": f"over {minutes} minutes"}
    if done.returncode:
        return {"name": name, "status": "FAIL", "error": done.stderr.strip().splitlines()[-1][:300]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and its totals above it."""
    passed = [row for row in rows if row["status"] == "pass"]
    lines = [
        f"{len(passed)} of {sum(row['status'] != 'no Conv2d' for row in rows)} models with a Conv2d pass; "
        f"{sum(row.get('graph', False) for row in rows)} of them are one graph; "
        f"{sum(row.get('executed', 0) for row in rows)} executed convolutions are numbered.",
        "",
        "| model | status | graph | convs | run | rewritten | full rank | allowed | half MACs | why |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        why = "; ".join(f"{reason} ({count})" for reason, count in row.get("left", {}).items())
        why = "; ".join(filter(None, [row.get("error", ""), row.get("python", ""), why])).replace("|", "/")
        cells = [row["name"], row["status"], "yes" if row.get("graph") else "no"]
        cells += [str(row.get(key, "")) for key in ("convs", "executed", "compressed")]
        cells += [f"{row[key]:.1e}" if key in row else "" for key in ("full", "allowed")]
        lines.append("| " + " | ".join([*cells, str(row.get("half_macs", "")), why]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not in the file yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--onnx", default="^$", help="regular expression of the names to export too")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(examine(options.one, onnx=bool(re.search(options.onnx, options.one)))))
        return
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {row["name"] for row in rows}
    for name in [n for n in model_names() if n not in done and re.search(options.only, n)]:
        rows.append(one(name, options.minutes, options.gib, bool(re.search(options.onnx, name))))
        with options.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1]["name"], rows[-1]["status"], rows[-1].get("error", ""), flush=True)
    if options.table:
        options.table.write_text(markdown(rows))


if __name__ == "__main__":
    main()
