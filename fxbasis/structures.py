"""The forms as data: which convolutions stand for one, and what they cost.

A form puts a chain of convolutions in place of one Conv2d. Each of them is a ``Step``; from the steps follow
the modules, the nodes of a graph, the fold, the parameters and the MACs. With ``C`` = out_channels, ``c`` =
in_channels, ``g`` = groups, ``K`` the kernel, ``R`` the rank over all groups (every step but a depthwise one
keeps the groups):

    output   basis c -> R, K_h x K_w         composition R -> C, 1x1           arXiv 2408.06024, 1906.04509
    gauge    basis c -> R, K_h x K_w         R outputs are copies of it, composition 1x1 makes the other C - R
    weight   one convolution, whose weight is composition x basis             arXiv 2408.06024
    reduced  basis c -> R, K_h x K_w         each output a scaled copy of one   arXiv 2408.06024
                                             of R, or a sum of two of them
    input    basis c -> R, 1x1               composition R -> C, K_h x K_w
    spatial  basis c -> R, K_h x 1           composition R -> C, 1 x K_w       Jaderberg et al. 2014
    tucker2  basis c -> R1, 1x1              core R1 -> R2, K_h x K_w          composition R2 -> C, 1x1
                                                                               Kim et al. 2016
    cp       basis c -> R, 1x1               depthwise R, K_h x K_w            composition R -> C, 1x1
    cp4      basis c -> R, 1x1               vertical R, K_h x 1, horizontal R, 1 x K_w, both depthwise,
                                             composition R -> C, 1x1           Lebedev et al. 2015
    tt       basis c -> R1, 1x1              vertical R1 -> R2, K_h x 1, horizontal R2 -> R3, 1 x K_w,
                                             composition R3 -> C, 1x1          tensor train (Oseledets 2011)

The ranks of the reduced form are R and the number of its sums. A scaled copy costs one MAC and a sum two, so
its composition has C + sums weights. (Copies would cost none where a BatchNorm absorbed their scales; nothing
here is absorbed, so all are counted.)

Stride, padding and dilation of an axis go with the step that has the kernel of that axis, so the steps before
it work on the input's positions and it and the later ones on the output's. The bias is the last step's.
Counting convention: see ``costs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

from .costs import ConvShape, dense_macs, dense_params
from .steps import STEPS, Ranks, Step, weight_groups

__all__ = [
    "FORMS",
    "Form",
    "Ranks",
    "Step",
    "break_even_rank",
    "form_macs",
    "form_params",
    "saved_activations",
    "settled",
    "training_macs",
    "weight_groups",
]

Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        steps: the chain for a shape and ranks.
        largest: the ranks of one group of (C/g) x (c/g) filters K_h x K_w at which it is exact; the reduced
            form is exact with as many atoms as filters, and any number of sums.
        methods: how its numbers can be found, the default first.
        whole_first: its first step convolves the input with the whole kernel, so that a class which prepares
            the input for that can be its class.
        saves: what falls with the rank, ``"macs"`` or, of the form that saves none, ``"params"``.
    """

    steps: Callable[[ConvShape, Ranks], tuple[Step, ...]]
    largest: Callable[[int, int, int, int], Ranks]
    methods: tuple[str, ...]
    whole_first: bool = False
    saves: str = "macs"

    def largest_ranks(self, shape: ConvShape, method: str = "") -> Ranks:
        """The ranks over all groups at which the form is exact; more adds nothing.

        A random basis spans all filters only with as many as they have weights.

        >>> FORMS["tucker2"].largest_ranks(ConvShape(16, 32, (3, 3)))
        (16, 32)
        """
        groups = weight_groups(shape) if self is FORMS["weight"] else shape.groups
        if method == "random":
            return (groups * shape.fan_in,)
        filters, channels = shape.out_channels // groups, shape.fan_in // prod(shape.kernel_size)
        return tuple(groups * rank for rank in self.largest(filters, channels, *shape.kernel_size))


