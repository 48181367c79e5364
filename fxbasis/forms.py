"""The module that stands where a Conv2d stood: basis convolution, then composition.

Output form (arXiv 2408.06024, arXiv 1906.04509): ``rank`` convolutions with the kernel, stride,
padding, padding mode, dilation and groups of the original, without bias, then a 1x1 convolution with the
same groups and the original's bias. Folding multiplies the two weights, group by group, in float64: the
same function exactly, for every option, since padding acts on the input alone.

The factors are plain ``nn.Conv2d``, but for the basis of a class that prepares its input (see ``kernels``),
which has that class, to do the same. What was done stands on the composition (``fxbasis_layer``), so
that it survives deepcopy, pickle and rebuilding of a GraphModule, which keep leaf modules only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bases import Factors
from .errors import VerificationError
from .kernels import bare_conv, conv_like, kernel_of, weight_hooks
from .recipe import LayerPlan

__all__ = ["LAYER", "BasisConv2d", "as_form", "layer_plan"]

LAYER = "fxbasis_layer"

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own."""
    return any(getattr(module, name, None) for name in _HOOKS)


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Register the forward and backward hooks of ``source`` on ``target`` too, without weight hooks."""
    made = weight_hooks(source)
    for name in _HOOKS:
        hooks = getattr(source, name).items()
        getattr(target, name).update({key: hook for key, hook in hooks if key not in made})
    target._is_full_backward_hook = source._is_full_backward_hook


def carry_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the attributes that somebody set on ``source`` and its class does not answer."""
    for key, value in vars(source).items():
        if key != LAYER and key not in vars(target) and not hasattr(type(target), key):
            vars(target)[key] = value


