"""The form module by itself: its attributes, its copies, its fold, its hooks, and the weight it takes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Net, close
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from fxbasis import compress, fold, load, number_convs, save
from fxbasis.errors import FxBasisWarning, LayerError, VerificationError
from fxbasis.fitting import fit
from fxbasis.forms import LAYER, BasisConv2d, as_form, layer_plan
from fxbasis.recipe import LayerPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*it is rewritten because it was asked for")

IMAGE = (2, 8, 9, 7)
OPTIONS = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 4, "padding_mode": "circular"}


def conv_of(**changes: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 12, 3, **{**OPTIONS, **changes})


def plan_for(conv: nn.Conv2d, rank: int) -> LayerPlan:
    return LayerPlan(
        number=3,
        name="stage.conv",
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        groups=conv.groups,
        form="output",
        method="svd",
        ranks=(rank,),
    )


def form_of(conv: nn.Conv2d, rank: int = 4) -> BasisConv2d:
    plan = plan_for(conv, rank)
    return BasisConv2d.from_conv2d(conv, plan, fit(conv.weight, plan))


def image() -> Tensor:
    return torch.randn(IMAGE)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [4, 8, 12])
def test_form_is_a_convolution_with_its_own_weight(rank: int, bias: bool) -> None:
    conv, x = conv_of(bias=bias), image()
    form = form_of(conv, rank)
    with torch.no_grad():
        conv.weight.copy_(form.weight)
    assert close(output(conv, x), output(form, x))
    assert close(output(conv, x), output(form.to_conv2d(), x))


@pytest.mark.parametrize("name", [*nn.Conv2d.__constants__, "weight", "bias", "training"])
def test_attributes_of_conv2d_are_answered(name: str) -> None:
    conv = conv_of()
    found, expected = getattr(form_of(conv, 12), name), getattr(conv, name)
    if isinstance(expected, Tensor):
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
        assert close(expected.detach(), found.detach())
    else:
        assert found == expected


def test_every_public_attribute_of_conv2d_is_answered() -> None:
    conv = conv_of()
    lacking = {name for name in dir(conv) if not name.startswith("_")} - set(dir(form_of(conv)))
    assert lacking == {"reset_parameters"}  # which basis and composition have each


def test_factors_have_the_stated_shapes() -> None:
    form = form_of(conv_of(), 8)
    assert form.basis.weight.shape == (8, 2, 3, 3)
    assert form.composition.weight.shape == (12, 2, 1, 1)
    assert list(form.state_dict()) == ["basis.weight", "composition.weight", "composition.bias"]


def test_gradients_reach_the_factors_through_weight_and_forward() -> None:
    for value in (lambda form: form.weight.sum(), lambda form: form(image()).sum()):
        form = form_of(conv_of())
        value(form).backward()
        assert form.basis.weight.grad is not None
        assert form.composition.weight.grad is not None


def test_making_a_form_and_folding_it_leave_the_random_state() -> None:
    conv = conv_of()
    before = torch.get_rng_state()
    form_of(conv).to_conv2d()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda form: pickle.loads(pickle.dumps(form))], ids=["deepcopy", "pickle"]
)
def test_form_survives_copies(again: Callable[[BasisConv2d], BasisConv2d]) -> None:
    form, x = form_of(conv_of()), image()
    copied = again(form)
    assert copied.plan == form.plan == layer_plan(copied)
    assert torch.equal(output(copied, x), output(form, x))
    assert torch.equal(output(copied.to_conv2d(), x), output(form.to_conv2d(), x))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in form.parameters()}


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: fx.GraphModule(model, copy.deepcopy(model.graph)),
        fx.symbolic_trace,
        lambda model: fx.Transformer(model).transform(),
    ],
    ids=["deepcopy", "pickle", "GraphModule", "symbolic_trace", "Transformer"],
)
def test_compressed_net_still_folds_after_copies(again: Callable[[Any], nn.Module], net: Net) -> None:
    small = compress(net, net.example, layers="re:.*")
    copied = again(small)
    folded = fold(copied)
    assert [record.status for record in number_convs(copied)] == [
        record.status for record in number_convs(small)
    ]
    assert not [module for module in folded.modules() if as_form(module) is not None]
    assert torch.equal(output(folded, net.example), output(fold(small), net.example))


def test_layer_plan_tells_what_was_decided() -> None:
    conv = conv_of()
    form = form_of(conv)
    assert layer_plan(form) == form.plan == plan_for(conv, 4)
    assert layer_plan(conv) is None
    setattr(conv, LAYER, form.plan)
    assert layer_plan(conv) == form.plan


def test_two_convs_named_like_factors_are_no_form() -> None:
    module = nn.Module()
    module.basis, module.composition = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1)
    assert as_form(module) is None
    assert as_form(form_of(conv_of())) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["basis", "composition"])
def test_fold_of_factors_that_are_not_finite_is_refused(part: str, bad: float) -> None:
    form = form_of(conv_of())
    with torch.no_grad():
        form.get_parameter(f"{part}.weight").view(-1)[0] = bad
    message = (
        r"conv 3 \(stage.conv\), weight \(12, 2, 3, 3\): the folded convolution differs by .* train it with"
    )
    with pytest.raises(VerificationError, match=message):
        form.to_conv2d()


def test_fold_that_overflows_the_dtype_is_refused() -> None:
    form = form_of(conv_of()).half()
    with torch.no_grad():
        form.basis.weight.mul_(1e4)
        form.composition.weight.mul_(1e4)
    with pytest.raises(VerificationError, match=r"conv 3 \(stage.conv\).* far out of scale"):
        form.to_conv2d()


class Log:
    """Counts calls of hooks of every kind, and keeps the last output; a deep copy logs to the same lists."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.keywords: list[dict[str, Any]] = []
        self.gradients: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> Log:
        return self

    def attach(self, conv: nn.Module) -> None:
        conv.register_forward_pre_hook(lambda _, args: self.before.append(args[0]))
        conv.register_forward_hook(lambda _, args, out: self.after.append(out))
        conv.register_forward_hook(
            lambda _, args, kwargs, out: self.keywords.append(kwargs), with_kwargs=True
        )
        conv.register_full_backward_hook(lambda _, into, out: self.gradients.append(out[0]))

    def clear(self) -> None:
        for calls in (self.before, self.after, self.keywords, self.gradients):
            calls.clear()


