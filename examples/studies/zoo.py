"""Every torchvision model and one timm model of each module file through the whole way of a model.

    python examples/studies/zoo.py --out zoo.jsonl --table zoo.md [--only REGEX] [--minutes 5] [--gib 8]
                                   [--onnx REGEX] [--onnx-sample]

For each model, with random weights, at the smallest image size that it takes: trace, number, compress every
convolution at full rank (outputs must equal the original's, with another batch and another image size too),
compress at half rank (finite, fewer MACs, formula equal to count), fold (equal), save and load (bit-equal),
and for a sample export to ONNX with a dynamic batch, original and compressed. ``plain`` says whether plain
``torch.fx.symbolic_trace`` would have been right: then the whole model has to be a graph here.

One process for each model, with a limit of CPU time and memory; the JSON lines are appended as they come, so
that an interrupted run goes on where it stopped. Detectors are compared on the outputs of backbone and dense
heads, before the boxes are sorted: these move under a change of 1e-6 of the original too. Random weights are
badly conditioned: ``allowed`` is the float32 tolerance of 1e-5, or ten times what one rounding of the inputs
does to the original's own outputs, where that is more. Parameters that are made constant get noise, because
a gain of zero would hide what is behind it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import signal
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zoo_checks import examine
from zoo_models import model_names, sampled
from zoo_table import markdown

SLOWEST = 6
"""How many times as long as on a core of its own a model may take, on a machine that does other work."""

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for each model


def _names(connection: Connection) -> None:
    warnings.simplefilter("ignore")
    connection.send(model_names())


def _examine(connection: Connection, name: str, minutes: float, gib: float, onnx: bool) -> None:
    """What a model's own process does: bound itself, and send the row whenever it has grown."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(60 * minutes),) * 2)
    warnings.simplefilter("ignore")
    for row in examine(name, onnx=onnx):
        connection.send(row)


def received(target: Any, *arguments: Any, seconds: float) -> tuple[Any, bool]:
    """The last thing that ``target`` sent from a process of its own, and whether it ended by itself."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    last, ended, end = None, False, time.monotonic() + seconds
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            last = ours.recv()
    except EOFError:
        ended = True
    if not ended:
        process.kill()
    process.join()
    return last, ended and process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL)


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one model; what exceeds a limit keeps what was found until then."""
    onnx = sampled(options.onnx, options.onnx_sample, name)
    limits = (options.minutes, options.gib)
    found, ended = received(_examine, name, *limits, onnx, seconds=SLOWEST * 60 * options.minutes)
    row = {"name": name} | (found or {})
    memory = re.search(r"MemoryError|alloc|not enough memory", row.get("error", ""))
    if not ended:
        row |= {"status": "not run", "error": f"over {options.minutes:g} minutes, or killed"}
    elif memory:
        row |= {"status": "not run", "error": f"over {options.gib:g} GiB: {row['error']}"}
    elif "status" not in row:
        row |= {"status": "FAIL", "error": "its process died"}
    return row


def remembered(file: Path) -> list[str]:
    """The names of the study, from the file beside the rows once they have been chosen."""
    if not file.exists():
        names, _ = received(_names, seconds=1800)
        file.write_text("\n".join(names) + "\n")
    return file.read_text().split()


def main() -> None:
    """Run what is not in the file yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--onnx", default="^$", help="regular expression of the names to export too")
    parser.add_argument("--onnx-sample", action="store_true", help="export 25 diverse models too")
    parser.add_argument("--minutes", type=float, default=5.0, help="of one core for one model")
    parser.add_argument("--gib", type=float, default=8.0, help="for one model")
    options = parser.parse_args()
    import timm  # noqa: F401 - once, here, for all processes
    import torchvision  # noqa: F401

    names = remembered(options.out.with_suffix(".names"))
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {row["name"] for row in rows}
    for name in [n for n in names if n not in done and re.search(options.only, n)]:
        rows.append(one(name, options))
        with options.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        said = (rows[-1].get(key, "") for key in ("status", "seconds", "error", "failed"))
        print(rows[-1]["name"], *said, flush=True)
    if options.table:
        options.table.write_text(markdown(rows))


if __name__ == "__main__":
    main()
