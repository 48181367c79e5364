"""Convolutions whose kernel something else makes: a forward of their own class, weight hooks, pruning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close
from timm.layers import (
    Conv2dSame,
    MixedConv2d,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from timm.layers.conv2d_same import Conv2dSameExport
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fxbasis import LayerPlan, Plan, compress, export_onnx, fold, load, number_convs, plan_of, profile, save
from fxbasis.errors import FxBasisWarning, LayerError, PlanError, VerificationError
from fxbasis.forms import BasisConv2d
from fxbasis.kernels import KernelError, kernel_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*it is rewritten because it was asked for"),
]


class Doubled(nn.Conv2d):
    """Computes its kernel in ``_conv_forward``."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class Framed(nn.Conv2d):
    """Pads by itself, then does as nn.Conv2d does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (2, 1, 0, 1), value=0.5))


class Activated(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Twice(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        super().forward(input)
        return super().forward(input)


class Biased(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, torch.zeros(self.out_channels))


class Dynamic(nn.Conv2d):
    """Its kernel depends on its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * input.mean(), self.bias)


class Noisy(nn.Conv2d):
    """Its kernel is another in train()."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * (2 if self.training else 3), self.bias)


class Changing(nn.Conv2d):
    """Computes a kernel in train() only."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * 2 if self.training else self.weight, self.bias)