@pytest.mark.parametrize("folded", [False, True], ids=["compressed", "folded"])
@pytest.mark.parametrize(
    ("fixture", "name", "calls"),
    [("plain_net", "conv1", 1), ("residual_net", "block.conv1", 1), ("shared_net", "shared", 2)],
)
def test_hooks_fire_once_for_each_call(
    fixture: str, name: str, calls: int, folded: bool, request: pytest.FixtureRequest
) -> None:
    net, log = request.getfixturevalue(fixture), Log()
    log.attach(net.get_submodule(name))
    model = compress(net, net.example, layers=name, size=1.0)
    model = fold(model) if folded else model
    log.clear()
    x = net.example.requires_grad_()
    model(x).sum().backward()
    found = [list(log.before), list(log.after), list(log.gradients)]
    assert [len(seen) for seen in (*found, log.keywords)] == [calls] * 4
    log.clear()
    net(x).sum().backward()
    for seen, expected in zip(found, (log.before, log.after, log.gradients), strict=True):
        assert all(close(a.detach(), b.detach()) for a, b in zip(expected, seen, strict=True))


def test_a_hook_that_changes_the_output_still_does(plain_net: Net) -> None:
    plain_net.get_submodule("conv1").register_forward_hook(lambda *args: args[2] * 3)
    full = compress(plain_net, plain_net.example, layers=[1, 2], size=1.0)
    for model in (full, fold(full)):
        assert close(output(plain_net, plain_net.example), output(model, plain_net.example))


def test_attributes_that_somebody_set_are_kept(plain_net: Net) -> None:
    plain_net.get_submodule("conv1").stage = "early"
    small = compress(plain_net, plain_net.example, layers="conv1", size=2)
    assert small.get_submodule("conv1").stage == fold(small).get_submodule("conv1").stage == "early"


