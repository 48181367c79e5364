"""The tensor forms beside tensorly-torch 0.5: the same layers at the same MACs, in one run.

    pip install tensorly tensorly-torch
    python examples/studies/tensorly_torch.py --data cifar10-jpeg.zip --weights resnet20-cifar10-jpeg.pt

Network and data are those of ``cifar_resnet20.py``; layers 2 to 19 are factorised, without training. fxbasis
gets ``macs_ratio`` for each layer and all else by default. tensorly-torch gets ``FactorizedConv.from_conv``
with ``implementation="factorized"`` and all else by default, and in each layer the smallest rank at which it
has at least as many MACs. "its own ranks" come from its ``rank=`` fraction, "the same ranks" are those of
fxbasis. MACs of both are half of what ``torch.utils.flop_counter`` counts for one image, and those of
fxbasis.profile where it is named. Every row that is measured is printed.
"""

from __future__ import annotations

import argparse
import copy
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from cifar_resnet20 import calibration_batches, load_images, load_model
from tabulate import tabulate
from tltorch import FactorizedConv
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxbasis
from fxbasis.demo.digits import accuracy

HEADERS = ["form", "of", "MACs", "accuracy", "recalibrated", "fit, s", "folds to Conv2d", "ONNX"]


class Case(NamedTuple):
    """One factorisation of tensorly-torch beside a form of fxbasis."""

    form: str
    label: str
    factorization: str
    same_ranks: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012


CASES = [
    Case("cp", "CP, 4 factors", "cp"),
    Case("cp", "CP, its 3-step forward", "cp", options={"implementation": "mobilenet"}),
    Case("cp4", "CP, 4 factors", "cp"),
    Case("tucker2", "Tucker, its own ranks", "tucker"),
    Case("tucker2", "Tucker, its own ranks, whole taps", "tucker", options={"fixed_rank_modes": "spatial"}),
    Case("tucker2", "Tucker, the same ranks", "tucker", same_ranks=True),
    Case("tt", "TT, its own ranks", "tt"),
    Case("tt", "TT, the same ranks", "tt", same_ranks=True),
]


def macs_of(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of one forward pass, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2


def factorized(conv: nn.Conv2d, case: Case, rank: Any, decompose: bool = False) -> nn.Module:
    """The layer of tensorly-torch for a convolution."""
    how = {"implementation": "factorized", **case.options}
    made: nn.Module = FactorizedConv.from_conv(
        conv, rank=rank, factorization=case.factorization, decompose_weights=decompose, **how
    )
    return made


def matched_rank(conv: nn.Conv2d, case: Case, x: torch.Tensor, least: int) -> Any:
    """The smallest CP rank, or fraction in steps of 1/512, at which the layer has at least so many MACs.

    A TT layer is decomposed to count: only that cuts ranks which a train of these modes cannot have.
    """
    scale: Callable[[int], Any] = int if case.factorization == "cp" else lambda step: step / 512
    low, high, train = 0, 2048, case.factorization == "tt"
    while high - low > 1:
        middle = (low + high) // 2
        enough = macs_of(factorized(conv, case, scale(middle), decompose=train), x) >= least
        low, high = (low, middle) if enough else (middle, high)
    return scale(high)


def same_rank(case: Case, layer: fxbasis.LayerPlan) -> tuple[int, ...]:
    """The ranks of a layer of fxbasis in the order of tensorly-torch."""
    if case.factorization == "tucker":
        return (layer.ranks[1], layer.ranks[0], *layer.kernel_size)
    return (1, *layer.ranks, 1)


def layer_inputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each convolution gets."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def theirs(model: nn.Module, ours: nn.Module, case: Case, x: torch.Tensor) -> tuple[nn.Module, float]:
    """A copy of the model with tensorly-torch's layers, and the seconds of its decompositions."""
    made, inputs, seconds = copy.deepcopy(model), layer_inputs(model, x), 0.0
    for layer in fxbasis.plan_of(ours).compressed:
        conv = model.get_submodule(layer.name)
        least = macs_of(ours.get_submodule(layer.name), inputs[layer.name])
        same = case.same_ranks
        rank = same_rank(case, layer) if same else matched_rank(conv, case, inputs[layer.name], least)
        start = time.perf_counter()
        made.set_submodule(layer.name, factorized(conv, case, rank, decompose=True))
        seconds += time.perf_counter() - start
    return made.eval(), seconds


def folds_by_hand(model: nn.Module, x: torch.Tensor) -> str:
    """Whether Conv2d with tensorly-torch's own reconstructed kernels computes the same."""
    dense = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedConv):
            kernel = layer.weight.to_tensor().detach()
            kernel = kernel.movedim(-1, 0) if layer.factorization.lower() == "tt" else kernel
            out, into, *size = kernel.shape
            sides = {key: getattr(layer, key).tolist() for key in ("stride", "padding", "dilation")}
            conv = nn.Conv2d(into, out, size, bias=False, **sides)
            conv.weight.data.copy_(kernel)
            dense.set_submodule(name, conv)
    with torch.no_grad():
        return f"no verb; by hand within {float((dense(x) - model(x)).abs().max()):.0e}"


