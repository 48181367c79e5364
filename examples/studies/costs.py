"""The founding paper's costs beside the true ones and beside what PyTorch does: writes ``costs.md``.

    python examples/studies/costs.py [--out examples/studies/costs.md]

The printed formulas come from ``fxbasis.paper``, the closed forms from ``fxbasis.structures``. Counted is one
forward and one backward pass on the meta device: matrix products and convolutions by PyTorch's
``FlopCounterMode`` (two FLOPs are one MAC), products entry by entry, which it leaves out, by their elements.
The script refuses to write a table in which a closed form is not the count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxbasis import paper
from fxbasis.costs import ConvShape, dense_macs
from fxbasis.forms import BasisConv2d
from fxbasis.recipe import LayerPlan
from fxbasis.structures import break_even_rank, form_macs, training_macs
from fxbasis.tables import aligned

BETA = 0.25
LAYERS = {
    "ResNet-18 stem, 3 -> 64, 7x7, 112x112": (3, 64, 7, 112),
    "64 -> 64, 3x3, 56x56": (64, 64, 3, 56),
    "512 -> 512, 3x3, 7x7": (512, 512, 3, 7),
    "ResNet-18 downsample, 64 -> 128, 1x1, 28x28": (64, 128, 1, 28),
    "ResNet-50 expand, 64 -> 256, 1x1, 56x56": (64, 256, 1, 56),
}
MODES = {"N": "dense", "N'": "weight", "N''": "output", "N'''": "reduced", "": "gauge"}
ERRORS = {
    "The parameter threshold and the forward threshold are one number, C q / (q + C). The paper prints it "
    'twice and concludes "always the case" from one and "just for relatively small values" from the other.': (
        "test_paper.py::test_parameter_and_forward_threshold_are_the_same_number",
        "test_paper.py::test_parameter_threshold_is_not_always_met",
    ),
    "The backward count of output composition multiplies its two stages. Autograd adds them: twice the "
    "forward count of the same structure.": (
        "test_paper.py::test_output_composition_backward_is_twice_its_forward",
        "test_paper.py::test_output_composition_backward_is_printed_too_big_whatever_the_basis",
        "test_paper.py::test_training_accelerates_up_to_the_forward_threshold",
    ),
    'D3, "as long as R <= 2": even in the printed count two basis convolutions do not accelerate training.': (
        "test_paper.py::test_two_basis_convolutions_do_not_accelerate_in_the_printed_count",
    ),
    "The condition of the reduced mode, alpha + beta < 1, leaves more copies than atoms, so that outputs "
    "repeat; and the design of its figure, each atom copied once, never accelerates in the printed count, "
    "while in truth it does.": (
        "test_paper.py::test_accelerated_reduced_mode_repeats_outputs",
        "test_paper.py::test_copying_each_basis_output_once_never_accelerates_in_the_printed_count",
        "test_reduced.py::test_where_the_paper_accelerates_outputs_repeat_up_to_scale",
        "test_reduced.py::test_the_design_of_the_papers_figure_accelerates_though_its_own_count_denies_it",
    ),
}


class Products(TorchDispatchMode):
    """Counts the elements of products entry by entry."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        output = func(*args, **(kwargs or {}))
        self.count += output.numel() if func is torch.ops.aten.mul.Tensor else 0
        return output


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """The MACs of a call, and what it returns."""
    with FlopCounterMode(display=False) as flops, Products() as products:
        found = run()
    return flops.get_total_flops() // 2 + products.count, found


def layer_of(shape: ConvShape, form: str, ranks: tuple[int, ...]) -> nn.Module:
    """The layer in a form, without data."""
    height, width = shape.kernel_size
    channels = {"in_channels": shape.in_channels, "out_channels": shape.out_channels}
    conv = nn.Conv2d(*channels.values(), (height, width), padding="same", bias=False, device="meta")
    if form == "dense":
        return conv
    plan = LayerPlan(
        number=1, name="conv", **channels, kernel_size=(height, width), form=form, method="", ranks=ranks
    )
    return BasisConv2d.empty_like(conv, plan)


def measured(shape: ConvShape, side: int, form: str, ranks: tuple[int, ...]) -> tuple[int, int]:
    """MACs of a forward and of a backward pass, the gradient of the input included."""
    module = layer_of(shape, form, ranks)
    x = torch.empty(1, shape.in_channels, side, side, device="meta", requires_grad=True)
    forward, output = counted(lambda: module(x))
    return forward, counted(lambda: output.backward(torch.empty_like(output)))[0]


def true(shape: ConvShape, side: int, form: str, ranks: tuple[int, ...]) -> tuple[int, int]:
    """The closed forms of both."""
    size = (side, side)
    if form == "dense":
        return dense_macs(shape, size), 2 * dense_macs(shape, size)
    forward = form_macs(form, shape, ranks, size, size)
    return forward, training_macs(form, shape, ranks, size, size) - forward


