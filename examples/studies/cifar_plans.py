"""ResNet-20 on CIFAR-10: whole plans for a budget of MACs, fitted to unlabelled images, without any training.

    python examples/studies/cifar_plans.py --data cifar10-jpeg.zip --weights resnet20-cifar10-jpeg.pt
    python examples/studies/cifar_plans.py --data ... --weights ... --budgets 0.5 --images 500

``--data`` and ``--weights`` are those of ``cifar_resnet20.py``. The calibration images are drawn from
``train/``, with a seed, and their labels are never read; every budget starts anew from the model. Exits with
1, once the table is written, when one of the figures that are required is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from cifar_resnet20 import image_names, load_images, load_model, read_images
from scipy.stats import spearmanr
from torch import nn

import fxbasis
from fxbasis.demo.digits import accuracy
from fxbasis.export.layer_runs import processor
from fxbasis.pictures import draw_forecast

BASELINE = ("output", "gauge")
FEW = ("cp", "gauge", "spatial")
LEAST = {(0.5, None): 87.4, (0.35, None): 85.8, (0.5, BASELINE): 80.0}
LEAST_CORRELATION = 0.9
SUBSET = 256
STAGES = ("weights", "data", "sequential", "recalibrated")

HEAD = """# ResNet-20 on CIFAR-10 within a budget of MACs

`python examples/studies/cifar_plans.py --data cifar10-jpeg.zip --weights resnet20-cifar10-jpeg.pt`
([source](cifar_plans.py)): `fxbasis.compress(model, example, macs=..., calibration=..., forms=...)`, nothing
else. {images} training images, drawn with seed {seed}, without their labels; no gradient step. Accuracy is
top-1 on all {tests:,} test images; the original has {accuracy:.2f} % at {macs:,} MACs an image. MACs are
counted from the operations that ran. Changes are means over images of the outputs' Kullback-Leibler
divergence, in nats: predicted before anything is built (Fisher, {estimated} images), and measured on the
calibration images after each stage of the fit; the stage with the least is kept. Seconds are from the model
to the compressed model.

{processor}, {processors} processors, {threads} thread(s); torch {torch}, fxbasis {fxbasis}, Python {python}.
Load of the machine, shared with other programs: {before:.1f} at the start, {after:.1f} at the end.
"""
COLUMNS = ("budget", "forms", "MACs", "predicted", *STAGES, "kept", "accuracy, %", "s, wall", "s, processor")


def main() -> int:
    """Write and print the table; 0 when every required figure is reached."""
    options = _options()
    before = os.getloadavg()[0]
    model, calibration = load_model(options.weights), drawn(options.data, options.images, options.seed)
    pairs = predicted_and_measured(model, calibration, options.forms)
    agreement, points = float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)
    print(f"Spearman's rank correlation {agreement:.4f} over {points} points", flush=True)
    draw_forecast(pairs, options.out.with_suffix(""), told=f"one layer alone, {SUBSET} images")
    tests = load_images(options.data)
    wanted: list[Any] = [(budget, options.forms) for budget in options.budgets]
    wanted += [(0.5, BASELINE), (0.5, FEW)]
    rows = {one: said(budget_row(model, calibration, tests, *one)) for one in wanted}
    required = {one: least for one, least in LEAST.items() if one in rows}
    met = all(rows[one]["accuracy, %"] >= least for one, least in required.items())
    facts = {"images": options.images, "seed": options.seed, "before": before, "after": os.getloadavg()[0]}
    facts |= {"tests": len(tests[1]), "accuracy": accuracy(model, *tests)}
    facts |= {"estimated": rows[wanted[0]]["images"], "macs": fxbasis.profile(model, tests[0][:1]).macs}
    asked = (
        f"{_named(forms)} at {budget} of the MACs at least {least} %: "
        f"{rows[budget, forms]['accuracy, %']:.2f} %"
        for (budget, forms), least in required.items()
    )
    closing = (
        f"Required: {'; '.join(asked)}.\n\nRequired: at least {LEAST_CORRELATION} as Spearman's rank "
        f"correlation between the fisher estimate and the measured change of one layer alone, over {points} "
        f"layers, forms and ranks, {SUBSET} images: {agreement:.3f} ([picture]({options.out.stem}.png)).\n"
    )
    options.out.write_text(f"{head(facts)}\n{table([*rows.values()])}\n\n{closing}", encoding="utf-8")
    print(f"{closing}\nwritten to {options.out}")
    return 0 if met and agreement >= LEAST_CORRELATION else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.25], help="parts of MACs")
    parser.add_argument("--images", type=int, default=1000, help="training images (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="that they are drawn with (default 0)")
    parser.add_argument("--forms", type=lambda text: tuple(text.split(",")), help="with commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args()


def _named(forms: tuple[str, ...] | None) -> str:
    return "every form" if forms is None else ", ".join(forms)


def drawn(data: Path, count: int, seed: int, size: int = 250) -> list[torch.Tensor]:
    """Training images in batches; their labels are never read."""
    names = image_names(data, "train")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count]
    return list(read_images(data, [names[index] for index in order]).split(size))


def budget_row(
    model: nn.Module, calibration: list[torch.Tensor], tests: Any, budget: float, forms: Any
) -> dict[str, Any]:
    """Compress for one budget, with the clock running, and measure."""
    example, wall, processing = tests[0][:2], time.perf_counter(), time.process_time()
    small = fxbasis.compress(model, example, macs=budget, calibration=calibration, forms=forms)
    wall, processing = time.perf_counter() - wall, time.process_time() - processing
    work, forecast = fxbasis.profile(small, example), fxbasis.plan_of(small).forecast
    return {
        "budget": budget,
        "forms": _named(forms),
        "MACs": work.counted / work.macs_before,
        "predicted": forecast["change"],
        **forecast["fit"]["changes"],
        "kept": forecast["fit"]["kept"],
        "accuracy, %": accuracy(small, *tests),
        "s, wall": wall,
        "s, processor": processing,
        "images": forecast["images"],
    }


def said(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed on the way."""
    print(", ".join(f"{name} {text}" for name, text in zip(COLUMNS, cells(row), strict=True)), flush=True)
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Its columns as text."""
    formats = {"MACs": ".4f", "accuracy, %": ".2f", "s, wall": ".0f", "s, processor": ".0f"}
    formats |= dict.fromkeys(("predicted", *STAGES), ".3f")
    return [format(row[name], formats.get(name, "")) for name in COLUMNS]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def head(facts: dict[str, Any]) -> str:
    """What the table was made of and on."""
    versions = {"torch": torch.__version__, "fxbasis": fxbasis.__version__}
    versions |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    return HEAD.format(**facts, **versions, processor=processor(), processors=os.cpu_count())


def predicted_and_measured(
    model: nn.Module, calibration: list[torch.Tensor], forms: Any
) -> list[tuple[float, float]]:
    """The change by one layer alone, by the fisher estimate and as measured, over layers, forms and ranks."""
    images = torch.cat(calibration)[:SUBSET]
    how = {"calibration": list(images.split(SUBSET)), "forms": forms}
    fisher, measured = (
        fxbasis.sensitivities(model, images[:2], estimator=name, **how) for name in ("fisher", "measured")
    )
    return [(one.change, other.change) for one, other in zip(fisher, measured, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
