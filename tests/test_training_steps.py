"""profile(training=True): the count of a forward and a backward pass is the closed form, and is PyTorch's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import NETS, Net, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fxbasis import InputError, compress, profile, trace
from fxbasis.passes.profiling import Profile
from fxbasis.structures import FORMS

DENSELY = [key for key in NETS if key not in ("grouped", "depthwise")]  # whose gradients torch counts right
EXAMPLE = torch.randn(2, 6, 9, 8)


def of_a_step(model: nn.Module, example: Tensor) -> Profile:
    found = profile(model, example, training=True)
    assert found.training
    assert found.disagreements == ()
    return found


def torch_macs(model: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model.train()(example).sum().backward()
    return counter.get_total_flops() // 2


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 6, 1), nn.Flatten(), nn.LazyLinear(5))


def works(found: Profile) -> list[float]:
    """For each convolution, its MACs as it is over those of one forward pass of the dense layer."""
    forward = profile(chain_ready(), EXAMPLE)
    return [layer.macs / once.macs for layer, once in zip(found.convs, forward.convs, strict=True)]


def chain_ready() -> nn.Sequential:
    net = chain()
    net(EXAMPLE)
    return net


@pytest.mark.parametrize("key", DENSELY)
def test_a_step_is_that_of_the_flop_counter(key: str) -> None:
    net = build(key)
    found = of_a_step(net, net.example)
    assert found.counted == torch_macs(net, net.example) > profile(net, net.example).counted


def test_graph_and_python_model_give_the_same_step(net: Net) -> None:
    rows = [of_a_step(model, net.example).layers for model in (net, trace(net, net.example))]
    works = [sorted((layer.name, layer.macs, layer.activations) for layer in found) for found in rows]
    assert works[0] == works[1]


@pytest.mark.parametrize("fixed_basis", [False, True], ids=["trained", "fixed"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_every_form_is_its_closed_form(form: str, fixed_basis: bool) -> None:
    net = chain_ready()
    small = compress(net, EXAMPLE, layers=[1, 2], form=form, size=0.3, fixed_basis=fixed_basis)
    found = of_a_step(small, EXAMPLE)
    assert found.macs_before == of_a_step(net, EXAMPLE).macs
    if form not in ("reduced", "cp", "cp4"):  # products, and weights of groups, that torch counts otherwise
        assert found.counted == torch_macs(small, EXAMPLE)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_gradient_of_a_grouped_weight_is_counted_once(groups: int) -> None:
    found = of_a_step(nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups)), torch.randn(2, 4, 9, 8))
    assert found.counted == 2 * profile(nn.Conv2d(4, 8, 3, groups=groups), torch.randn(2, 4, 9, 8)).counted


def test_the_first_layer_has_no_gradient_of_its_input() -> None:
    assert works(of_a_step(chain_ready(), EXAMPLE)) == [2, 3, 3]


def test_frozen_layers_have_no_gradient_of_their_weight() -> None:
    net = chain_ready()
    net[3].requires_grad_(False)
    assert works(of_a_step(net, EXAMPLE)) == [2, 2, 3]
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    assert works(of_a_step(net, EXAMPLE)) == [1, 1, 2]


def test_what_the_loss_does_not_reach_is_run_forward_only() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).detach())

    found = of_a_step(Cut(), EXAMPLE)
    assert [layer.macs for layer in found.convs] == [2 * 42 * 8 * 54, 2 * 2 * 42 * 8 * 4]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("reentrant", "last"), [(False, 3), (True, 4)])
def test_a_checkpoint_runs_its_layers_forward_twice(reentrant: bool, last: int) -> None:
    """But the last one, whose output nobody needs to go back, where the checkpoint may stop before it."""

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Conv2d(6, 8, 3), nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.rest, self.first(x), use_reentrant=reentrant)

    found = of_a_step(Saving(), EXAMPLE)
    positions = 2 * 42
    assert [layer.macs for layer in found.convs] == [
        2 * positions * 8 * 54,
        4 * positions * 8 * 4,
        last * positions * 4 * 2,
    ]


def test_the_model_is_not_touched() -> None:
    net = chain_ready().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    of_a_step(net, EXAMPLE)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(parameter.grad is not None for parameter in net.parameters())
    assert not any(module.training or module._forward_hooks for module in net.modules())


def test_the_unit_is_said() -> None:
    found = of_a_step(chain_ready(), EXAMPLE)
    assert found.summary().startswith("MACs of a training step ")
    assert json.loads(json.dumps(found.to_dict()))["unit"].startswith("MACs of a training step ")
    assert "aten.native_batch_norm_backward" in found.uncounted


def test_a_model_without_anything_to_train_is_refused() -> None:
    net = chain_ready().requires_grad_(False)
    with pytest.raises(
        InputError, match=r"no output of Sequential in train\(\) has a gradient; set requires_"
    ):
        profile(net, EXAMPLE, training=True)


def test_a_model_that_cannot_go_back_is_refused() -> None:
    class Spoilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found = torch.exp(self.conv(x))
            return found.mul_(2).exp() + found.zero_()

    with pytest.raises(InputError, match=r"the backward pass of Spoilt failed: .*; make it trainable"):
        profile(Spoilt(), EXAMPLE, training=True)


def test_batchnorm_that_refuses_one_value_is_an_input_error() -> None:
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="more than 1 value per channel when training"):
        profile(net, EXAMPLE[:1], training=True)
