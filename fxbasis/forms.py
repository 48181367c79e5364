"""The module that stands where a Conv2d stood: the steps of its form, one after the other.

Of the output form (arXiv 2408.06024, arXiv 1906.04509) these are ``rank`` convolutions with the kernel,
stride, padding, padding mode, dilation and groups of the original, without bias, and a 1x1 convolution with
the same groups and the original's bias; the others stand in ``structures``. Folding multiplies the weights,
group by group, in float64: the same function exactly, for every option, since padding an axis with zeros,
or with what the axis holds itself, gives the same before and after a step that has no kernel there.

The factors are plain ``nn.Conv2d``, but for the basis of a class that prepares its input (see ``kernels``),
which has that class, to do the same. What was done stands on the composition (``fxbasis_layer``), so
that it survives deepcopy, pickle and rebuilding of a GraphModule, which keep leaf modules only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .carrying import carry_attributes, carry_hooks
from .compositions import GaugeComposition, ReducedComposition
from .contexts import contexts
from .errors import LayerError, VerificationError
from .factors import chained, factors_like, product
from .kernels import (
    bare_conv,
    conv_like,
    kernel_of,
    own_class,
    run_weight_hooks,
    settled_twin,
    weight_hooks,
)
from .recipe import LAYER, LayerPlan
from .structures import FORMS

__all__ = ["LAYER", "RESERVED", "BasisConv2d", "as_form", "layer_plan"]

RESERVED = frozenset(
    {"plan", "ends", "factors", *("basis", "core", "depthwise", "vertical", "horizontal", "composition")}
)
"""Attributes that a form has for itself."""

CLASS = "fxbasis_class"
"""Where the composition keeps the convolution's own class, if it has one."""