def settled(form: str, shape: ConvShape, ranks: Ranks) -> Ranks:
    """The ranks without what can carry nothing: each is at most its neighbour's times the taps between.

    >>> settled("tucker2", ConvShape(16, 32, (3, 3)), (16, 1))
    (9, 1)
    """
    if len(ranks) == 1:
        return ranks
    if form == "reduced":  # a sum takes two atoms
        return ranks if ranks[0] > shape.groups else (ranks[0], 0)
    steps = FORMS[form].steps(shape, ranks)
    taps, found = [prod(step.kernel_size) for step in steps], list(ranks)
    for index in range(1, len(ranks)):
        found[index] = min(found[index], found[index - 1] * taps[index])
    for index in reversed(range(1, len(ranks))):
        found[index - 1] = min(found[index - 1], found[index] * taps[index])
    return tuple(found)


_MATRIX = ("svd", "eigen", "qr", "qr-unpivoted")


def _filters(o: int, i: int, h: int, w: int) -> Ranks:
    return (min(o, i * h * w),)


FORMS: dict[str, Form] = {
    "output": Form(STEPS["output"], _filters, (*_MATRIX, "random"), whole_first=True),
    "gauge": Form(STEPS["gauge"], _filters, _MATRIX, whole_first=True),
    "weight": Form(STEPS["weight"], _filters, (*_MATRIX, "random"), saves="params"),
    "reduced": Form(STEPS["reduced"], lambda o, i, h, w: (o, o), ("atoms", "subset"), whole_first=True),
    "input": Form(STEPS["input"], lambda o, i, h, w: (min(i, o * h * w),), _MATRIX),
    "spatial": Form(STEPS["spatial"], lambda o, i, h, w: (min(i * h, o * w),), _MATRIX),
    "tucker2": Form(
        STEPS["tucker2"], lambda o, i, h, w: (min(i, o * h * w), min(o, i * h * w)), ("als", "svd")
    ),
    "cp": Form(STEPS["cp"], lambda o, i, h, w: (min(h * w * min(i, o), i * o),), ("als",)),
    "cp4": Form(STEPS["cp4"], lambda o, i, h, w: (min(h * w * min(i, o), i * o * min(h, w)),), ("als",)),
    "tt": Form(
        STEPS["tt"],
        lambda o, i, h, w: (min(i, h * w * o), min(i * h, w * o), min(i * h * w, o)),
        ("als", "svd"),
    ),
}
"""Every form by name."""


def form_params(form: str, shape: ConvShape, ranks: Ranks) -> int:
    """Weights of all steps, and the bias.

    >>> form_params("output", ConvShape(64, 64, (3, 3)), (32,))
    20480
    """
    weights = sum(step.weights for step in FORMS[form].steps(shape, ranks))
    return weights + shape.out_channels * shape.bias


def form_macs(
    form: str, shape: ConvShape, ranks: Ranks, output_size: Size, input_size: Size, batch: int = 1
) -> int:
    """MACs of all steps; of the weight form those of the dense convolution and of one product of factors.

    >>> form_macs("output", ConvShape(64, 64, (3, 3)), (32,), (56, 56), (56, 56))
    64225280
    >>> form_macs("input", ConvShape(64, 64, (3, 3)), (32,), (28, 28), (56, 56))  # stride 2
    20873216
    """
    return sum(_macs_of_steps(form, shape, ranks, output_size, input_size, batch))


