"""Convolutions with hooks, classes, memory and holders of their own: exact, or left alone with the reason."""

import copy
from typing import Any

import pytest
import torch
from behaviour import X, seed_all
from hard_modules import Base, assert_behaves_as
from layer_modules import EXACT, REASONS, Scaled, ViewOfAWeight
from torch import nn

from fxbasis import TraceError, compress, fold, load, number_convs, save, trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def made(key: str) -> nn.Module:
    seed_all()
    return EXACT[key]()


NO_DEEPCOPY = ("ListInAClosure", "ViewOfAWeight", "ParameterWithAnAttribute")
"""Python's own copy fails on them, or leads to the original."""


@pytest.mark.parametrize("key", NO_DEEPCOPY)
def test_what_deepcopy_does_not_copy(key: str) -> None:
    model = made(key).eval()
    small = compress(model, X, layers="re:.*", size=1.0)
    for one in (trace(model, X), small, fold(small)):
        assert torch.allclose(one(X), model(X), atol=1e-5)
        assert one.conv is not model.conv


@pytest.mark.parametrize("key", [key for key in EXACT if key not in NO_DEEPCOPY])
def test_traced_compressed_folded_and_saved(key: str, tmp_path: Any) -> None:
    model = made(key)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.numel()}
    assert_behaves_as(model, trace(model, X))
    small = compress(model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small)
    folded = fold(small)
    assert_behaves_as(model, folded)
    assert list(folded.state_dict()) == list(model.state_dict())
    half = compress(model, X, size=2)
    assert_behaves_as(half, load(model, save(half, tmp_path)), tolerance=0)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("key", REASONS)
def test_left_alone_with_the_reason(key: str) -> None:
    record = number_convs(made(key), X)[0]
    assert (record.status, record.calls) == ("unsupported", 1)
    assert REASONS[key][1] in record.reason


@pytest.mark.parametrize("key", [key for key in EXACT if key.startswith(("Lambda", "ListIn"))])
def test_gradients_stay_in_the_copy(key: str) -> None:
    model = made(key)
    traced = trace(model, X)
    traced(X).sum().backward()
    assert model.conv.weight.grad is None
    assert traced.conv.weight.grad is not None
    assert number_convs(model, X)[0].status == "ok"


def test_a_fold_has_the_class_that_it_had() -> None:
    model = made("MethodOfAClass").eval()
    folded = fold(compress(model, X, size=2))
    assert type(folded.conv) is Scaled
    assert folded.conv.factor == 2.0


def test_work_is_counted_by_the_weight_that_is_there() -> None:
    record = number_convs(made("GreyStem"), X)[0]
    assert (record.in_channels, record.params) == (1, 8 * 9 + 8)
    assert record.macs == len(X) * 8 * 9 * X.shape[2] * X.shape[3]


def test_views_and_hooks_of_parameters_live_on_in_a_copy() -> None:
    model = made("ViewOfAWeight")
    traced = trace(model, X)
    with torch.no_grad():
        traced.conv.weight.mul_(0)
    assert isinstance(model, ViewOfAWeight)
    assert not traced.flat.any()
    assert model.flat.any()
    hooked = trace(made("GradientHook"), X)
    hooked(X).sum().backward()
    assert not hooked.conv.weight.grad.any()
    after = trace(made("AccumulatedGradientHook"), X)
    after(X).sum().backward()
    assert not after.conv.bias.grad.any()
    tied = trace(made("TwoParametersOneMemory"), X)
    assert tied.conv.weight.data_ptr() == tied.linear.weight.data_ptr()


def test_a_module_that_copies_itself_as_itself_is_refused() -> None:
    class Same(nn.Conv2d):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    model = Base()
    model.conv = Same(3, 8, 3, padding=1)
    with pytest.raises(TraceError, match=r"conv \(Same\) copies itself as itself; take its own __deepcopy__"):
        compress(model, X)
    assert [*model.state_dict()][:2] == ["conv.weight", "conv.bias"]


def test_a_copy_that_calls_the_original_is_refused() -> None:
    class Holder:
        def __init__(self, conv: nn.Module) -> None:
            self.conv = conv

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    model = Base()
    model.holder = Holder(model.conv)
    model.forward = lambda x: model.last(model.holder.conv(x))
    with pytest.raises(TraceError, match=r"still calls conv of the original: .*keep modules as attributes"):
        trace(model, X)
    assert copy.deepcopy(model) is not model


def test_a_traced_sequential_can_be_cut() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    traced = trace(model, X)
    assert torch.equal(traced[:2](X), model[:2](X))
    assert traced[2].out_channels == 4