def exports(model: nn.Module, x: torch.Tensor) -> str:
    """What torch.onnx.export and ONNX Runtime make of it."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = f"{folder}/model.onnx"
        try:
            torch.onnx.export(model, (x,), path, dynamo=True)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    with torch.no_grad():
        return f"yes, within {float((torch.from_numpy(found) - model(x)).abs().max()):.0e}"


def row(name: str, model: nn.Module, seconds: float, folds: str, data: dict[str, Any]) -> list[str]:
    """One measured row; the model's BatchNorms are recalibrated at the end."""
    images, labels, dense = data["images"], data["labels"], data["macs"]
    part, onnx = macs_of(model, images[:1]) / dense, exports(model, images[:2])
    plain = accuracy(model, images, labels)
    fxbasis.recalibrate_batchnorm_(model, data["batches"])
    after = accuracy(model, images, labels)
    print(name, part, plain, after, seconds, folds, onnx, flush=True)
    return [f"{part:.3f}", f"{plain:.2f} %", f"{after:.2f} %", f"{seconds:.1f}", folds, onnx]


def compare(model: nn.Module, form: str, ratio: float, data: dict[str, Any]) -> list[list[str]]:
    """The rows of a form: fxbasis, then every case of tensorly-torch beside it."""
    x, start = data["images"][:1], time.perf_counter()
    ours = fxbasis.compress(model, x, layers="2-19", form=form, macs_ratio=ratio)
    seconds = time.perf_counter() - start
    counted = fxbasis.profile(ours, x)
    assert counted.macs == macs_of(ours, x), "fxbasis.profile and PyTorch's counter disagree"
    folded = fxbasis.fold(ours)
    with torch.no_grad():
        folds = f"fold, within {float((folded(x) - ours(x)).abs().max()):.0e}"
    cases = [case for case in CASES if case.form == form]
    others = [(case.label, *theirs(model, ours, case, x)) for case in cases]
    rows = [[form, "fxbasis", *row(form, ours, seconds, folds, data)]]
    for label, made, spent in others:
        found = row(label, made, spent, folds_by_hand(made, data["images"][:2]), data)
        rows.append([form, f"tensorly-torch {label}", *found])
    return rows


def main() -> None:
    """Print one table of all forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--macs-ratio", type=float, default=0.5)
    parser.add_argument("--forms", nargs="+", default=["cp", "cp4", "tucker2", "tt"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = load_model(options.weights)
    images, labels = load_images(options.data)
    data = {"images": images, "labels": labels, "macs": macs_of(model, images[:1])}
    data["batches"] = calibration_batches(options.data)
    print(f"dense: {accuracy(model, images, labels):.2f} %, {data['macs']:,} MACs")
    rows = [line for form in options.forms for line in compare(model, form, options.macs_ratio, data)]
    print(tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