def break_even_rank(
    form: str, shape: ConvShape, output_size: Size, input_size: Size, sums: int = 0
) -> float | None:
    """R*: the form is cheaper than dense below this rank; None where it has several.

    In MACs; the weight form, which has more at any rank, in parameters. The gauge form is cheaper at every
    useful rank. Of the reduced form, which has this many ``sums``, it is that of the atoms.

    >>> break_even_rank("spatial", ConvShape(64, 64, (3, 3)), (56, 56), (56, 56))
    96.0
    """
    largest = FORMS[form].largest_ranks(shape)
    if form == "reduced":
        return max(0.0, shape.out_channels - (shape.out_channels + sums) / shape.fan_in)
    if form == "gauge" or len(largest) > 1:
        return None if len(largest) > 1 else float(largest[0])
    least = (FORMS[form].steps(shape, largest)[-1].groups,)
    if FORMS[form].saves == "params":
        plain = replace(shape, bias=False)
        return least[0] * dense_params(plain) / form_params(form, plain, least)
    macs = form_macs(form, shape, least, output_size, input_size)
    return least[0] * dense_macs(shape, output_size) / macs


def _macs_of_steps(
    form: str, shape: ConvShape, ranks: Ranks, output_size: Size, input_size: Size, batch: int
) -> list[int]:
    steps = FORMS[form].steps(shape, ranks)
    if form == "weight":
        product = shape.out_channels * (ranks[0] // steps[1].groups) * shape.fan_in
        return [dense_macs(shape, output_size, batch), product]
    return [
        batch * prod(after) * step.weights for step, _, after in _with_sizes(steps, output_size, input_size)
    ]


def _with_sizes(
    steps: Sequence[Step], output_size: Size, input_size: Size
) -> Iterator[tuple[Step, Size, Size]]:
    """Each step with (H, W) of its input and of its output."""
    before = input_size
    for step in steps:
        height, width = (
            output if moved else size
            for output, size, moved in zip(output_size, before, step.axes, strict=True)
        )
        yield step, before, (height, width)
        before = height, width


def training_macs(
    form: str,
    shape: ConvShape,
    ranks: Ranks,
    output_size: Size,
    input_size: Size,
    batch: int = 1,
    *,
    input_gradient: bool = True,
    trained: Sequence[bool] = (),
) -> int:
    """MACs of a forward and a backward pass, as autograd does them.

    Every step costs its forward MACs once more for the gradient of its input, where that or an earlier step
    needs one, and once more for that of its weight, where that is ``trained``; empty: all are. A basis that
    is fixed (BasisConv) is ``(False, True)``.

    >>> shape, size = ConvShape(64, 64, (3, 3)), (56, 56)
    >>> training_macs("output", shape, (32,), size, size) == 3 * form_macs("output", shape, (32,), size, size)
    True
    """
    macs = _macs_of_steps(form, shape, ranks, output_size, input_size, batch)
    learns = list(trained) or [True] * len(macs)
    if form == "weight":  # dense, and the product of its two factors
        return macs[0] * (1 + input_gradient + any(learns)) + macs[1] * (1 + sum(learns))
    total, gradient = 0, input_gradient
    for work, learning in zip(macs, learns, strict=True):
        total += work * (1 + gradient + learning)
        gradient = gradient or learning
    return total


def saved_activations(
    form: str, shape: ConvShape, ranks: Ranks, output_size: Size, input_size: Size, batch: int = 1
) -> int:
    """Numbers that autograd keeps of a forward pass for the backward pass, weights and indices not counted.

    A convolution keeps its input (PyTorch does so for a fixed weight too), which is all that dense keeps; a
    form keeps the input of each step. The weight form keeps the layer's input and the weight that it
    composes; the reduced form, instead of its atoms, what each output scales, and the second terms.

    >>> shape, size = ConvShape(64, 64, (3, 3)), (56, 56)
    >>> saved_activations("output", shape, (32,), size, size) / (64 * 56 * 56)
    1.5
    """
    first = batch * shape.in_channels * prod(input_size)
    if form == "weight":
        return first + shape.out_channels * shape.fan_in
    if form == "reduced":
        return first + batch * (shape.out_channels + ranks[1]) * prod(output_size)
    channels, kept = shape.in_channels, 0
    for step, before, _ in _with_sizes(FORMS[form].steps(shape, ranks), output_size, input_size):
        kept += batch * channels * prod(before)
        channels = step.out_channels
    return kept
