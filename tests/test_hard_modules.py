"""Modules made to break a tracer: each must come out the same, as a graph or as Python, untouched."""

import copy
from typing import Any

import pytest
import torch
from behaviour import X, seed_all
from hard_modules import REGISTER, TABLE, Base, RegistersSubclasses, TellsTheShape, assert_behaves_as
from python_modules import PYTHON, Meta
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxbasis import UsageError, compress, fold, load, parts_of, profile, save, trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


OF_ONE_DTYPE = ("jit_traced_part", "frozen_script_part", "MakesAModule")


def made(key: str) -> nn.Module:
    seed_all()
    model = TABLE[key]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return model


def gradients_of(model: nn.Module) -> list[Tensor | None]:
    model = copy.deepcopy(model).double().train()
    seed_all()
    outputs = [t for t in tree_leaves(model(X.double())) if isinstance(t, Tensor) and t.requires_grad]
    sum(t.square().sum() for t in outputs).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("key", TABLE)
def test_traced_is_the_model(key: str) -> None:
    model = made(key)
    state, values = sorted(vars(model)), [tensor.clone() for tensor in model.state_dict().values()]
    for traced in (trace(model, X), trace(model)):
        assert_behaves_as(model, traced)
        assert parts_of(traced)[0].graph is False or key not in PYTHON
    for name, _ in model.named_children():
        assert_behaves_as(model, trace(model, X), part=name)
    assert sorted(vars(model)) == state
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values, strict=True))


@pytest.mark.parametrize("key", [key for key in TABLE if key not in OF_ONE_DTYPE])
def test_gradients_are_the_models(key: str) -> None:
    model = made(key)
    for one, other in zip(gradients_of(model), gradients_of(trace(model, X)), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() <= 1e-12 * max(float(one.abs().max()), 1.0)


@pytest.mark.parametrize("key", TABLE)
def test_compressed_folded_saved(key: str, tmp_path: Any) -> None:
    model = made(key)
    small = compress(model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small)
    assert_behaves_as(model, fold(small))
    half = compress(model, X, layers="re:.*", size=2)
    assert_behaves_as(half, load(model, save(half, tmp_path)), tolerance=0)
    assert profile(half, X).disagreements == () or key in ("MakesAModule", "InferenceMode")


def test_the_classes_of_graphs_are_nobody_elses_business() -> None:
    assert set(REGISTER) == {"RegistersSubclasses"}
    assert REGISTER["RegistersSubclasses"] is RegistersSubclasses
    assert Meta.made == ["OwnMetaclass"]


def test_extra_state_is_refused_by_save(tmp_path: Any) -> None:
    class Extra(Base):
        def get_extra_state(self) -> Any:
            return {"version": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(UsageError, match=r"_extra_state is a dict.*; keep it in a buffer"):
        save(compress(Extra(), X, size=2), tmp_path)


def test_the_text_of_a_value_may_stand_in_the_message_of_an_assert() -> None:
    model = TellsTheShape().eval()
    traced = trace(model, X)
    assert [part.graph for part in parts_of(traced)] == [True]
    with pytest.raises(AssertionError, match="channels, not 3"):
        traced(X[:, :2])