def test_a_removed_hook_no_longer_fires(plain_net: Net) -> None:
    calls: list[int] = []
    conv = plain_net.get_submodule("conv1")
    handle = conv.register_forward_hook(lambda *_: calls.append(1) and None)
    form = form_of(conv, 4)
    form(plain_net.example)
    handle.remove()
    form(plain_net.example)
    conv(plain_net.example)
    assert calls == [1]


class Scaled(nn.Module):
    """A parametrization of the weight that depends on nothing else."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda conv: nn.utils.parametrize.register_parametrization(conv, "weight", Scaled()),
}
EFFECTIVE = r"conv 1 \(0\), weight \(8, 3, 3, 3\): its parametrization .* is replaced by the effective weight"


def parametrized(key: str) -> tuple[nn.Module, Tensor]:
    conv = PARAMETRIZATIONS[key](nn.Conv2d(3, 8, 3))
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(1.5)
    return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 7, 7)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("key", PARAMETRIZATIONS)
def test_the_effective_weight_of_a_parametrization_is_used(key: str, training: bool) -> None:
    net, x = parametrized(key)
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(FxBasisWarning, match=EFFECTIVE):
        full = compress(net.train(training), x, layers=1, size=8)
    assert list(before) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert close(output(net.eval(), x), output(full.eval(), x))
    assert close(output(net, x), output(fold(full).eval(), x))
    assert full.get_parameter("0.basis.weight").requires_grad
    assert [name for name, _ in fold(full).named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_frozen_parametrized_conv_stays_frozen() -> None:
    net, x = parametrized("weight_norm")
    net[0].requires_grad_(False)
    with pytest.warns(FxBasisWarning, match=EFFECTIVE):
        small = compress(net, x, layers=1, size=2)
    assert not any(parameter.requires_grad for parameter in small.get_submodule("0").parameters())
    assert not any(parameter.requires_grad for parameter in fold(small).get_submodule("0").parameters())


@pytest.mark.parametrize("key", PARAMETRIZATIONS)
def test_a_parametrized_conv_left_alone_stays_parametrized(key: str) -> None:
    net, x = parametrized(key)
    small = compress(net.eval(), x, layers=2, size=2)
    assert torch.nn.utils.parametrize.is_parametrized(small.get_submodule("0"), "weight")
    assert set(net.get_submodule("0").state_dict()) == set(fold(small).get_submodule("0").state_dict())


def test_a_parametrized_net_loads_bit_equal(tmp_path: Any) -> None:
    net, x = parametrized("weight_norm")
    with pytest.warns(FxBasisWarning, match=EFFECTIVE):
        small = compress(net, x, layers=1, size=2)
    loaded = load(net, save(small, tmp_path / "saved"))
    assert torch.equal(output(loaded, x), output(small, x))


def test_numbering_leaves_the_power_iteration_of_spectral_norm() -> None:
    net, x = parametrized("spectral_norm")
    before = copy.deepcopy(net.train().state_dict())
    number_convs(net, x)
    number_convs(net)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_a_subclass_without_its_own_forward_is_rewritten() -> None:
    class Named(nn.Conv2d):
        pass

    net, x = nn.Sequential(Named(3, 8, 3)).eval(), torch.randn(2, 3, 7, 7)
    full = compress(net, x, layers=1, size=8)
    assert close(output(net, x), output(full, x))


@pytest.mark.parametrize(
    "register",
    [
        lambda conv: conv.register_buffer("mask", torch.ones(8)),
        lambda conv: conv.register_parameter("scale", nn.Parameter(torch.ones(8))),
        lambda conv: conv.add_module("observer", nn.BatchNorm2d(8)),
    ],
    ids=["buffer", "parameter", "module"],
)
def test_a_conv_that_holds_more_than_weight_and_bias_is_refused(
    register: Callable[[nn.Module], None],
) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(2, 3, 7, 7)
    register(net[0])
    message = r"conv 1 \(0\).* cannot be rewritten: it holds .* besides its weight and bias; leave it out"
    with pytest.raises(LayerError, match=message):
        compress(net, x, layers=1, size=2)
    with pytest.warns(FxBasisWarning, match="nothing is compressed: unsupported: it holds"):
        small = compress(net, x, layers="re:.*", size=2)
    assert list(fold(small).state_dict()) == list(net.state_dict())