def printed(sizes: tuple[int, ...], form: str, rank: int) -> tuple[float | None, float | None]:
    """What the paper says of both; None where it says nothing."""
    found: dict[str, tuple[float | None, float | None]] = {
        "dense": (paper.forward_dense(*sizes), paper.backward_dense(*sizes)),
        "weight": (paper.forward_weight_composition(*sizes, rank), None),
        "output": (
            paper.forward_output_composition(*sizes, rank),
            paper.backward_output_composition(*sizes, rank),
        ),
        "reduced": (paper.forward_reduced(*sizes, rank, BETA), paper.backward_reduced(*sizes, BETA)),
    }
    return found.get(form, (None, None))


def rows_of(channels: int, filters: int, kernel: int, side: int) -> list[list[str]]:
    """One row for each mode; refuses a closed form that is not the count."""
    shape = ConvShape(channels, filters, (kernel, kernel))
    rank, rows = min(filters, shape.fan_in) // 2, []
    for symbol, form in MODES.items():
        ranks = (rank, round(BETA * filters)) if form == "reduced" else (rank,)
        said = printed((channels, filters, kernel, side, side), form, rank)
        known, count = true(shape, side, form, ranks), measured(shape, side, form, ranks)
        if known != count:
            raise SystemExit(f"{form} of {shape}: the closed forms {known} are not the counts {count}")
        cells = [_millions(v) for pair in zip(said, known, count, strict=True) for v in pair]
        rows.append([symbol, form, *cells])
    return rows


def _millions(macs: float | None) -> str:
    return "-" if macs is None else f"{macs / 1e6:,.3f}"


def thresholds_of(channels: int, filters: int, kernel: int, side: int) -> list[str]:
    """The largest R, as printed and in truth."""
    shape, size = ConvShape(channels, filters, (kernel, kernel)), (side, side)
    sums = round(BETA * filters)
    even = {
        form: break_even_rank(form, shape, size, size, sums if form == "reduced" else 0)
        for form in ("output", "reduced", "gauge")
    }
    fan_in = shape.fan_in
    alpha = 1 - 1 / fan_in - BETA * (1 + 1 / fan_in)
    values = (
        paper.parameter_threshold(channels, filters, kernel),
        paper.forward_threshold(channels, filters, kernel),
        paper.output_composition_threshold(channels, filters, kernel),
        even["output"],
        alpha * filters,
        even["reduced"],
        even["gauge"],
    )
    return [f"{value:.1f}" if value is not None else "-" for value in values]


COSTS = (
    "",
    "mode",
    *(f"{way} {what}" for way in ("forward", "backward") for what in ("printed", "true", "counted")),
)
THRESHOLDS = (
    *("layer", "output, parameters: printed", "forward: printed", "training: printed", "all three: true"),
    *("reduced, training: printed", "reduced: true", "gauge: true"),
)


def text() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name, sizes in LAYERS.items():
        rank = min(sizes[1], sizes[0] * sizes[2] ** 2) // 2
        table = aligned(rows_of(*sizes), COSTS, left=("", "mode"), tablefmt="github")
        parts += [f"### {name}, R = {rank}", table]
    rows = [[name, *thresholds_of(*sizes)] for name, sizes in LAYERS.items()]
    parts += [_THRESHOLDS, aligned(rows, THRESHOLDS, left=("layer",), tablefmt="github"), _ERRORS]
    parts += [f"{i}. {what} Shown by {_links(tests)}." for i, (what, tests) in enumerate(ERRORS.items(), 1)]
    return "\n\n".join(parts) + "\n"


def _links(tests: tuple[str, ...]) -> str:
    return ", ".join(
        f"[`{name.partition('::')[2]}`](../../tests/{name.partition('::')[0]})" for name in tests
    )


_HEAD = """# The founding paper's costs, the true ones, and what PyTorch does

Written by [`costs.py`](costs.py). Millions of MACs (FLOPs = 2 x MACs; additions alone are not counted) of one
image, stride 1, one group, no bias, the gradient of the input included. *Printed* is arXiv 2408.06024 word
for word ([`paper.py`](../../fxbasis/paper.py)), *true* is the closed form of the library, *counted* is what
ran: where the last two differ, this page is not written. R is half of the largest useful rank, beta is 0.25.

With C filters of fan-in q (c input channels and Q taps, so that q = c Q) and S positions:

| | mode | printed forward | printed backward | true forward |
|---|---|---|---|---|
| N | dense | S C q | S C q | S C q |
| N' | weight composition | S C q + C R q | - | S C q + C R q |
| N'' | output composition | S R (q + C) | S C R q | S R (q + C) |
| N''' | reduced | S (R q + C + beta C) | S (1 + beta) C q | S (R q + C + beta C) |
| | gauge (not in the paper) | - | - | S R (q + C - R) |

The true backward is twice the true forward in every mode. The printed N''' counts a copy as one operation;
here a copy has a coefficient and is one MAC. With bare copies, or where a BatchNorm absorbs the coefficients,
the true count is S (R q + 2 beta C).

## Work"""

_THRESHOLDS = """## Thresholds

Below these R a form has fewer MACs (or parameters) than the dense layer. In truth one number holds for the
parameters, the forward pass and training. In the columns of the reduced form beta is 0.25; the gauge form
gains below the rank of the weight."""

_ERRORS = """## Where the paper is wrong"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".md")))
    Path(parser.parse_args().out).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
