"""The command line: ``fxbasis VERB MODEL``, one verb for each step.

Exit code 0: done. 1: a check or a promise failed. 2: a mistake in the command, the model or a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

from . import __version__
from .errors import ExportError, FxBasisError, FxBasisWarning, VerificationError
from .verbs import VERBS

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", FxBasisWarning)
        warnings.showwarning = _show_warning
        try:
            with redirect_stdout(sys.stderr) if options.json else nullcontext():  # what a model prints
                result = options.run(options)
            print(json.dumps(result.json, indent=1) if options.json else result.text, flush=True)
        except (VerificationError, ExportError) as error:
            return _fail(error, 1)
        except FxBasisError as error:
            return _fail(error, 2)
        except KeyboardInterrupt:
            print("fxbasis: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            sys.stdout = None  # the reader has gone: there is nobody to flush to
    return 0


def _fail(error: FxBasisError, code: int) -> int:
    print(f"fxbasis: error: {error}", file=sys.stderr)
    return code


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, FxBasisWarning):
        print(f"fxbasis: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxbasis",
        description="Compress the convolutions of a CNN into basis convolutions and compositions, "
        "fold them back, export to ONNX, and measure.",
        epilog="Start with `fxbasis demo`, or `fxbasis doctor torchvision:resnet18`.",
    )
    parser.add_argument("--version", action="version", version=f"fxbasis {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (run, help_text, add) in VERBS.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text)
        add(verb)
        verb.add_argument("--json", action="store_true", help="print JSON for machines instead of text")
        verb.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
