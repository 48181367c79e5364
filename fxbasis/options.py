"""Arguments of the command line: of compress, those that verbs share, numbers; and results."""

from __future__ import annotations

import argparse
from typing import Any

MODEL_HELP = (
    "torchvision:NAME, timm:NAME, package.module:CALLABLE or path/to/file.py:CALLABLE; "
    "the callable takes no argument and returns a torch.nn.Module"
)
LIMITS = ("macs", "params", "latency", "max_drop")
"""What can be planned for."""


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
    parser.add_argument(
        "--weights", type=path_text, metavar="FILE", help="state_dict to load: safetensors or torch.save"
    )
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
        type=path_text,
        metavar="DIR",
        required=required,
        help="a folder that `fxbasis compress` wrote for MODEL; use its compressed model",
    )


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Runs and threads."""
    parser.add_argument("--runs", type=count, default=30, help="timed runs of each model (default 30)")
    parser.add_argument("--threads", type=count, default=1, help="threads for each run (default 1)")


def add_compress(parser: argparse.ArgumentParser) -> None:
    """Everything that `fxbasis compress` takes."""
    add_model(parser)
    parser.add_argument(
        "--out", type=path_text, required=True, metavar="DIR", help="folder for models, tables and report"
    )
    parser.add_argument(
        "--layers",
        help='numbers, ranges and names with commas ("2-5,10"), or "re:PATTERN": rewritten even where that '
        'costs more MACs; or "all" (default): every layer that qualifies and whose cost falls',
    )
    parser.add_argument(
        "--size",
        help="basis convolutions of each layer: an integer, or a fraction of its filters (default 0.5)",
    )
    parser.add_argument("--macs-ratio", type=float, help="instead of --size: part of each layer's MACs")
    parser.add_argument("--params-ratio", type=float, help="instead of --size: part of each layer's weights")
    parser.add_argument("--energy", type=float, help="instead of --size: part of the weight's squared norm")
    parser.add_argument(
        "--evbmf", action="store_true", default=None, help="instead of --size: variational Bayes (low ranks)"
    )
    parser.add_argument(
        "--multiple",
        type=count,
        help="round ranks to a multiple of this: down under a ratio of costs, otherwise up",
    )
    add_form(parser)
    parser.add_argument(
        "--effective-weights",
        action="store_true",
        default=None,
        help="compress classes that standardise their weight by the kernel they compute, too",
    )
    add_budget(parser)
    add_calibration(parser)
    parser.add_argument(
        "--plan", type=path_text, metavar="FILE", help="a plan.json that decides instead of those above"
    )
    add_keep_if_slower(parser)
    add_timing(parser)


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


def add_budget(parser: argparse.ArgumentParser) -> None:
    """What to plan for, and of what."""
    group = parser.add_argument_group("planning: which layers, forms and ranks, for the whole model")
    for name, what in (("macs", "MACs"), ("params", "parameters"), ("latency", "measured time")):
        group.add_argument(f"--{name}", type=float, metavar="PART", help=f"at most this part of the {what}")
    group.add_argument(
        "--max-drop", type=float, help="least MACs within this predicted change (nats, or score)"
    )
    group.add_argument("--forms", help="forms that are tried, with commas (default: all, by a first look)")
    group.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="a function of a model to a score, higher is better, that sensitivities are measured by",
    )


def add_keep_if_slower(parser: argparse.ArgumentParser) -> None:
    """Whether times are looked at."""
    parser.add_argument(
        "--keep-if-slower",
        action="store_true",
        help="rewrite layers that measure slower than dense in ONNX Runtime, too; otherwise they stay dense, "
        "and what is planned here must also be no slower as a whole",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Unlabelled images."""
    parser.add_argument(
        "--calibration",
        type=path_text,
        metavar="FOLDER",
        help="images without labels, in any subfolders; prepared as torchvision or timm states for MODEL, or "
        "by what is called transform beside CALLABLE (of a PIL image, to a tensor)",
    )
    parser.add_argument(
        "--statistics",
        type=path_text,
        metavar="FILE",
        help="keeps the sums of the calibration pass; read again by the next command on model and images",
    )
    parser.add_argument("--images", type=count, default=1000, help="of them at most so many (default 1000)")


def load_calibration(options: argparse.Namespace, example: Any) -> Any:
    """Batches of the calibration folder; None without one."""
    from .images import images_in, preparation_of

    if options.calibration is None:
        return None
    return images_in(
        options.calibration, tuple(example.shape[-3:]), preparation_of(options.model), options.images
    )


def calibration_remark(options: argparse.Namespace) -> tuple[str, ...]:
    """How the calibration images were prepared, in a sentence."""
    from .images import preparation_of

    if options.calibration is None:
        return ()
    return (f"Calibration images of {options.calibration} were prepared {preparation_of(options.model)}.",)


def planning(options: argparse.Namespace) -> dict[str, Any]:
    """Budgets, forms and score, as far as given."""
    from .models import load_function

    found = {name: getattr(options, name, None) for name in LIMITS}
    if options.forms:
        found["forms"] = tuple(form.strip() for form in options.forms.split(","))
    if options.evaluate:
        found["evaluate"] = load_function(options.evaluate)
    return {name: value for name, value in found.items() if value is not None}


def path_text(text: str) -> str:
    """The name of a file or folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is no path")
    return text


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
