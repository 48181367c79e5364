"""Closed forms of the work and the size of a convolution, dense and rewritten.

Counting convention: a MAC is one multiply-add and is what every function returns; FLOPs = 2 x MACs.
Bias additions are not counted as MACs; a bias counts as ``out_channels`` parameters. ``batch`` is the
number of samples, 1 unless given. Stride, padding and dilation enter through the output size only.

Symbols (method of arXiv 2408.06024, re-derived): ``C`` = out_channels, ``c`` = in_channels, ``g`` =
groups, ``q`` = fan_in = (c / g) * K_h * K_w, ``S`` = H_out * W_out, ``R`` = rank = number of basis
convolutions over all groups, ``R_g`` = R / g.

    dense         MACs = B S C q              parameters = C q            (+ C bias)
    output form   MACs = B S R (q + C/g)      parameters = R (q + C/g)    (+ C bias)

so that both ratios to dense are (R/C) (1 + C/(g q)) and fall below one exactly for R < R* = C cQ/(cQ + C)
with cQ = g q: the paper's parameter threshold and forward threshold are this same number.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ConvShape",
    "dense_macs",
    "dense_params",
    "output_size",
]


@dataclass(frozen=True)
class ConvShape:
    """What the cost of a Conv2d depends on, without its feature-map size.

    >>> downsample = ConvShape(64, 128, (1, 1))
    >>> downsample.largest_rank, round(downsample.break_even_rank, 1)
    (64, 42.7)
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int = 1
    bias: bool = False

    @property
    def fan_in(self) -> int:
        """q: the number of weights of one filter."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def largest_rank(self) -> int:
        """The rank at which a basis is exact: g * min(C/g, q). More basis convolutions add nothing."""
        return self.groups * min(self.out_channels // self.groups, self.fan_in)

    @property
    def break_even_rank(self) -> float:
        """R*: the output form is cheaper than dense, in MACs and in weights, exactly for rank < R*."""
        full = self.groups * self.fan_in
        return self.out_channels * full / (full + self.out_channels)

    @property
    def gains(self) -> bool:
        """Whether any rank, at least one basis convolution for each group, is cheaper than dense."""
        return self.groups < self.break_even_rank


def output_size(
    input_size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """Height and width that a convolution makes of ``input_size``; padding is per side.

    >>> output_size((224, 224), (7, 7), stride=(2, 2), padding=(3, 3))
    (112, 112)
    """
    height, width = (
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(
            input_size, kernel_size, stride, padding, dilation, strict=True
        )
    )
    return height, width


def dense_macs(shape: ConvShape, output_size: tuple[int, int], batch: int = 1) -> int:
    """MACs of the convolution itself.

    >>> dense_macs(ConvShape(3, 64, (7, 7)), (112, 112))
    118013952
    """
    return batch * output_size[0] * output_size[1] * shape.out_channels * shape.fan_in


def dense_params(shape: ConvShape) -> int:
    """Weights and biases of the convolution itself.

    >>> dense_params(ConvShape(64, 64, (3, 3), bias=True))
    36928
    """
    return shape.out_channels * (shape.fan_in + shape.bias)
