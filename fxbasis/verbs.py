"""What each verb of the command line does, and its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import UsageError
from .options import (
    LIMITS,
    MODEL_HELP,
    Result,
    add_compress,
    add_compressed,
    add_model,
    add_model_options,
    add_timing,
    calibration_remark,
    load_calibration,
    load_chosen,
    load_pair,
    number,
    path_text,
    planning,
)
from .plan_verbs import PLAN_VERBS

__all__ = ["VERBS"]


def _add_layers(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_compressed(parser)
    parser.add_argument("--csv", type=path_text, metavar="FILE", help="also write the table as CSV")


def _layers(options: argparse.Namespace) -> Result:
    from .files import check_target
    from .passes.numbering import number_convs

    if options.csv:
        check_target(options.csv)
    model, small, example = load_pair(options)
    table = number_convs(small if small is not None else model, example)
    if options.csv:
        table.to_csv(options.csv)
    total = sum(record.macs or 0 for record in table)
    text = (
        f"{table}\n\n{len(table)} convolutions, {total:,} MACs (FLOPs = 2 x MACs) for input {options.input}"
    )
    return Result(text, table.to_dict() | {"functional": [asdict(conv) for conv in table.functional]})


def _doctor(options: argparse.Namespace) -> Result:
    from .diagnosis import doctor
    from .models import parse_input

    found = doctor(load_chosen(options), parse_input(options.input))
    return Result(str(found), found.to_dict())


def _compress(options: argparse.Namespace) -> Result:
    from .compression import compress
    from .files import check_folder
    from .models import of_zoo, parse_input
    from .reporting import report

    check_folder(options.out)
    given = _asked(options)
    example = parse_input(options.input)
    model = load_chosen(options)
    timing = {"keep_if_slower": options.keep_if_slower, "threads": options.threads}
    calibration = load_calibration(options, example)
    data = {"calibration": calibration, "statistics": options.statistics}
    small = compress(model, example, plan=options.plan, **data, **given, **timing)
    remarks = calibration_remark(options)
    random = f"Weights are random (seed {options.seed}): times and sizes hold, accuracy does not exist."
    done = report(
        model,
        small,
        example,
        options.out,
        title=options.model,
        remarks=remarks if options.weights or not of_zoo(options.model) else (random, *remarks),
        runs=options.runs,
        threads=options.threads,
    )
    return Result(f"{done.profile.table()}\n\n{done}\nwritten to {options.out}", done.to_dict())


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What decides on layers, forms and ranks, as far as given; refuses what contradicts itself."""
    from .passes.settings import RANK_RULES

    names = ("layers", *RANK_RULES, "multiple", "form", "method", "fixed_basis", "beta", "effective_weights")
    chosen = {key: getattr(options, key) for key in names}
    given = {key: value for key, value in chosen.items() if value is not None} | planning(options)
    if options.plan and given:
        flags = ", ".join(map(_flag, given))
        raise UsageError(f"--plan decides instead of {flags}; give one of them")
    rules = [_flag(name) for name in RANK_RULES if name in given]
    limits = [_flag(name) for name in LIMITS if name in given]
    if len(rules) + bool(limits) > 1:
        raise UsageError(f"{' and '.join([*rules, *limits][:2])} both say the rank; give one of them")
    if "size" in given:
        given["size"] = number(given["size"])
    return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_fold(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_compressed(parser, required=True)
    parser.add_argument(
        "--out",
        type=path_text,
        required=True,
        metavar="FILE",
        help="safetensors file for the folded state_dict",
    )


def _fold(options: argparse.Namespace) -> Result:
    from .files import check_target
    from .passes.folding import fold
    from .proving import rewrite_difference
    from .stored_state import save_state

    path = check_target(options.out)
    _, small, example = load_pair(options)
    folded = fold(small)
    found = rewrite_difference(folded, small, example)
    save_state(folded, path)
    text = f"folded into {options.out}, with the original's keys; relative difference {found.relative:.2e}"
    return Result(text, {"file": options.out, "relative_difference": found.relative})


def _add_profile(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_compressed(parser)
    parser.add_argument(
        "--training", action="store_true", help="count a training step: a forward and a backward pass"
    )


def _profile(options: argparse.Namespace) -> Result:
    from .passes.profiling import profile

    model, small, example = load_pair(options)
    found = profile(small if small is not None else model, example, training=options.training)
    return Result(str(found), found.to_dict())


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_compressed(parser)
    parser.add_argument(
        "--out", type=path_text, required=True, metavar="FILE.onnx", help="the ONNX file to write"
    )
    parser.add_argument("--static-batch", action="store_true", help="keep the batch size of --input fixed")


def _export(options: argparse.Namespace) -> Result:
    from .export.exporting import export_onnx
    from .files import check_target

    path = check_target(options.out)
    model, small, example = load_pair(options)
    target = small if small is not None else model
    file = export_onnx(target, example, path, dynamic_batch=not options.static_batch)
    return Result(
        str(file),
        {
            "file": str(file.path),
            "size_bytes": file.size_bytes,
            "exporter": file.exporter,
            "opset": file.opset,
            "dynamic_batch": file.dynamic_batch,
            "relative_difference": file.difference.relative,
            "tolerance": file.tolerance,
        },
    )


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"one or more: FILE.onnx, {MODEL_HELP}")
    add_model_options(parser)
    add_compressed(parser)
    parser.add_argument(
        "--runtime",
        choices=("onnxruntime", "eager"),
        default="onnxruntime",
        help="onnxruntime (default), or eager for models that are no file",
    )
    add_timing(parser)


def _measure(options: argparse.Namespace) -> Result:
    from .export.measuring import measure
    from .models import parse_input
    from .saving import load

    example = parse_input(options.input)
    if options.weights and sum(not name.endswith(".onnx") for name in options.models) > 1:
        raise UsageError("--weights fits one model only; measure the others as ONNX files")
    for name in options.models:
        if name.endswith(".onnx") and options.runtime == "eager":
            raise UsageError(f"{name} cannot run in eager PyTorch; give MODEL, or --runtime onnxruntime")
        if name.endswith(".onnx") and not Path(name).is_file():
            raise UsageError(f"{name} is not a file; write it with `fxbasis export`")
    repeated = [name for name in options.models if options.models.count(name) > 1]
    if repeated:
        raise UsageError(f"{repeated[0]} is named more than once; name each model once")
    targets = {
        name: name if name.endswith(".onnx") else load_chosen(options, name) for name in options.models
    }
    if options.compressed:
        name, model = next(iter(targets.items()))
        if isinstance(model, str):
            raise UsageError(
                f"--compressed needs a model, {name} is a file; give MODEL, or compressed.onnx itself"
            )
        targets[options.compressed] = load(model, options.compressed)
    times = measure(targets, example, runs=options.runs, threads=options.threads, runtime=options.runtime)
    first = next(iter(times.values()))
    lines = [f"{name}: {time}; {time.ratio_to(first):.3f} of the first" for name, time in times.items()]
    return Result("\n".join(lines), {name: time.to_dict() for name, time in times.items()})


def _add_forms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer",
        required=True,
        type=_layer,
        metavar="C_IN,C_OUT,K,H,W",
        help="channels, kernel, height and width of a layer with stride 1, for example 64,64,3,56,56",
    )
    parser.add_argument("--macs-ratio", type=float, default=0.5, help="part of the MACs (default 0.5)")
    parser.add_argument("--measure", action="store_true", help="time each form in ONNX Runtime, too")


