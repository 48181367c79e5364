"""The demo: the whole way of a model, on an embedded CNN and real held-out digits, with no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..compression import compress
from ..costs import dense_macs
from ..passes.folding import fold
from ..passes.numbering import number_convs
from ..passes.records import ConvTable
from ..passes.selection import select
from ..recipe import Plan
from ..reporting import Report, report
from ..structures import form_macs
from .digits import accuracy, load_digits_split
from .network import digits_resnet

__all__ = ["half_of_the_work", "run_demo"]

BATCH = 32
STEPS = 64


def run_demo(folder: str | Path, *, say: Callable[[str], object] = print) -> Report:
    """Number, plan for half of the work, compress, compare accuracy, fold, export, measure, report.

    Args:
        folder: for the models, tables and the report; made if needed.
        say: takes each line of progress.

    Raises:
        MissingExtraError: when scikit-learn, which carries the digits, is not installed.
    """
    digits = load_digits_split()
    model, example = digits_resnet(), digits.test_images[:BATCH]
    table = number_convs(model, example)
    say(f"The embedded CNN, trained on {len(digits.train_labels)} handwritten digits:\n\n{table}\n")
    plan = half_of_the_work(table)
    small = compress(model, example, plan=plan)
    say(f"One rewritten layer:\n\n{one_layer(small, plan)}\n")
    remark = accuracies(model, small, digits.test_images, digits.test_labels)
    say(remark + "\n")
    return report(model, small, example, folder, title="fxbasis demo", remarks=(remark,), runs=200)


def half_of_the_work(table: ConvTable) -> Plan:
    """The plan with one fraction for all layers that comes closest to half of the MACs from below."""
    total = sum(record.macs or 0 for record in table)
    plans = (select(table, size=step / STEPS) for step in range(STEPS, 0, -1))
    return next(plan for plan in plans if _macs(plan, table) <= total / 2)


def _macs(plan: Plan, table: ConvTable) -> int:
    macs = 0
    for layer, record in zip(plan, table, strict=True):
        unit = dense_macs(record.shape, (1, 1))
        if layer.compressed:
            unit = form_macs(layer.form, layer.shape, layer.ranks, (1, 1), (1, 1))
        macs += (record.macs or 0) // dense_macs(record.shape, (1, 1)) * unit
    return macs


def one_layer(small: nn.Module, plan: Plan) -> str:
    """The first rewritten layer as a tree of its two convolutions."""
    name = plan.compressed[0].name
    basis, composition = (small.get_submodule(f"{name}.{part}") for part in ("basis", "composition"))
    return f"{name}\n├── basis        {basis}\n└── composition  {composition}"


def accuracies(model: nn.Module, small: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> str:
    """One sentence with the accuracy before, after, and after the fold."""
    before, after, folded = (accuracy(net, images, labels) for net in (model, small, fold(small)))
    return (
        f"Accuracy on {len(labels)} held-out images, no training and no BatchNorm recalibration: "
        f"{before:.2f} % original, {after:.2f} % compressed, {folded:.2f} % folded back."
    )
