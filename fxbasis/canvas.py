"""What the pictures have in common: figures without a window, scales, the names of layers, two files each."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .arguments import as_path
from .errors import MissingExtraError
from .files import check_target, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Paths", "check_picture", "finished", "name_layers", "panels", "rescale", "width_for"]

Paths: TypeAlias = tuple[Path, Path]
"""Of the PNG and the SVG."""

NAMED = 30
"""Up to so many layers are named on the axis; of more stand the numbers alone."""
DEPTH = 1e-6
"""What is at most this part of the largest value lies, with zero, below the logarithmic scale."""


def check_picture(path: str | Path) -> Path:
    """The path of a picture without ``.png`` and ``.svg``, refused before the work begins.

    >>> check_picture("front.svg").name, check_picture("front-0.5").name
    ('front', 'front-0.5')

    Raises:
        MissingExtraError: without matplotlib.
        UsageError: where the files cannot be written.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f'pictures need matplotlib ({error}): pip install "fxbasis[plot]"') from error
    path = as_path(path)
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".svg") else path
    for suffix in (".png", ".svg"):
        check_target(stem.with_name(stem.name + suffix))
    return stem


def width_for(layers: int) -> float:
    """Inches for so many layers side by side."""
    return float(np.clip(4 + 0.25 * min(layers, NAMED) + 0.05 * max(0, layers - NAMED), 7, 17))


def panels(
    rows: int, title: str, told: str, *, width: float = 7, height: float = 3.2, sharey: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure with panels one below the other, under its title and ``told``, the convention of its numbers.

    Args:
        rows: how many panels. title, told: on top.
        width, height: of a panel, in inches.
        sharey: whether the vertical axes are the same.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.8 + height * rows), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0])
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold")
    wrapped = textwrap.fill(told, int(13.5 * width))
    axes[0].set_title(wrapped, loc="left", fontsize=8.5, color="#444444")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#E8E8E8")
        axis.set_axisbelow(True)
    return figure, axes


def rescale(axis: Any, which: str, values: Iterable[float]) -> None:
    """Make the axis ``which`` logarithmic, with a linear stretch down to zero where values reach into it.

    Where some are negative it stays linear. To be called when everything is drawn, as limits stay then.
    """
    finite = np.array([value for value in values if np.isfinite(value)])
    above = finite[finite > DEPTH * finite.max(initial=0.0)]
    if finite.min(initial=0.0) < 0 or not len(above):
        return
    if len(above) == len(finite):
        axis.set(**{f"{which}scale": "log"})
    else:
        depth = 10 ** np.floor(np.log10(above.min()))
        (axis.set_yscale if which == "y" else axis.set_xscale)("symlog", linthresh=depth)
        axis.set(**{f"{which}lim": (0, None)})


def name_layers(axis: Any, names: Mapping[int, str]) -> None:
    """Label the horizontal axis by the numbers of layers, and by their names where these are few."""
    axis.set_xlim(min(names) - 0.8, max(names) + 0.8)
    if len(names) <= NAMED:
        axis.set_xticks(list(names), [f"{name}  {number}" for number, name in names.items()], rotation=90)
        axis.tick_params("x", labelsize=8)
    else:
        axis.locator_params("x", integer=True, nbins=20)
    axis.set_xlabel("convolution, by number")


def finished(figure: Figure, path: str | Path, columns: int = 4) -> Paths:
    """Put the legend under the figure, each label once, and write both files, whole or not at all."""
    from matplotlib import rc_context

    marks: dict[str, Any] = {}
    for axis in figure.axes:
        for mark, label in zip(*axis.get_legend_handles_labels(), strict=True):
            marks.setdefault(label, mark)
    look = {"ncols": columns, "fontsize": 8.5, "frameon": False}
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", **look)
    stem = check_picture(path)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxbasis"}):  # text stays text, ids the same
        png = _write(figure, stem, "png", {})
        figure.set_layout_engine("none")  # everything is in its place now
        return png, _write(figure, stem, "svg", {"Date": None})


def _write(figure: Figure, stem: Path, kind: str, metadata: dict[str, Any]) -> Path:
    content, path = io.BytesIO(), stem.with_name(f"{stem.name}.{kind}")
    figure.savefig(content, format=kind, dpi=150, metadata=metadata)
    write_whole(path, content.getvalue())
    return path