def _layer(text: str) -> list[int]:
    sizes = text.split(",")
    if len(sizes) != 5 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not C_IN,C_OUT,K,H,W, five whole numbers from 1")
    return [int(size) for size in sizes]


def _forms(options: argparse.Namespace) -> Result:
    from .costs import ConvShape
    from .form_table import form_table

    channels, filters, kernel, height, width = options.layer
    shape = ConvShape(channels, filters, (kernel, kernel))
    table = form_table(shape, (height, width), options.macs_ratio, measured=options.measure)
    return Result(str(table), table.to_dict())


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path_text, default="fxbasis-demo", metavar="DIR", help="folder (default %(default)s)"
    )


def _demo(options: argparse.Namespace) -> Result:
    from .demo import run_demo
    from .files import check_folder

    check_folder(options.out)
    done = run_demo(options.out, say=(lambda _: None) if options.json else print)
    return Result(f"{done}\nwritten to {options.out}; read {options.out}/report.md", done.to_dict())


Verb = tuple[Callable[[argparse.Namespace], Result], str, Callable[[argparse.ArgumentParser], None]]
VERBS: dict[str, Verb] = {
    "doctor": (_doctor, "say what can be compressed, what not and why, before any work", add_model),
    "layers": (_layers, "number the convolutions of a model, with sizes, MACs and status", _add_layers),
    "forms": (_forms, "what every form of one layer costs at equal work", _add_forms),
    "compress": (_compress, "compress a model, check it, export it, measure it, report", add_compress),
    **PLAN_VERBS,
    "fold": (_fold, "fold a compressed model back to the original's structure", _add_fold),
    "profile": (_profile, "count MACs, parameters and activations, layer by layer", _add_profile),
    "export": (_export, "write a checked ONNX file of a model or its compressed version", _add_export),
    "measure": (_measure, "measure latency of models and ONNX files, in turn in one loop", _add_measure),
    "demo": (_demo, "the whole job on an embedded CNN and real handwritten digits", _add_demo),
}
