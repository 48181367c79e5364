"""What the verbs of the command line share: arguments of models, numbers, results."""

from __future__ import annotations

import argparse
from typing import Any

MODEL_HELP = (
    "torchvision:NAME, timm:NAME, package.module:CALLABLE or path/to/file.py:CALLABLE; "
    "the callable takes no argument and returns a torch.nn.Module"
)


class Result:
    """What a verb prints: text for people, plain values for ``--json``."""

    def __init__(self, text: str, json: Any) -> None:
        self.text = text
        self.json = json


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how it is made."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Weights, seed and example input of a model."""
    parser.add_argument("--weights", metavar="FILE", help="state_dict to load: safetensors or torch.save")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read any pickle in --weights; this can run code from the file",
    )
    parser.add_argument(
        "--input",
        default="1x3x224x224",
        metavar="NxCxHxW",
        help="shape of the example input (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="seed of random weights, where --weights is not given (default 0)",
    )


def add_compressed(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The folder of a compressed model."""
    parser.add_argument(
        "--compressed",
        metavar="DIR",
        required=required,
        help="a folder that `fxbasis compress` wrote for MODEL; use its compressed model",
    )


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Runs and threads."""
    parser.add_argument("--runs", type=count, default=30, help="timed runs of each model (default 30)")
    parser.add_argument("--threads", type=count, default=1, help="threads for each run (default 1)")


def add_form(parser: argparse.ArgumentParser) -> None:
    """The form, and what belongs to it."""
    parser.add_argument(
        "--form",
        help="what stands for a convolution: output (default), gauge, weight, reduced, input, spatial, "
        "tucker2, cp, cp4 or tt; `fxbasis forms` compares their costs",
    )
    parser.add_argument(
        "--method",
        help="how its numbers are found: svd, eigen, qr, qr-unpivoted, random, als, atoms, subset",
    )
    parser.add_argument(
        "--beta", type=float, help="of --form reduced: part of the outputs that are sums (default 0.25)"
    )
    parser.add_argument(
        "--fixed-basis",
        action="store_true",
        default=None,
        help="no gradients for the first step, so that only the others learn",
    )


def count(text: str) -> int:
    """A whole number from 1 to 100000."""
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 100000")
    return int(text)


def seed_number(text: str) -> int:
    """A seed that torch and numpy take."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return int(text)


def load_chosen(options: argparse.Namespace, spec: str | None = None) -> Any:
    """The model that the arguments name."""
    from .models import load_model

    return load_model(
        spec or options.model,
        weights=options.weights,
        allow_pickle=options.allow_pickle,
        seed=options.seed,
    )


def load_pair(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, its compressed version or None, and the example input."""
    from .models import parse_input
    from .saving import load

    example = parse_input(options.input)
    model = load_chosen(options)
    return model, load(model, options.compressed) if options.compressed else None, example


def number(text: str) -> Any:
    """An int or a float, or a mistake of the user."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
