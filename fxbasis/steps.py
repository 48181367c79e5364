"""The steps of each form: the chain of convolutions that stands for one, from its shape and the ranks.

Every step but a depthwise one keeps the groups. Stride, padding and dilation of an axis go with the step that
has the kernel of that axis. The forms themselves are in ``structures``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from .costs import ConvShape

__all__ = ["STEPS", "Ranks", "Step", "weight_groups"]

Ranks: TypeAlias = tuple[int, ...]
Size: TypeAlias = tuple[int, int]

_POINT = (1, 1)


def weight_groups(shape: ConvShape) -> int:
    """The groups of the weight form: of a depthwise convolution all channels share one basis."""
    return shape.groups if shape.groups < shape.out_channels else 1


@dataclass(frozen=True)
class Step:
    """One convolution of a form.

    Attributes:
        name: of the submodule and the node.
        in_channels, out_channels, kernel_size, groups: its shape.
        axes: whether it has the stride, padding and dilation of the vertical and the horizontal axis.
        copies: how many of its outputs are inputs of it as they are.
        sums: where its outputs are scaled inputs or sums of two of them, how many are sums; otherwise None.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: Size = _POINT
    groups: int = 1
    axes: tuple[bool, bool] = (False, False)
    copies: int = 0
    sums: int | None = None

    @property
    def weights(self) -> int:
        """Elements of its weight, which are its MACs at each position too."""
        if self.sums is not None:
            return self.out_channels + self.sums
        made = self.out_channels - self.copies
        return made * (self.in_channels // self.groups) * prod(self.kernel_size)


_BOTH, _HEIGHT, _WIDTH = (True, True), (True, False), (False, True)


def _output(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    basis = Step("basis", shape.in_channels, ranks[0], shape.kernel_size, shape.groups, _BOTH)
    return basis, Step("composition", ranks[0], shape.out_channels, groups=shape.groups)


def _gauge(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    basis = _output(shape, ranks)[0]
    return basis, Step("composition", ranks[0], shape.out_channels, groups=shape.groups, copies=ranks[0])


def _reduced(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    basis = _output(shape, ranks)[0]
    return basis, Step("composition", ranks[0], shape.out_channels, groups=shape.groups, sums=ranks[1])


def _weight(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    groups = weight_groups(shape)
    basis = Step("basis", shape.fan_in * groups, ranks[0], groups=groups, axes=_BOTH)
    return basis, Step("composition", ranks[0], shape.out_channels, groups=groups)


def _input(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    last = Step("composition", ranks[0], shape.out_channels, shape.kernel_size, shape.groups, _BOTH)
    return Step("basis", shape.in_channels, ranks[0], groups=shape.groups), last


def _spatial(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    height, width = shape.kernel_size
    basis = Step("basis", shape.in_channels, ranks[0], (height, 1), shape.groups, _HEIGHT)
    return basis, Step("composition", ranks[0], shape.out_channels, (1, width), shape.groups, _WIDTH)


def _around(shape: ConvShape, ranks: Ranks, *inner: Step) -> tuple[Step, ...]:
    first = Step("basis", shape.in_channels, ranks[0], groups=shape.groups)
    return first, *inner, Step("composition", ranks[-1], shape.out_channels, groups=shape.groups)


def _tucker2(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    return _around(shape, ranks, Step("core", ranks[0], ranks[1], shape.kernel_size, shape.groups, _BOTH))


def _cp(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    rank = ranks[0]
    return _around(shape, ranks, Step("depthwise", rank, rank, shape.kernel_size, rank, _BOTH))


def _cp4(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    rank, (height, width) = ranks[0], shape.kernel_size
    vertical = Step("vertical", rank, rank, (height, 1), rank, _HEIGHT)
    return _around(shape, ranks, vertical, Step("horizontal", rank, rank, (1, width), rank, _WIDTH))


def _tt(shape: ConvShape, ranks: Ranks) -> tuple[Step, ...]:
    height, width = shape.kernel_size
    vertical = Step("vertical", ranks[0], ranks[1], (height, 1), shape.groups, _HEIGHT)
    horizontal = Step("horizontal", ranks[1], ranks[2], (1, width), shape.groups, _WIDTH)
    return _around(shape, ranks, vertical, horizontal)


STEPS: dict[str, Callable[[ConvShape, Ranks], tuple[Step, ...]]] = {
    "output": _output,
    "gauge": _gauge,
    "weight": _weight,
    "reduced": _reduced,
    "input": _input,
    "spatial": _spatial,
    "tucker2": _tucker2,
    "cp": _cp,
    "cp4": _cp4,
    "tt": _tt,
}
"""The steps of every form, by its name, for a shape and ranks over all groups."""
