"""The modules of a form's steps, in place of one convolution, and the weight that they make together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .compositions import GaugeComposition, ReducedComposition
from .errors import LayerError
from .kernels import bare_conv, conv_like
from .recipe import LayerPlan
from .structures import FORMS, Step

__all__ = ["chained", "factors_like", "folded", "product", "step_weight"]


def factors_like(kernel: nn.Conv2d, plan: LayerPlan) -> dict[str, nn.Module]:
    """The uninitialised modules of a plan's steps by name; options, dtype and device of ``kernel``.

    Raises:
        LayerError: when its class prepares the input, and the form takes its kernel apart.
    """
    steps = plan.steps
    if type(kernel) is not nn.Conv2d and not FORMS[plan.form].whole_first:
        raise LayerError(
            f"{plan}: its class {type(kernel).__name__} prepares the input for the whole kernel, which the "
            f"{plan.form} form does not convolve it with; use form='output' or 'gauge'"
        )
    modules = {step.name: _module(kernel, step, last=step is steps[-1]) for step in steps[1:]}
    first = _weight_basis(kernel, plan) if plan.form == "weight" else _first(kernel, steps[0])
    return {steps[0].name: first} | modules


def _first(kernel: nn.Conv2d, step: Step) -> nn.Module:
    if step.axes != (True, True):
        return _module(kernel, step, last=False)
    return conv_like(kernel, step.out_channels, bias=False)


def _weight_basis(kernel: nn.Conv2d, plan: LayerPlan) -> nn.Module:
    """A convolution with the options of ``kernel`` that holds the basis; it is not called."""
    basis = conv_like(kernel, kernel.out_channels, bias=False)
    basis.weight = nn.Parameter(basis.weight.new_empty(plan.ranks[0], *basis.weight.shape[1:]))
    return basis


def _module(kernel: nn.Conv2d, step: Step, *, last: bool) -> nn.Module:
    bias = last and kernel.bias is not None
    if step.copies:
        return GaugeComposition(step, kernel.weight, bias=bias)
    if step.sums is not None:
        return ReducedComposition(step, kernel.weight, bias=bias)
    options = _options(kernel, step) if any(step.axes) else {}
    channels = (step.in_channels, step.out_channels, step.kernel_size)
    return bare_conv(*channels, kernel.weight, bias=bias, groups=step.groups, **options)


def _options(kernel: nn.Conv2d, step: Step) -> dict[str, Any]:
    """Stride, padding and dilation on the axes of the step; the padding mode."""

    def on_axes(values: Sequence[int], otherwise: int) -> tuple[int, ...]:
        pairs = zip(values, step.axes, strict=True)
        return tuple(value if mine else otherwise for value, mine in pairs)

    padding = kernel.padding if isinstance(kernel.padding, str) else on_axes(kernel.padding, 0)
    return {
        "stride": on_axes(kernel.stride, 1),
        "padding": padding,
        "dilation": on_axes(kernel.dilation, 1),
        "padding_mode": kernel.padding_mode,
    }


def step_weight(module: nn.Module) -> Tensor:
    """The weight of the convolution with the same function as a step."""
    if isinstance(module, (GaugeComposition, ReducedComposition)):
        return module.dense_weight()
    return cast(Tensor, module.weight)


def product(plan: LayerPlan, factors: Mapping[str, nn.Module]) -> Tensor:
    """The folded weight (out_channels, in_channels / groups, K_h, K_w) in float64."""
    weights = {f"{name}.weight": step_weight(module).double() for name, module in factors.items()}
    return folded(plan, weights)


def folded(plan: LayerPlan, weights: Mapping[str, Tensor]) -> Tensor:
    """The weight that the steps' weights, by name, make together; linear in each of them.

    Along each axis at most one step has a kernel, so the kernels of two steps multiply entry by entry.
    """
    groups, made = plan.steps[0].groups, None
    for step in plan.steps:
        weight = weights[f"{step.name}.weight"]
        block = weight.reshape(groups, -1, step.in_channels // step.groups, *step.kernel_size)
        if made is None:
            made = block
        elif step.groups > groups:  # depthwise
            made = torch.einsum("grab,gricd->griacbd", block[:, :, 0], made).flatten(5, 6).flatten(3, 4)
        else:
            made = torch.einsum("gorab,gricd->goiacbd", block, made).flatten(5, 6).flatten(3, 4)
    assert made is not None
    return made.reshape(-1, plan.in_channels // plan.groups, *plan.kernel_size)


def chained(plan: LayerPlan, factors: Mapping[str, nn.Module], patch: Tensor) -> Tensor:
    """What the steps make of a patch, without padding and bias, in float64."""
    for step in plan.steps:
        module = factors[step.name]
        weight = step_weight(module).to("cpu", torch.float64)
        options = (getattr(module, "stride", 1), 0, getattr(module, "dilation", 1))
        patch = nn.functional.conv2d(patch, weight, None, *options, step.groups)
    return patch
