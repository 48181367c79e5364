"""The verbs that look for a plan: sensitivities and plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import (
    LIMITS,
    Result,
    add_budget,
    add_calibration,
    add_keep_if_slower,
    add_model,
    count,
    load_calibration,
    load_chosen,
    path_text,
    planning,
)

__all__ = ["PLAN_VERBS"]


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_calibration(parser)
    parser.add_argument("--layers", default="all", help='which layers, as of compress (default "all")')
    parser.add_argument("--multiple", type=count, default=1, help="ranks are multiples of it (default 1)")
    parser.add_argument(
        "--estimator",
        help="how the change is found: fisher (default), kfac, output, weight, measured or evaluate",
    )
    parser.add_argument(
        "--jsonl", type=path_text, metavar="FILE", help="keeps measured points as they come; resumes from it"
    )
    parser.add_argument("--minutes", type=float, help="of measured and evaluate, after which none is started")
    parser.add_argument(
        "--picture", type=path_text, metavar="FILE", help="also draw it, as FILE.png and FILE.svg"
    )


def _common(options: argparse.Namespace) -> dict[str, Any]:
    names = ("layers", "multiple", "estimator", "minutes", "statistics")
    return {**{name: getattr(options, name) for name in names}, "path": options.jsonl, **planning(options)}


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from .models import parse_input

    example = parse_input(options.input)
    return load_chosen(options), example, load_calibration(options, example)


def _picture(options: argparse.Namespace) -> Path | None:
    """Where to draw, checked before the work begins."""
    from .canvas import check_picture

    return check_picture(options.picture) if options.picture else None


def _add_sensitivities(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--forms", help="forms that are tried, with commas (default: all, by a first look)")
    parser.add_argument("--evaluate", metavar="MODULE:FUNCTION", help="a score of a model, higher is better")
    parser.add_argument("--csv", type=path_text, metavar="FILE", help="also write the table as CSV")


def _sensitivities(options: argparse.Namespace) -> Result:
    from .files import check_target
    from .sensitivities import sensitivities

    if options.csv:
        check_target(options.csv)
    picture = _picture(options)
    model, example, calibration = _loaded(options)
    table = sensitivities(model, example, calibration=calibration, **_common(options))
    if options.csv:
        table.to_csv(options.csv)
    if picture:
        from .pictures import draw_sensitivities

        draw_sensitivities(table, picture)
    return Result(str(table), table.to_dict())


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    add_budget(parser)
    add_keep_if_slower(parser)
    parser.add_argument("--threads", type=count, default=1, help="of the runs that are timed (default 1)")
    parser.add_argument(
        "--out", type=path_text, required=True, metavar="FILE.json", help="the plan, for compress --plan"
    )


def _plan(options: argparse.Namespace) -> Result:
    from .choices import asked_for
    from .files import check_target
    from .planning import pareto

    path, picture, how = check_target(options.out), _picture(options), _common(options)
    asked = asked_for(**{name: how.pop(name, None) for name in LIMITS})
    cost = "params" if list(asked) == ["params"] else "macs"
    asked |= {} if options.keep_if_slower else {"latency": asked.get("latency", 1.0)}
    model, example, calibration = _loaded(options)
    front = pareto(model, example, calibration=calibration, cost=cost, **how)
    found = front.within(asked, threads=options.threads)
    found.to_json(path)
    if picture:
        from .pictures import draw_front

        draw_front(front, picture, found)
    return Result(f"{found}\nwritten to {path}", found.to_dict())


PLAN_VERBS: dict[str, Any] = {
    "sensitivities": (
        _sensitivities,
        "how much the model changes when one layer alone is compressed",
        _add_sensitivities,
    ),
    "plan": (_plan, "find layers, forms and ranks for a budget, and write a plan", _add_plan),
}