class Broken(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        raise ValueError("no")


class WithCoordinates(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        column = torch.linspace(-1, 1, x.shape[3]).expand(len(x), 1, *x.shape[2:])
        return super().forward(torch.cat([x, column], 1))


class Called(nn.Conv2d):
    def __call__(self, input: Tensor) -> Tensor:
        return super().__call__(input) + 1


class MaxNorm(nn.Conv2d):
    """Bounds the norm of its filters at every call."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=100.0)
        return super().forward(input)


class Clamped(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-100, 100)
        return super().forward(input)


class ClampedInTrain(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.weight.data.clamp_(-100, 100)
        return super().forward(input)


class DecidesByWeight(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * (2 if self.weight.abs().max() > 10 else 1))


class Inplace(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mul_(2))


class InplaceActivated(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


class WithoutGradients(nn.Conv2d):
    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class InFloat32(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


class Slots(nn.Conv2d):
    __slots__ = ("note",)


class Sneaky(nn.Conv2d):
    """Convolves with the stored weight on small images, as the synthetic inputs are."""

    def forward(self, input: Tensor) -> Tensor:
        scale = 2 if input.shape[-1] > 20 else 1
        return F.conv2d(input if scale == 1 else input * scale, self.weight, self.bias)


def pruned(conv: nn.Conv2d) -> nn.Conv2d:
    prune.l1_unstructured(conv, "weight", amount=0.3)
    prune.random_unstructured(conv, "weight", amount=0.2)
    return prune.l1_unstructured(conv, "bias", amount=0.5)


# name: the convolution, and whether its kernel is another than its stored weight
CONVS: dict[str, tuple[Callable[[], nn.Conv2d], bool]] = {
    "Conv2dSame": (lambda: Conv2dSame(4, 8, 3), False),
    "Conv2dSame strided": (lambda: Conv2dSame(4, 8, 3, stride=2, bias=False), False),
    "Conv2dSame even, groups": (lambda: Conv2dSame(4, 8, (4, 2), stride=(1, 2), groups=2), False),
    "Conv2dSame dilated": (lambda: Conv2dSame(4, 8, 3, dilation=2), False),
    "Framed": (lambda: Framed(4, 8, 3, stride=2, padding=1), False),
    "Framed reflect": (lambda: Framed(4, 8, 3, padding=1, padding_mode="reflect"), False),
    "Conv2dSame weight_norm": (lambda: weight_norm(Conv2dSame(4, 8, 3, stride=2)), False),
    "Conv2dSame parametrized": (lambda: parametrizations.weight_norm(Conv2dSame(4, 8, 3, stride=2)), False),
    "StdConv2d": (lambda: StdConv2d(4, 8, 3, stride=2), True),
    "StdConv2d groups": (lambda: StdConv2d(4, 8, 3, groups=2, bias=True, dilation=2), True),
    "StdConv2dSame static": (lambda: StdConv2dSame(4, 8, 3), True),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(4, 8, 3), True),
    "StdConv2d parametrized": (lambda: parametrizations.weight_norm(StdConv2d(4, 8, 3)), True),
    "Doubled": (lambda: Doubled(4, 8, 3, padding=1), True),
    "Doubled same": (lambda: Doubled(4, 8, 3, padding="same"), True),
    "weight_norm": (lambda: weight_norm(nn.Conv2d(4, 8, 3, padding=1)), False),
    "weight_norm groups": (lambda: weight_norm(nn.Conv2d(4, 8, 3, groups=2), dim=None), False),
    "spectral_norm": (lambda: spectral_norm(nn.Conv2d(4, 8, 3)), False),
    "pruned": (lambda: pruned(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")), False),
}
KEPT = ["Conv2dSame", "Conv2dSame strided", "Conv2dSame even, groups", "Conv2dSame dilated"]
KEPT += ["Framed", "Framed reflect"]
cases = pytest.mark.parametrize("key", CONVS)


def net_of(key: str) -> nn.Module:
    """Three layers, in eval(), after an optimiser's step: what a hook made at its last run is stale."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), CONVS[key][0](), nn.ReLU()).eval()
    net(image())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net


def image(size: tuple[int, int] = (11, 8)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def compressed(key: str, size: Any = 4, net: nn.Module | None = None, x: Tensor | None = None) -> Any:
    model = net_of(key) if net is None else net
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = compress(
            model, image() if x is None else x, layers=2, size=size, effective_weights=CONVS[key][1]
        )
    said = [str(warning.message) for warning in caught if warning.category is FxBasisWarning]
    made = key not in KEPT
    assert any("effective" in text and text.startswith("conv 2 (1)") for text in said) == made
    return small


@cases
def test_kernel_is_what_the_convolution_computes(key: str) -> None:
    conv = net_of(key)[1]
    before = dict(vars(conv))
    kernel = kernel_of(conv)
    assert all(value is vars(conv)[name] for name, value in before.items())
    assert kernel.effective == CONVS[key][1]
    x = torch.randn(2, 4, 9, 12)
    expected = output(conv, x)
    assert torch.equal(output(kernel.conv, x), expected)


@cases
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_full_size_equals_the_original_at_any_image_size(key: str, training: bool) -> None:
    net = net_of(key).train(training)
    full = compressed(key, 8, net)
    for size in ((11, 8), (8, 11), (12, 9)):
        expected = output(net.eval(), image(size))
        assert close(expected, output(full.eval(), image(size)))
        assert close(expected, output(fold(full), image(size)))


@cases
def test_fold_equals_the_form_and_keeps_the_class_that_pads(key: str) -> None:
    net, small = net_of(key), compressed(key)
    folded = fold(small)
    again = fold(folded)
    own = key in KEPT
    assert close(output(small, image()), output(folded, image()))
    assert torch.equal(output(folded, image()), output(again, image()))
    kind = type(kernel_of(net[1]).conv)
    assert type(folded.get_submodule("1")) is type(small.get_submodule("1").basis) is kind
    assert type(small.get_submodule("1").composition) is nn.Conv2d
    keys = [name for name in folded.state_dict() if name.startswith("1.")]
    assert keys == ["1.weight", "1.bias"][: 1 + (net[1].bias is not None)]
    if own:
        assert list(folded.state_dict()) == list(net.state_dict())
        net.load_state_dict(folded.state_dict())
        assert torch.equal(output(net, image()), output(folded, image()))
    options = ("stride", "dilation", "groups", "in_channels", "out_channels", "kernel_size")
    assert all(getattr(folded.get_submodule("1"), name) == getattr(net[1], name) for name in options)


@cases
def test_the_form_holds_its_factors_and_nothing_that_made_a_weight(key: str) -> None:
    form = compressed(key).get_submodule("1")
    assert isinstance(form, BasisConv2d)
    assert {name for name, _ in form.named_parameters()} <= {
        "basis.weight",
        "composition.weight",
        "composition.bias",
    }
    assert not list(form.named_buffers())
    assert not any(module._forward_pre_hooks for module in form.modules())
    assert not {"weight", "weight_g", "weight_orig"} & set(vars(form.basis)) | {"weight"} & set(vars(form))
    assert all(parameter.requires_grad for parameter in form.parameters())


@cases
def test_save_and_load_are_bit_equal(key: str, tmp_path: Path) -> None:
    small = compressed(key)
    loaded = load(net_of(key), save(small, tmp_path / "saved"))
    assert torch.equal(output(loaded, image()), output(small, image()))
    assert plan_of(loaded) == plan_of(small)
    assert [layer.effective for layer in plan_of(small)] == [False, CONVS[key][1]]


@cases
def test_formula_of_the_work_equals_the_count(key: str) -> None:
    dense, small = profile(net_of(key), image()), profile(compressed(key), image())
    assert not dense.disagreements
    assert not small.disagreements
    assert small.macs_before == dense.macs


@cases
def test_numbers_and_statuses(key: str) -> None:
    net = net_of(key)
    states = {name: value.clone() for name, value in net.state_dict().items()}
    record = number_convs(net, image())[1]
    asked = number_convs(net, image(), effective_weights=True)[1]
    assert (asked.status, asked.effective) == ("ok", CONVS[key][1])
    assert record.effective == CONVS[key][1]
    if record.effective:
        name = type(net[1]).__name__
        assert record.status == "unsupported"
        assert record.reason.startswith(f"its class {name} convolves with another weight than the stored")
    else:
        assert (record.status, record.reason) == ("ok", "")
    assert number_convs(compressed(key), image())[1].effective == record.effective
    assert all(torch.equal(value, states[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "key", ["Conv2dSame strided", "StdConv2d", "ScaledStdConv2d", "weight_norm", "pruned"]
)
def test_dtypes(key: str, dtype: torch.dtype) -> None:
    net, x = net_of(key).to(dtype), image().to(dtype)
    net(x)
    full, small = compressed(key, 8, net, x), compressed(key, 4, net, x)
    assert {parameter.dtype for parameter in full.parameters()} == {dtype}
    assert close(output(net, x), output(full, x))
    assert close(output(small, x), output(fold(small), x))


@pytest.mark.parametrize("key", ["Conv2dSame strided", "Framed", "StdConv2d", "weight_norm"])
def test_onnx_file_equals_the_model(key: str, tmp_path: Path) -> None:
    file = export_onnx(compressed(key), image(), tmp_path / "m.onnx")
    assert file.difference.relative <= file.tolerance


@pytest.mark.parametrize("key", ["weight_norm", "pruned", "Conv2dSame strided", "StdConv2d"])
def test_users_hooks_are_carried_and_not_run_by_looking(key: str) -> None:
    net, ran = net_of(key), []
    net[1].register_forward_pre_hook(lambda module, args: ran.append("before") and None)
    net[1].register_forward_hook(lambda module, args, output: output * 2)
    kernel_of(net[1])
    number_convs(net)
    assert not ran
    full = compressed(key, 8, net)
    assert close(output(net, image()), output(full, image()))
    assert close(output(net, image()), output(fold(full), image()))
    ran.clear()
    output(full, image())
    assert ran == ["before"]


def test_looking_leaves_the_random_state_and_the_modes() -> None:
    conv = net_of("StdConv2d")[1].train()
    state = torch.get_rng_state()
    kernel_of(conv)
    assert torch.equal(state, torch.get_rng_state())
    assert conv.training


def test_frozen_stays_frozen() -> None:
    for key in ("weight_norm", "pruned", "StdConv2d", "Conv2dSame"):
        net = net_of(key)
        net[1].requires_grad_(False)
        form = compressed(key, 4, net).get_submodule("1")
        assert not any(parameter.requires_grad for parameter in form.parameters())


@cases
def test_a_layer_left_alone_keeps_what_makes_its_weight(key: str) -> None:
    net = net_of(key)
    full = compress(net, image(), layers=1, size=3)
    assert list(fold(full).state_dict()) == list(net.state_dict())
    assert close(output(net, image()), output(full, image()))
    assert close(output(net, image()), output(fold(full), image()))


REFUSED: dict[str, tuple[Callable[[], nn.Conv2d], str]] = {
    "post-processing": (lambda: Activated(4, 8, 3), "Activated changes the output of its convolution"),
    "two calls": (lambda: Twice(4, 8, 3), "Twice makes 2 convolutions"),
    "another bias": (lambda: Biased(4, 8, 3), "Biased uses another bias than the stored one"),
    "dynamic": (lambda: Dynamic(4, 8, 3), "Dynamic has no fixed kernel"),
    "another in train": (lambda: Noisy(4, 8, 3), "Noisy has no fixed kernel"),
    "only in train": (lambda: Changing(4, 8, 3), "Changing has no fixed kernel"),
    "channels": (
        lambda: WithCoordinates(4, 8, 3),
        "WithCoordinates changes the number of channels of its input",
    ),
    "fails": (lambda: Broken(4, 8, 3), r"Broken fails on a synthetic input \(ValueError: no\)"),
    "own call": (lambda: Called(4, 8, 3), "Called has its own __call__"),
    "bounds its weight": (lambda: MaxNorm(4, 8, 3), "MaxNorm reads its weight, or changes"),
    "clamps its weight": (lambda: Clamped(4, 8, 3), "Clamped reads its weight, or changes"),
    "clamps it in train": (lambda: ClampedInTrain(4, 8, 3), "ClampedInTrain reads its weight, or changes"),
    "decides by its weight": (lambda: DecidesByWeight(4, 8, 3), "DecidesByWeight reads its weight"),
    "changes its input": (lambda: Inplace(4, 8, 3), "Inplace reads its weight, or changes its input"),
    "in-place activation": (
        lambda: InplaceActivated(4, 8, 3),
        "InplaceActivated changes the output of its convolution",
    ),
    "no gradients": (lambda: WithoutGradients(4, 8, 3), "WithoutGradients opens a context"),
    "no autocast": (lambda: InFloat32(4, 8, 3), "InFloat32 opens a context"),
    "slots": (lambda: Slots(4, 8, 3), "Slots cannot be exchanged"),
    "pads and standardises": (lambda: StdConv2dSame(4, 8, 3, stride=2), "StdConv2dSame pads its input and"),
    "pads, scales": (
        lambda: ScaledStdConv2dSame(4, 8, 3, stride=2),
        "ScaledStdConv2dSame pads its input and",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_forwards_are_left_alone_with_a_true_reason(key: str) -> None:
    build, message = REFUSED[key]
    conv = build()
    with pytest.raises(KernelError, match=message) as caught:
        kernel_of(conv)
    for asked in (False, True):
        record = number_convs(nn.Sequential(conv), effective_weights=asked)[0]
        assert record.status == "unsupported"
        assert record.reason == str(caught.value)


def test_a_class_with_a_kernel_of_its_own_is_refused_by_default() -> None:
    net = net_of("StdConv2d")
    with pytest.raises(
        LayerError, match=r"conv 2 \(1\).*another weight than the stored one; effective_weights"
    ):
        compress(net, image(), layers=2)
    with pytest.warns(FxBasisWarning, match="nothing is compressed: .*another weight than the stored one"):
        small = compress(net, image(), layers=lambda record: record.index == 2, size=2)
    assert type(small.get_submodule("1")) is StdConv2d


def test_the_judge_is_the_proof_on_the_example_inputs() -> None:
    net = nn.Sequential(Sneaky(3, 8, 3)).eval()
    large = torch.randn(1, 3, 40, 40)
    full = compress(net, large, layers=1, size=8)
    assert close(output(net, large), output(full, large))

    class Switching(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight * (2 if input.shape[-1] < 20 else 3), self.bias)

    net = nn.Sequential(Switching(3, 8, 3)).eval()
    with (
        pytest.warns(FxBasisWarning, match="computes its kernel"),
        pytest.raises(VerificationError, match=r"conv 1 \(0\).* by itself against its effective kernel"),
    ):
        compress(net, large, layers=1, size=8, effective_weights=True)


def test_a_plan_that_means_another_kernel_is_refused() -> None:
    net = net_of("StdConv2d")
    plan = plan_of(compressed("StdConv2d"))
    wrong = Plan((plan.layers[0], LayerPlan(**{**vars(plan.layers[1]), "effective": False})))
    with pytest.raises(
        LayerError, match=r"conv 2 \(1\).*effective=False.*another weight.*; make the plan again"
    ):
        compress(net, image(), plan=wrong)
    with pytest.raises(LayerError, match=r"effective=True.*Conv2dSame convolves with the stored weight"):
        compress(net_of("Conv2dSame"), image(), plan=plan)


def test_a_plan_keeps_whether_the_kernel_is_the_effective_one() -> None:
    plan = plan_of(compressed("StdConv2d"))
    data = json.loads(json.dumps(plan.to_dict()))
    assert [layer["effective"] for layer in data["layers"]] == [False, True]
    assert Plan.from_dict(data) == plan
    data["layers"][0]["effective"] = 1
    with pytest.raises(PlanError, match="effective is 1; make the plan again"):
        Plan.from_dict(data)


def test_mixed_convolutions_of_timm_are_ordinary_layers() -> None:
    net = nn.Sequential(MixedConv2d(4, 12, [3, 5], stride=2, padding="same")).eval()
    x = torch.randn(2, 4, 9, 9)
    small = compress(net, x, layers="re:.*", size=1.0)
    assert [record.status for record in number_convs(small)] == ["compressed"] * 2
    assert close(output(net, x), output(fold(small), x))
    assert list(fold(small).state_dict()) == list(net.state_dict())


def test_timms_export_class_is_left_alone_because_it_keeps_the_padding_of_its_first_image() -> None:
    net = nn.Sequential(Conv2dSameExport(3, 8, 3, stride=2)).eval()
    with pytest.raises(
        LayerError,
        match=r"its class Conv2dSameExport keeps pad, .* from call to call; leave it out",
    ):
        compress(net, image((8, 8)), layers=1, size=8)