class BasisConv2d(nn.Module):
    """Basis convolution and composition in place of one Conv2d; input and output shapes are its own.

    Attributes:
        basis: Conv2d with weight (rank, in_channels / groups, K_h, K_w), no bias.
        composition: 1x1 Conv2d with weight (out_channels, rank / groups, 1, 1) and the original's bias.

    It answers the attributes of Conv2d, ``weight`` reconstructed, for code that reads them.

    >>> from fxbasis.bases import decompose
    >>> conv = nn.Conv2d(3, 8, 3, padding=1)
    >>> plan = LayerPlan(number=1, name="conv", in_channels=3, out_channels=8, kernel_size=(3, 3),
    ...                  form="output", method="svd", rank=4)
    >>> form = BasisConv2d.from_conv2d(conv, plan, decompose(conv.weight).factors(4))
    >>> form(torch.zeros(1, 3, 5, 5)).shape, form.to_conv2d().weight.shape
    (torch.Size([1, 8, 5, 5]), torch.Size([8, 3, 3, 3]))
    """

    transposed = False
    output_padding = (0, 0)

    def __init__(self, basis: nn.Conv2d, composition: nn.Conv2d) -> None:
        super().__init__()
        self.basis = basis
        self.composition = composition
        self.training = composition.training

    def forward(self, input: Tensor) -> Tensor:
        """The composition of the basis convolution's output."""
        output: Tensor = self.composition(self.basis(input))
        return output

    @classmethod
    def empty_like(cls, conv: nn.Conv2d, plan: LayerPlan) -> BasisConv2d:
        """The structure for ``plan`` with uninitialised factors; dtype, device, mode, hooks of ``conv``."""
        kernel = kernel_of(conv).conv
        basis = conv_like(kernel, plan.rank, bias=False)
        vars(basis).pop(LAYER, None)
        composition = _composition(kernel, plan.rank)
        setattr(composition, LAYER, plan)
        form = cls(basis, composition).train(conv.training)
        carry_hooks(conv, form)
        carry_attributes(conv, form)
        form._take_options(conv, _layout(kernel.weight))
        return form

    def _take_options(self, conv: nn.Conv2d, layout: torch.memory_format) -> None:
        trained = {kind: _trained(conv, kind) for kind in ("weight", "bias")}
        for factor in (self.basis, self.composition):
            factor.weight.data = factor.weight.data.to(memory_format=layout)
            factor.weight.requires_grad_(trained["weight"])
        if self.composition.bias is not None:
            self.composition.bias.requires_grad_(trained["bias"])

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, plan: LayerPlan, factors: Factors) -> BasisConv2d:
        """The form of ``conv`` with the given factors, rounded once to the layer's dtype."""
        form, bias = cls.empty_like(conv, plan), kernel_of(conv).conv.bias
        with torch.no_grad():
            form.basis.weight.copy_(factors.basis.reshape(form.basis.weight.shape))
            form.composition.weight.copy_(factors.composition.reshape(form.composition.weight.shape))
            if bias is not None and form.composition.bias is not None:
                form.composition.bias.copy_(bias)
        return form

    def to_conv2d(self) -> nn.Conv2d:
        """One Conv2d, of the class of the basis, with the same function, checked on a random patch.

        Hooks and modes are carried over.

        Raises:
            VerificationError: when the two differ by more than rounding of the layer's dtype.
        """
        conv = conv_like(self.basis, self.out_channels, bias=self.bias is not None)
        with torch.no_grad():
            conv.weight.data = self.weight.to(memory_format=_layout(self.basis.weight))
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
                conv.bias.requires_grad_(self.bias.requires_grad)
        conv.weight.requires_grad_(self.basis.weight.requires_grad or self.composition.weight.requires_grad)
        carry_hooks(self, conv)
        carry_attributes(self, conv)
        _check_fold(self, conv)
        return conv.train(self.composition.training)

    @property
    def plan(self) -> LayerPlan:
        """What was done to this layer."""
        plan: LayerPlan = getattr(self.composition, LAYER)
        return plan

    @property
    def weight(self) -> Tensor:
        """The folded weight (out_channels, in_channels / groups, K_h, K_w), multiplied in float64."""
        groups, rank = self.groups, self.basis.out_channels // self.groups
        basis = self.basis.weight.double().reshape(groups, rank, -1)
        composition = self.composition.weight.double().reshape(groups, -1, rank)
        shape = (self.out_channels, *self.basis.weight.shape[1:])
        return (composition @ basis).reshape(shape).to(self.basis.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The original's bias (out_channels,), or None."""
        return self.composition.bias

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.basis.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.composition.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """(K_h, K_w) of the basis."""
        return self.basis.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride of the basis."""
        return self.basis.stride

    @property
    def padding(self) -> str | tuple[int, ...]:
        """Padding of the basis."""
        return self.basis.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation of the basis."""
        return self.basis.dilation

    @property
    def groups(self) -> int:
        """Groups of basis and composition."""
        return self.basis.groups

    @property
    def padding_mode(self) -> Any:
        """Padding mode of the basis."""
        return self.basis.padding_mode


def as_form(module: nn.Module) -> BasisConv2d | None:
    """The form that the module is, or that its two children are, when its class was lost in a copy."""
    if isinstance(module, BasisConv2d):
        return module
    basis, composition = getattr(module, "basis", None), getattr(module, "composition", None)
    plan: LayerPlan | None = getattr(composition, LAYER, None)
    if plan is None or not plan.compressed:
        return None
    if isinstance(basis, nn.Conv2d) and isinstance(composition, nn.Conv2d):
        return BasisConv2d(basis, composition)
    return None


def layer_plan(module: nn.Module) -> LayerPlan | None:
    """What a compression decided for this convolution or form; None if there was none."""
    form = as_form(module)
    plan: LayerPlan | None = form.plan if form is not None else getattr(module, LAYER, None)
    return plan


def _composition(kernel: nn.Conv2d, rank: int) -> nn.Conv2d:
    """The 1x1 convolution from ``rank`` channels to those of the kernel, with its groups, uninitialised."""
    options = {"groups": kernel.groups, "bias": kernel.bias is not None}
    return bare_conv(rank, kernel.out_channels, 1, kernel.weight, **options)


def _trained(conv: nn.Conv2d, kind: str) -> bool:
    """Whether any parameter that makes its weight, or its bias, has gradients."""
    return any(part.requires_grad for name, part in conv.named_parameters() if kind in name)


def _layout(weight: Tensor) -> torch.memory_format:
    """By the strides: a 1x1 or one-channel weight is contiguous in both formats."""
    plain = weight.stride() == torch.empty(weight.shape, device="meta").stride()
    last = weight.is_contiguous(memory_format=torch.channels_last) and not plain
    return torch.channels_last if last else torch.contiguous_format


@torch.no_grad()
def _check_fold(form: BasisConv2d, conv: nn.Conv2d) -> None:
    """Compare form and fold in float64 on one patch.

    What is left is the rounding of the folded weight to its dtype, and that of sums over the fan-in.
    """
    extent = [
        d * (k - 1) + 1 + s for k, s, d in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    patch = torch.randn(1, conv.in_channels, *extent, generator=generator, dtype=torch.float64)
    basis, composition, weight = (
        module.weight.to("cpu", torch.float64) for module in (form.basis, form.composition, conv)
    )
    options = (None, conv.stride, 0, conv.dilation, conv.groups)
    expected = nn.functional.conv2d(
        nn.functional.conv2d(patch, basis, *options), composition, groups=conv.groups
    )
    gap = (nn.functional.conv2d(patch, weight, *options) - expected).abs().max()
    scale = expected.abs().max() + weight.abs().max()
    sums = weight[0].numel() * torch.finfo(torch.float64).eps
    allowed = 8 * torch.finfo(conv.weight.dtype).eps + sums
    if not float(gap) <= allowed * float(scale):
        raise VerificationError(
            f"{form.plan}: the folded convolution differs by {float(gap / scale):.2e} "
            f"(tolerance {allowed:.0e}); its factors are not finite or far out of scale: "
            "train it with a smaller learning rate or load it again"
        )
