"""Compositions that are no convolution: copies, scaled copies and sums of the basis convolution's outputs.

Both bring their outputs into order with a gather of channels, which keeps the memory format.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .errors import SelectionError
from .steps import Step

__all__ = ["LOWERINGS", "GaugeComposition", "ReducedComposition"]

LOWERINGS = ("gather", "conv")
"""The ways to compute a reduced composition."""


@fx.wrap
def _channels(input: Tensor, index: Tensor) -> Tensor:
    """The channels of (..., C, H, W) by their numbers, in the memory format that they come in."""
    if input.is_contiguous() or input.ndim != 4:
        return input.index_select(-3, index)
    return input.movedim(1, 3).index_select(3, index).movedim(3, 1)


class GaugeComposition(nn.Module):
    """The composition of the gauge form: its inputs, and 1x1 combinations of them, in another order.

    Attributes:
        weight: (out_channels - in_channels, in_channels / groups, 1, 1), of the outputs that are no copies.
        bias: (out_channels,), or None.
        order: (out_channels,), for each output its position among the copies and then the combinations.
        made: how many outputs are combinations.
    """

    def __init__(self, step: Step, like: Tensor, *, bias: bool) -> None:
        super().__init__()
        self.made, self.groups = step.out_channels - step.copies, step.groups
        self.weight = nn.Parameter(like.new_empty(self.made, step.in_channels // step.groups, 1, 1))
        self.bias = nn.Parameter(like.new_empty(step.out_channels)) if bias else None
        self.order: Tensor
        self.register_buffer("order", torch.arange(step.out_channels, device=like.device))

    def forward(self, input: Tensor) -> Tensor:
        """Copies and combinations of the basis convolution's output (..., in_channels, H, W)."""
        output = input  # also in memory, of which one channel says little
        if self.made:
            made = nn.functional.conv2d(input, self.weight, groups=self.groups)
            output = torch.cat([input, made], -3)
        if len(self.order) > 1:
            output = _channels(output, self.order)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]

    def dense_weight(self) -> Tensor:
        """The weight of the 1x1 convolution with the same function: (out_channels, in_channels / g, 1, 1)."""
        rank = self.weight.shape[1]
        copies = torch.eye(rank, dtype=self.weight.dtype, device=self.weight.device).repeat(self.groups, 1)
        return torch.cat([copies[:, :, None, None], self.weight]).index_select(0, self.order)

    def extra_repr(self) -> str:
        """Channels and groups."""
        rank, filters = self.weight.shape[1] * self.groups, len(self.order)
        return f"{rank}, {filters}, copies={filters - self.made}, groups={self.groups}"


class ReducedComposition(nn.Module):
    """The composition of the reduced form: each output a scaled copy of one input, or a sum of two of them.

    Made are the copies and then the sums, both in the order of the outputs. A copy is one multiply-add at
    each position and a sum two, out_channels + sums in all. (The paper counts copies as free of coefficients,
    2 beta out_channels in all, which holds where BatchNorm absorbs their scales; here they are kept.)

    With ``lowering = "conv"`` it is computed as the 1x1 convolution by ``dense_weight``, and then counted by
    ``profile`` as that: as many multiply-adds as the output form has, in one kernel without gathers, whose
    gradients are deterministic on CUDA too. ``export_onnx`` chooses on its own copy, by measuring.

    Attributes:
        weight: (out_channels + sums,), coefficients: of the inputs ``first``, then of those in ``second``.
        bias: (out_channels,), or None.
        first: (out_channels,), the first input of each copy and then of each sum.
        second: (sums,), the second input of each sum, in the same group.
        order: (out_channels,), for each output its position among the copies and then the sums.
        lowering: one of ``LOWERINGS``; not part of the state.

    >>> step = Step("composition", 2, 3, sums=1)
    >>> module = ReducedComposition(step, torch.zeros(1), bias=False)
    >>> state = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0]), "first": torch.tensor([0, 1, 0])}
    >>> state |= {"second": torch.tensor([1]), "order": torch.tensor([0, 2, 1])}
    >>> _ = module.load_state_dict(state)
    >>> module.dense_weight()[:, :, 0, 0].tolist()
    [[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]
    """

    def __init__(self, step: Step, like: Tensor, *, bias: bool) -> None:
        super().__init__()
        filters, sums = step.out_channels, step.sums or 0
        self.in_channels, self.groups = step.in_channels, step.groups
        self.lowering = "gather"
        self.weight = nn.Parameter(like.new_empty(filters + sums))
        self.bias = nn.Parameter(like.new_empty(filters)) if bias else None
        self.first: Tensor
        self.second: Tensor
        self.order: Tensor
        self.register_buffer("first", torch.zeros(filters, dtype=torch.long, device=like.device))
        self.register_buffer("second", torch.zeros(sums, dtype=torch.long, device=like.device))
        self.register_buffer("order", torch.arange(filters, device=like.device))

    def forward(self, input: Tensor) -> Tensor:
        """Copies and sums of the basis convolution's output (..., in_channels, H, W).

        Raises:
            SelectionError: for a lowering that does not exist.
        """
        if self.lowering not in LOWERINGS:
            raise SelectionError(
                f"lowering={self.lowering!r} is not known; set one of {', '.join(LOWERINGS)}"
            )
        if self.lowering == "conv":
            return nn.functional.conv2d(input, self.dense_weight(), self.bias, groups=self.groups)
        output = self._gathered(input)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]

    def _gathered(self, input: Tensor) -> Tensor:
        filters, sums = len(self.first), len(self.second)
        weight = self.weight.to(input.dtype)  # which autocast made another than its own
        made = _channels(input, self.first) * weight[:filters, None, None]
        if sums:
            others = _channels(input, self.second) * weight[filters:, None, None]
            copies, firsts = torch.split(made, [filters - sums, sums], -3)
            made = torch.cat([copies, firsts + others], -3)
        return _channels(made, self.order)

    def dense_weight(self) -> Tensor:
        """The weight of the 1x1 convolution with the same function: (out_channels, in_channels / g, 1, 1)."""
        rank = self.in_channels // self.groups
        units = torch.eye(rank, dtype=self.weight.dtype, device=self.weight.device).repeat(1, self.groups)
        return self._gathered(units[:, :, None, None]).transpose(0, 1).contiguous()

    @property
    def distinct_outputs(self) -> int:
        """How many outputs differ, the bias aside; the others repeat one of these exactly."""
        rows = self.dense_weight().detach()[:, :, 0, 0].to("cpu", torch.float64) + 0.0  # -0.0 is 0.0
        group = torch.arange(self.groups).repeat_interleave(len(rows) // self.groups)
        dead = (rows == 0).all(dim=1)
        marked = torch.cat([rows, group.to(rows).masked_fill(dead, -1)[:, None]], 1)
        return len(torch.unique(marked, dim=0))

    def extra_repr(self) -> str:
        """Channels, sums and groups."""
        channels = f"{self.in_channels}, {len(self.first)}"
        return f"{channels}, sums={len(self.second)}, groups={self.groups}, lowering={self.lowering}"
