"""The demo: the whole way of a model, on an embedded CNN and real held-out digits, with no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..compression import compress, plan_of
from ..passes.folding import fold
from ..passes.numbering import number_convs
from ..reporting import report
from ..reports import Report
from .digits import accuracy, load_digits_split
from .network import digits_resnet

__all__ = ["run_demo"]

BATCH = 32
"""Of the example inputs, by which costs and times are taken."""


def run_demo(folder: str | Path, *, say: Callable[[str], object] = print) -> Report:
    """Number, plan for half of the work, compress, compare accuracy, fold, export, measure, report.

    The plan and the fits see the training images, without their labels.

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
    small = compress(model, example, macs=0.5, calibration=torch.split(digits.train_images, BATCH))
    say(f"The plan for half of its work:\n\n{plan_of(small)}\n")
    say(f"One rewritten layer:\n\n{one_layer(small)}\n")
    remark = accuracies(model, small, digits.test_images, digits.test_labels)
    say(remark + "\n")
    return report(model, small, example, folder, title="fxbasis demo", remarks=(remark,), runs=200)


def one_layer(small: nn.Module) -> str:
    """The first rewritten layer as a tree of its steps."""
    name = plan_of(small).compressed[0].name
    *before, last = small.get_submodule(name).named_children()
    lines = [f"├── {step:<12} {module}" for step, module in before]
    return "\n".join([name, *lines, f"└── {last[0]:<12} {last[1]}"])


def accuracies(model: nn.Module, small: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> str:
    """One sentence with the accuracy before, after, and after the fold."""
    before, after, folded = (accuracy(net, images, labels) for net in (model, small, fold(small)))
    return (
        f"Accuracy on {len(labels)} held-out images, without training: "
        f"{before:.2f} % original, {after:.2f} % compressed, {folded:.2f} % folded back."
    )
