"""Half of ResNet-20's work by fxbasis, AIMET, tensorly-torch and Torch-Pruning, without training, in one run.

    pip install aimet-torch torch-pruning tensorly tensorly-torch
    python examples/studies/peers.py --data cifar10-jpeg.zip --weights resnet20-cifar10-jpeg.pt

Network and data are those of ``cifar_resnet20.py``. Everybody may use the same 1,000 training images, drawn
with a seed. AIMET's greedy search scores models by the labels of them; the others see no label. AIMET runs
with its defaults (ten ratios for each layer). tensorly-torch chooses no ranks: every layer but the first is
brought to the budget. Torch-Pruning removes channels by group magnitude, by the least ratio that keeps the
budget. MACs are half of what ``torch.utils.flop_counter`` counts for one image. Times are of ONNX Runtime,
one image, measured in turns. Accuracy is top-1 on all test images, as it comes and after BatchNorm
recalibration on the training images, by ``fxbasis.recalibrate_batchnorm_`` for all. A library that fails
has its error as its row.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from collections.abc import Callable
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cifar_plans import drawn
from cifar_resnet20 import image_names, load_images, load_model
from tabulate import tabulate
from tensorly_torch import Case, macs_of, theirs
from torch import nn

import fxbasis
from fxbasis.demo.digits import accuracy

HEADERS = ("by", "MACs", "accuracy, %", "recalibrated, %", "time, ONNX Runtime", "seconds")


class Given(NamedTuple):
    """What everybody may use."""

    model: nn.Module
    batches: list[torch.Tensor]
    labels: torch.Tensor
    budget: float

    @property
    def x(self) -> torch.Tensor:
        """One image."""
        return self.batches[0][:1]


def fxbasis_plan(given: Given, **how: Any) -> nn.Module:
    """The call that most people want."""
    return fxbasis.compress(given.model, given.x, macs=given.budget, calibration=given.batches, **how)


def aimet(given: Given, scheme: str) -> nn.Module:
    """Greedy selection of ratios, scored with labels."""
    from aimet_torch import defs
    from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
    from aimet_torch.compress import ModelCompressor

    model = copy.deepcopy(given.model)
    kind = {"spatial_svd": defs.SpatialSvdParameters, "weight_svd": defs.WeightSvdParameters}[scheme]
    greedy = GreedySelectionParameters(target_comp_ratio=Decimal(str(given.budget)))
    how = [defs.RankSelectScheme.greedy] if scheme == "weight_svd" else []
    automatic = kind.AutoModeParams(*how, greedy, modules_to_ignore=[model.conv1])
    parameters = kind(kind.Mode.auto, automatic)

    def score(net: nn.Module, iterations: int, use_cuda: bool = False) -> float:
        return accuracy(net, torch.cat(given.batches), given.labels)

    scheme_of, shape = CompressionScheme[scheme], tuple(given.x.shape)
    made: nn.Module = ModelCompressor.compress_model(
        model, score, 1, shape, scheme_of, CostMetric.mac, parameters
    )[0]
    return made


def tensorly(given: Given, form: str, case: Case) -> nn.Module:
    """Every layer but the first at the ranks that fit the budget of fxbasis' form of the same family."""
    ours = fxbasis.compress(given.model, given.x, layers="2-19", form=form, macs_ratio=given.budget)
    return theirs(given.model, ours, case, given.x)[0]


def torch_pruning(given: Given) -> nn.Module:
    """The least ratio of channels, by bisection, at which the budget is kept."""
    low, high, whole = 0.0, 0.9, macs_of(given.model, given.x)
    while high - low > 0.005:
        middle = (low + high) / 2
        fits = macs_of(pruned(given, middle), given.x) <= given.budget * whole
        low, high = (low, middle) if fits else (middle, high)
    return pruned(given, high)


def pruned(given: Given, ratio: float) -> nn.Module:
    """One model of Torch-Pruning."""
    import torch_pruning as tp

    model = copy.deepcopy(given.model)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    how = {"pruning_ratio": ratio, "ignored_layers": [model.linear]}
    tp.pruner.MagnitudePruner(model, given.x, importance=importance, **how).step()
    return model


