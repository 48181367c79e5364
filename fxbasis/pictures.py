"""Pictures of sensitivities, fronts, layers and forecasts: each as PNG and SVG.

They need matplotlib (``pip install "fxbasis[plot]"``), of which ``Figure`` alone is used: no window is opened
and nothing global stays changed. Colours are those of Okabe and Ito, which colour-blind readers can tell
apart, and of viridis for what is ordered. Changes are on logarithmic scales, with a linear stretch below for
what is zero or at most a millionth of the largest; on linear ones where some are negative.

Source: figures 9 (one layer at a time) and 10 (cost against change) of arXiv 2408.06024.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .canvas import NAMED, Paths, check_picture, finished, name_layers, panels, rescale, width_for
from .errors import InputError, MissingExtraError
from .export.layer_times import LayerTimes
from .passes.profiling import LayerProfile, Profile
from .planning import ParetoFront
from .recipe import DENSE, Plan
from .sensitivities import Sensitivities, Sensitivity
from .structures import FORMS

__all__ = ["draw_forecast", "draw_front", "draw_layers", "draw_sensitivities", "layers_for_report"]

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PALE, GREY, DARK = "#DDDDDD", "#999999", "#333333"
FORM_COLOURS = {
    **{"output": GREEN, "gauge": BLUE, "weight": DARK, "reduced": "#882255", "input": PURPLE},
    **{"spatial": SKY, "tucker2": RED, "cp": ORANGE, "cp4": "#F0E442", "tt": "#332288", DENSE: GREY},
}
SHOWN = {0.15: "#440154", 0.3: "#31688e", 0.52: "#22a884", 0.85: "#8fd744"}
"""The MACs ratios whose changes are drawn, and their colours, from dark to light."""
STAGES = {"weights": "v", "data": "s", "sequential": "^", "recalibrated": "D"}
POINTS = 2000
"""Of a front at most so many are drawn, the first and the last among them."""
COSTS = {"macs": "MACs", "params": "parameters"}


def draw_sensitivities(table: Sensitivities, path: str | Path) -> Paths:
    """The change of the model when one layer alone is compressed, a panel for each form.

    Of each layer and form is drawn the largest rank at which it has at most 0.15, 0.3, 0.52 and 0.85 of its
    MACs, with the standard error over the images.

    Args:
        table: of ``sensitivities``.
        path: of the files, without ``.png`` and ``.svg``: both are written.

    >>> import tempfile, torch
    >>> from fxbasis.sensitivities import sensitivities
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)).eval()
    >>> table = sensitivities(model, torch.zeros(1, 3, 8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file.name for file in draw_sensitivities(table, folder + "/changes")]
    ['changes.png', 'changes.svg']

    Raises:
        InputError: for a table without rows.
        MissingExtraError: without matplotlib.
        UsageError: where the files cannot be written.
    """
    check_picture(path)
    if not table.rows:
        raise InputError("there are no sensitivities to draw; choose other layers or forms")
    layers = {row.layer.number: row.layer.name for row in table}
    forms = [form for form in FORMS if any(row.layer.form == form for row in table)]
    told = f"{_source(table)}; MACs over those of the dense layer"
    size = width_for(len(layers))
    figure, axes = panels(len(forms), "One layer compressed alone", told, width=size, sharey=True)
    for axis, form in zip(axes, forms, strict=True):
        _lines(axis, [row for row in table if row.layer.form == form], range(min(layers), max(layers) + 1))
        axis.set_ylabel(f"{form}: change ({table.unit})")
    rescale(axes[0], "y", [row.change for row in table])
    name_layers(axes[-1], layers)
    return finished(figure, path)


def _source(table: Sensitivities) -> str:
    """How the changes were found."""
    images = f"{table.images} images" if table.images else "no images"
    return f"estimator {table.estimator}, {images}" + ", bars: standard error" * any(r.error for r in table)


def _lines(axis: Any, rows: Sequence[Sensitivity], numbers: Sequence[int]) -> None:
    """For each ratio, the changes over the numbers, with a gap where there is none."""
    look = {"marker": "o", "markersize": 3 if len(numbers) > NAMED else 5, "linewidth": 1}
    for ratio, colour in SHOWN.items():
        found: dict[int, Sensitivity] = {}
        for row in sorted(rows, key=lambda row: row.macs_ratio):
            if row.macs_ratio <= ratio:
                found[row.layer.number] = row
        shown = [found.get(number) for number in numbers]
        values = [row.change if row else np.nan for row in shown]
        errors = [row.error if row else np.nan for row in shown]
        label = f"MACs at most {ratio}"
        drawn = axis.errorbar(numbers, values, errors, color=colour, label=label, elinewidth=1, **look)
        drawn[0].set_gid(f"{rows[0].layer.form}-{ratio}")


def draw_front(front: ParetoFront, path: str | Path, chosen: Plan | Sequence[Plan] | None = None) -> Paths:
    """Every plan that no other beats: its cost against the predicted change.

    Args:
        front: of ``pareto``.
        path: as of ``draw_sensitivities``.
        chosen: plans to mark at their predicted cost and change, with the budget. The plan of a compressed
            model (``plan_of``) also brings the changes that were measured, stage by stage of its fit to data.

    >>> import tempfile, torch
    >>> from fxbasis.planning import pareto
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)).eval()
    >>> front = pareto(model, torch.zeros(1, 3, 8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file.name for file in draw_front(front, folder + "/front", front.plan(0))]
    ['front.png', 'front.svg']

    Raises:
        InputError: for a plan that was made without a forecast.
        MissingExtraError: without matplotlib.
        UsageError: where the files cannot be written.
    """
    check_picture(path)
    plans = [] if chosen is None else [chosen] if isinstance(chosen, Plan) else list(chosen)
    if not all("change" in plan.forecast for plan in plans):
        raise InputError("a plan to mark has no forecast; mark plans that `plan` or `pareto` made")
    cost = COSTS[front.cost]
    told = f"{_source(front.table)}; {cost} of the whole model; {len(front):,} plans"
    figure, axes = panels(1, "Cost and predicted change of the best plans", told, height=4.2)
    kept = np.unique(np.linspace(0, len(front) - 1, POINTS).round().astype(int))
    costs, changes = np.array(front.costs)[kept], np.array(front.changes)[kept]
    axes[0].step(costs, changes, where="post", color=BLUE, label="best plans", gid="front")
    marked = [change for plan in plans for change in _mark(axes[0], plan, front.cost)]
    rescale(axes[0], "y", [*changes, *marked])
    axes[0].set_xlabel(f"{cost} over those of the original")
    axes[0].set_ylabel(f"change ({front.unit})")
    return finished(figure, path)


def _mark(axis: Any, plan: Plan, cost: str) -> list[float]:
    """Mark a plan, and return its predicted and its measured changes."""
    forecast, place = plan.forecast, plan.forecast[cost]
    if cost in forecast["asked"]:
        axis.axvline(forecast["asked"][cost], color=GREY, linewidth=1, linestyle="--", label="budget")
    look = {"color": RED, "marker": "*", "markersize": 13, "linestyle": "none", "zorder": 3}
    drawn = axis.errorbar(place, forecast["change"], forecast["error"], label="chosen, predicted", **look)
    drawn[0].set_gid("chosen")
    measured: Mapping[str, float] = forecast.get("fit", {}).get("changes", {})
    for stage, change in measured.items():
        look = {"marker": STAGES[stage], "facecolor": "none", "edgecolor": DARK, "zorder": 4}
        axis.scatter(place, change, label=f"measured, {stage}", gid=f"measured-{stage}", **look)
    return [forecast["change"], *measured.values()]


def draw_layers(profile: Profile, path: str | Path, times: Mapping[int, LayerTimes] | None = None) -> Paths:
    """The MACs of each convolution before and after, and, where given, its measured time.

    Args:
        profile: of a compressed model; that of a report is ``report.profile``.
        path: as of ``draw_sensitivities``.
        times: of ``measure_layer`` by the number of a layer, the form and ranks that it got among them.

    >>> import tempfile, torch, fxbasis
    >>> model, example = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 8, 8)
    >>> found = fxbasis.profile(fxbasis.compress(model, example, size=2), example)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file.name for file in draw_layers(found, folder + "/layers")]
    ['layers.png', 'layers.svg']

    Raises:
        InputError: for a profile without convolutions, and times without the form and ranks of a layer.
        MissingExtraError: without matplotlib.
        UsageError: where the files cannot be written.
    """
    check_picture(path)
    layers = {layer.number: layer for layer in profile.convs if layer.number is not None}
    if not layers:
        raise InputError("the profile has no convolution to draw; profile a model that has some")
    work = {number: (layer.macs_before, layer.macs) for number, layer in layers.items()}
    milliseconds = {number: _milliseconds(layers[number], found) for number, found in (times or {}).items()}
    size = width_for(len(layers))
    figure, axes = panels(1 + bool(times), "Each convolution before and after", _totals(profile), width=size)
    _bars(axes[0], layers, work, "macs")
    axes[0].set_ylabel(f"MACs (batch {profile.batch})")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:,.12g} M")
    for found in list((times or {}).values())[:1]:
        _bars(axes[1], layers, milliseconds, "time")
        axes[1].set_ylabel(f"time (ms, threads: {found.threads})")
    name_layers(axes[-1], {number: layer.name for number, layer in layers.items()})
    return finished(figure, path)


def layers_for_report(profile: Profile, folder: Path) -> str:
    """Draw ``layers.png`` and ``layers.svg``, and return the Markdown that shows them, or says why not."""
    try:
        draw_layers(profile, folder / "layers")
    except MissingExtraError as error:
        return f"No picture of the layers: {error}."
    return "![MACs of each convolution before and after](layers.svg)"


def _totals(profile: Profile) -> str:
    ratio = profile.macs / profile.macs_before
    return (
        f"MACs of the whole model {profile.macs_before:,} to {profile.macs:,} ({ratio:.3f}), batch "
        f"{profile.batch}; FLOPs = 2 x MACs"
    )


def _milliseconds(layer: LayerProfile, times: LayerTimes) -> tuple[float, float]:
    """Before and after; the weight form runs as the dense layer."""
    ratio = 1.0 if layer.form in (DENSE, "weight") else times.ratio(layer.form, layer.ranks)
    return times.dense_ms, times.dense_ms * ratio


def _bars(
    axis: Any, layers: Mapping[int, LayerProfile], pairs: Mapping[int, tuple[float, float]], what: str
) -> None:
    """A wide pale bar before, and a narrow one after in the colour of the form."""
    for number, (before, after) in pairs.items():
        form = layers[number].form
        label = "left dense" if form == DENSE else f"after, {form}"
        axis.bar(number, before, 0.9, color=PALE, label="before", gid=f"{what}-before-{number}")
        axis.bar(number, after, 0.5, color=FORM_COLOURS[form], label=label, gid=f"{what}-after-{number}")


def draw_forecast(
    pairs: Iterable[tuple[float, float]], path: str | Path, *, unit: str = "nats", told: str = ""
) -> Paths:
    """Predicted changes against measured ones, with the line on which they are equal.

    Args:
        pairs: (predicted, measured).
        path: as of ``draw_sensitivities``.
        unit: of both.
        told: how they were found: estimator, images, costs.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file.name for file in draw_forecast([(0.1, 0.12), (0.01, 0.009)], folder + "/forecast")]
    ['forecast.png', 'forecast.svg']

    Raises:
        InputError: for fewer than two pairs.
        MissingExtraError: without matplotlib.
        UsageError: where the files cannot be written.
    """
    check_picture(path)
    values = np.array(list(pairs), dtype=np.float64).reshape(-1, 2)
    if len(values) < 2:
        raise InputError(f"a forecast of {len(values)} pairs is no picture; pass two or more")
    rank = float(spearmanr(*values.T).statistic)
    told = f"{told}; " * bool(told) + f"{len(values)} pairs, Spearman's rank correlation {rank:.3f}"
    figure, (axis,) = panels(1, "Predicted and measured change", told, width=6, height=5)
    low, high = values.min(), values.max()
    if low > 0:
        low, high = 10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high))
    axis.plot([low, high], [low, high], color=GREY, linewidth=1, label="measured as predicted")
    look = {"facecolor": "none", "edgecolor": BLUE, "s": 18, "linewidth": 0.8, "zorder": 3}
    axis.scatter(*values.T, label="pairs", gid="pairs", **look)
    axis.margins(0 if low > 0 else 0.05)
    rescale(axis, "x", values.ravel())
    rescale(axis, "y", values.ravel())
    axis.set_xlabel(f"predicted change ({unit})")
    axis.set_ylabel(f"measured change ({unit})")
    return finished(figure, path)