class BasisConv2d(nn.Module):
    """A chain of convolutions in place of one Conv2d; input and output shapes are its own.

    Its submodules are the steps of its form (``structures``), the first always ``basis``, the last
    ``composition``. It answers the attributes of Conv2d, ``weight`` reconstructed, for code that reads them.

    >>> from fxbasis.fitting import fit
    >>> conv = nn.Conv2d(3, 8, 3, padding=1)
    >>> plan = LayerPlan(number=1, name="conv", in_channels=3, out_channels=8, kernel_size=(3, 3),
    ...                  form="output", method="svd", ranks=(4,))
    >>> form = BasisConv2d.from_conv2d(conv, plan, fit(conv.weight, plan))
    >>> form(torch.zeros(1, 3, 5, 5)).shape, form.to_conv2d().weight.shape
    (torch.Size([1, 8, 5, 5]), torch.Size([8, 3, 3, 3]))
    """

    transposed = False
    output_padding = (0, 0)
    basis: nn.Conv2d
    composition: nn.Conv2d | GaugeComposition | ReducedComposition

    def __init__(self, factors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in factors.items():
            self.add_module(name, module)
        self.training = self.composition.training

    def forward(self, input: Tensor) -> Tensor:
        """One step after the other; of the weight form one convolution with the product of its factors."""
        plan = self.plan
        if plan.form == "weight":
            output: Tensor = self.basis._conv_forward(input, self._composed(), self.bias)
            return output
        for name in plan.called:
            input = self.get_submodule(name)(input)
        return input

    def _composed(self) -> Tensor:
        """The weight of the weight form, in its own dtype and with gradients."""
        run_weight_hooks(self.basis)
        run_weight_hooks(self.composition)
        groups, kernel = self.plan.steps[0].groups, (self.in_channels // self.groups, *self.kernel_size)
        basis = self.basis.weight.reshape(groups, -1, prod(kernel))
        composition = self.composition.weight.reshape(groups, -1, self.plan.ranks[0] // groups)
        weight = (composition @ basis).reshape(-1, *kernel)
        return weight.clone(memory_format=_layout(self.basis.weight))  # contiguous() would not touch a 1x1

    @classmethod
    def empty_like(cls, conv: nn.Conv2d, plan: LayerPlan) -> BasisConv2d:
        """The structure for ``plan`` with uninitialised factors; dtype, device, mode, hooks of ``conv``."""
        kernel = kernel_of(conv).conv
        factors = factors_like(kernel, plan)
        for module in factors.values():
            vars(module).pop(LAYER, None)
        setattr(factors["composition"], LAYER, plan)
        if own_class(conv) is not nn.Conv2d and not plan.effective:
            setattr(factors["composition"], CLASS, own_class(conv))
        form = cls(factors).train(conv.training)
        carry_hooks(conv, form)
        carry_attributes(conv, form)
        form._take_options(conv, _layout(kernel.weight))
        return form

    def _take_options(self, conv: nn.Conv2d, layout: torch.memory_format) -> None:
        trained = {kind: _trained(conv, kind) for kind in ("weight", "bias")}
        for name, parameter in self.named_parameters():
            kind = name.rpartition(".")[2]
            if kind == "weight" and parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=layout)
            parameter.requires_grad_(trained[kind])
        if self.plan.fixed_basis:
            self.basis.weight.requires_grad_(False)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, plan: LayerPlan, factors: Mapping[str, Tensor]) -> BasisConv2d:
        """The form of ``conv`` with the given factors by name, rounded once to the layer's dtype."""
        form, bias = cls.empty_like(conv, plan), kernel_of(conv).conv.bias
        state = form.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, factor in factors.items():
                state[name].copy_(factor.reshape(state[name].shape))
            if bias is not None and form.bias is not None:
                form.bias.copy_(bias)
        return form

    def to_conv2d(self) -> nn.Conv2d:
        """One Conv2d, of the class that the layer had, with the same function, checked on a random patch.

        Hooks and modes are carried over. What somebody put on a step to make its weight is taken in.

        Raises:
            LayerError: when a step has hooks, which no Conv2d would run.
            VerificationError: when the two differ by more than rounding of the layer's dtype.
        """
        settled = self._settled()
        if settled is not self:
            return settled.to_conv2d()
        conv = self._dense_like()
        with torch.no_grad():
            conv.weight.data = self.weight
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
                conv.bias.requires_grad_(self.bias.requires_grad)
        weights = [part for name, part in self.named_parameters() if name.endswith("weight")]
        conv.weight.requires_grad_(any(part.requires_grad for part in weights))
        conv.__class__ = getattr(self.composition, CLASS, type(conv))
        carry_hooks(self, conv)
        carry_attributes(self, conv)
        _check_fold(self, conv)
        return conv.train(self.composition.training)

    def _settled(self) -> BasisConv2d:
        """Itself, or a twin where parametrizations or weight hooks make the weights of its steps."""
        for name, step in self.factors.items():
            hooks = len(step._forward_hooks) + len(step._forward_pre_hooks) - len(weight_hooks(step))
            what = "hooks" if hooks else "a bias of its own" if self._has_bias_inside(name) else ""
            if what:
                raise LayerError(
                    f"{self.plan} cannot be folded: its {name} has {what}, which a convolution in place of "
                    "its steps would not have; remove it first"
                )
        if not any(weight_hooks(step) or is_parametrized(step) for step in self.factors.values()):
            return self
        form = BasisConv2d({name: settled_twin(step) for name, step in self.factors.items()})
        for name, parameter in form.named_parameters():
            step = self.get_submodule(name.rpartition(".")[0])
            parameter.requires_grad_(any(part.requires_grad for part in step.parameters()))
        carry_hooks(self, form)
        carry_attributes(self, form)
        return form

    def _has_bias_inside(self, name: str) -> bool:
        return name != "composition" and self.get_submodule(name)._parameters.get("bias") is not None

    def _dense_like(self) -> nn.Conv2d:
        bias = self.bias is not None
        if FORMS[self.plan.form].whole_first or self.plan.form == "weight":
            return conv_like(self.basis, self.out_channels, bias=bias)
        options = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        channels = (self.in_channels, self.out_channels, self.plan.kernel_size)
        return bare_conv(*channels, self.basis.weight, bias=bias, groups=self.groups, **options)

    def __getattr__(self, name: str) -> Any:
        """What the class of the convolution has beyond Conv2d, methods bound to the form."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # which torch.compile follows
            return modules[name]
        composition = modules.get("composition")
        member = inspect.getattr_static(getattr(composition, CLASS, None), name, self)
        if member is self or hasattr(nn.Conv2d, name):
            return super().__getattr__(name)
        return member.__get__(self, type(self)) if hasattr(member, "__get__") else member

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to set what is read off the steps, which are made for one another."""
        if isinstance(inspect.getattr_static(type(self), name, None), property):
            raise AttributeError(
                f"{self.plan}: {name} is read off the steps of its form, and cannot be set to {value!r}; "
                "fold the model, set it, and compress again"
            )
        super().__setattr__(name, value)

    @property
    def plan(self) -> LayerPlan:
        """What was done to this layer."""
        plan: LayerPlan = getattr(self.composition, LAYER)
        return plan

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose calls begin and end a call of the form, also where its steps are called."""
        return (self.basis, self.composition) if self.plan.called else (self, self)

    @property
    def factors(self) -> dict[str, nn.Module]:
        """The modules of its steps by name."""
        return {step.name: self.get_submodule(step.name) for step in self.plan.steps}

    @property
    def weight(self) -> Tensor:
        """The folded weight (out_channels, in_channels / groups, K_h, K_w), multiplied in float64."""
        steps = {name: settled_twin(s) if weight_hooks(s) else s for name, s in self.factors.items()}
        layouts = {_layout(part) for part in self.parameters() if part.ndim == 4}
        last = torch.channels_last in layouts  # which steps of one channel do not tell
        weight = product(self.plan, steps).to(self.basis.weight.dtype)
        return weight.clone(memory_format=torch.channels_last if last else torch.contiguous_format)

    @property
    def bias(self) -> Tensor | None:
        """The original's bias (out_channels,), or None."""
        return self.composition.bias

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.plan.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.plan.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """(K_h, K_w) of the folded convolution."""
        return self.plan.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride of the steps with the kernel of each axis."""
        return tuple(module.stride[axis] for axis, module in enumerate(self._with_kernel()))

    @property
    def padding(self) -> str | tuple[int, ...]:
        """Padding of the steps with the kernel of each axis."""
        modules = self._with_kernel()
        if isinstance(modules[0].padding, str):
            return modules[0].padding
        return tuple(int(module.padding[axis]) for axis, module in enumerate(modules))

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation of the steps with the kernel of each axis."""
        return tuple(module.dilation[axis] for axis, module in enumerate(self._with_kernel()))

    @property
    def groups(self) -> int:
        """Groups of the folded convolution."""
        return self.plan.groups

    @property
    def padding_mode(self) -> Any:
        """Padding mode of the step with the kernel."""
        return self._with_kernel()[0].padding_mode

    def _with_kernel(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The steps that have the vertical and the horizontal kernel."""
        steps = self.plan.steps
        height, width = (next(step.name for step in steps if step.axes[axis]) for axis in (0, 1))
        return cast(nn.Conv2d, self.get_submodule(height)), cast(nn.Conv2d, self.get_submodule(width))


def as_form(module: nn.Module) -> BasisConv2d | None:
    """The form that the module is, or that its children are, when its class was lost in a copy."""
    if isinstance(module, BasisConv2d):
        return module
    plan: LayerPlan | None = getattr(getattr(module, "composition", None), LAYER, None)
    if plan is None or not plan.compressed:
        return None
    factors = {name: part for name, part in module.named_children() if name in {s.name for s in plan.steps}}
    return BasisConv2d(factors) if len(factors) == len(plan.steps) else None


def layer_plan(module: nn.Module) -> LayerPlan | None:
    """What a compression decided for this convolution or form; None if there was none."""
    form = as_form(module)
    plan: LayerPlan | None = form.plan if form is not None else getattr(module, LAYER, None)
    return plan


def _trained(conv: nn.Conv2d, kind: str) -> bool:
    """Whether any parameter that makes its weight, or its bias, has gradients."""
    return any(part.requires_grad for name, part in conv.named_parameters() if kind in name)


@fx.wrap
def _layout(weight: Tensor) -> torch.memory_format:
    """By the strides: a 1x1 or one-channel weight is contiguous in both formats."""
    plain = weight.stride() == torch.empty(weight.shape, device="meta").stride()
    last = weight.is_contiguous(memory_format=torch.channels_last) and not plain
    return torch.channels_last if last else torch.contiguous_format


@contexts(gradients=False, autocast=False)
def _check_fold(form: BasisConv2d, conv: nn.Conv2d) -> None:
    """Compare form and fold in float64 on one patch.

    What is left is the rounding of the folded weight to its dtype, and that of sums over the fan-in.
    """
    extent = [
        d * (k - 1) + 1 + s for k, s, d in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    size = (1, conv.in_channels, *extent)
    patch = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    weight, options = conv.weight.to("cpu", torch.float64), (None, conv.stride, 0, conv.dilation, conv.groups)
    if form.plan.called:
        expected = chained(form.plan, form.factors, patch)
    else:
        expected = nn.functional.conv2d(patch, form._composed().to("cpu", torch.float64), *options)
    gap = (nn.functional.conv2d(patch, weight, *options) - expected).abs().max()
    scale = expected.abs().max() + weight.abs().max()
    sums = weight[0].numel() * torch.finfo(torch.float64).eps
    allowed = 8 * torch.finfo(conv.weight.dtype).eps + sums
    if not float(gap) <= allowed * float(scale):
        error = VerificationError(
            f"{form.plan}: the folded convolution differs by {float(gap / scale):.2e} "
            f"(tolerance {allowed:.0e}); its factors are not finite or far out of scale: "
            "train it with a smaller learning rate or load it again"
        )
        error.layer = form.plan.name
        raise error