WAYS: dict[str, Callable[[Given], nn.Module]] = {
    "fxbasis, macs=": fxbasis_plan,
    "fxbasis, macs=, forms=['spatial']": lambda given: fxbasis_plan(given, forms=["spatial"]),
    "AIMET spatial SVD, greedy": lambda given: aimet(given, "spatial_svd"),
    "AIMET weight SVD, greedy": lambda given: aimet(given, "weight_svd"),
    "tensorly-torch CP, uniform": lambda given: tensorly(given, "cp", Case("cp", "CP", "cp")),
    "tensorly-torch Tucker, uniform": lambda given: tensorly(
        given, "tucker2", Case("tucker2", "Tucker", "tucker")
    ),
    "Torch-Pruning, group magnitude": torch_pruning,
}


def main() -> None:
    """Run everybody, then measure all times in turns; write the table."""
    options = _options()
    warnings.simplefilter("ignore")
    model, load = load_model(options.weights), os.getloadavg()[0]
    batches, labels = drawn(options.data, 1000, 0), drawn_labels(options.data, 1000, 0)
    given = Given(model, batches, labels, options.budget)
    tests = load_images(options.data)
    rows = {"the original": row(model, 0.0, given, tests)}
    models: dict[str, nn.Module] = {"the original": model}
    for name, way in WAYS.items():
        start = time.perf_counter()
        try:
            models[name] = way(given).eval()
        except Exception as error:
            rows[name] = [f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"]
            print(name, rows[name], flush=True)
            continue
        rows[name] = row(models[name], time.perf_counter() - start, given, tests)
        print(name, rows[name], flush=True)
    for name, ratio in times_of(models, given.x).items():
        rows[name][3] = ratio
    table = tabulate([[name, *found] for name, found in rows.items()], HEADERS, "github")
    options.out.write_text(f"{about(options, load)}\n{table}\n", encoding="utf-8")
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args()


def drawn_labels(data: Path, count: int, seed: int) -> torch.Tensor:
    """Of the images that ``drawn`` draws."""
    names = image_names(data, "train")
    classes = sorted({name.split("/")[1] for name in names})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.tensor([classes.index(names[index].split("/")[1]) for index in order])


def row(model: nn.Module, seconds: float, given: Given, tests: Any) -> list[str]:
    """Its figures but for the time."""
    again = copy.deepcopy(model)
    fxbasis.recalibrate_batchnorm_(again, [(batch,) for batch in given.batches])
    part = macs_of(model, given.x) / macs_of(given.model, given.x)
    scores = [f"{accuracy(net, *tests):.2f}" for net in (model, again)]
    return [f"{part:.3f}", *scores, "", f"{seconds:.0f}"]


def times_of(models: dict[str, nn.Module], x: torch.Tensor) -> dict[str, str]:
    """Medians over that of the original, in turns; or why there is none."""
    found, files = {}, {}
    for name, model in models.items():
        try:
            fxbasis.measure(model, x, runs=1)
            files[name] = model
        except fxbasis.FxBasisError as error:
            found[name] = f"no ONNX: {str(error)[:60]}"
    times = fxbasis.measure(files, x, runs=300)
    first = times["the original"]
    return found | {name: f"{one.ratio_to(first):.3f}" for name, one in times.items()}


def about(options: argparse.Namespace, load: float) -> str:
    """The head of the table."""
    names = ("aimet-torch", "torch-pruning", "tensorly-torch", "tensorly", "torch", "onnxruntime")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        "# Half of ResNet-20's work, without training\n\n"
        "[Source](peers.py): who may use what stands at its top.\n"
        f"Budget {options.budget} of the MACs. {versions};\n{os.cpu_count()} processors, "
        f"{torch.get_num_threads()} thread(s), load {load:.1f} before, {os.getloadavg()[0]:.1f} after. "
        "Seconds are those from the model to the compressed one.\n"
    )


if __name__ == "__main__":
    main()
