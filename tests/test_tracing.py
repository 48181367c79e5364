"""Traced copies behave as the model does, in eval() and in train(); what a graph cannot keep stays Python."""

import copy
import io
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from behaviour import X3, X, assert_behaves_as, assert_same, forms_in, quietly, seed_all
from graph_nets import GRAPHS, Case, DropoutInPart, DropoutModule, Plain, make
from python_nets import ALL, EVAL_ONLY, PYTHON
from torch import Tensor, fx, nn

from fxbasis import FxBasisWarning, TraceError, compress, fold, load, number_convs, parts_of, save, trace

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


@pytest.mark.parametrize("key", ALL)
def test_traced_copy_behaves_as_the_model_in_both_modes(key: str) -> None:
    model = make(ALL[key])
    traced, _ = quietly(trace, model, X)
    assert_behaves_as(model, traced, X, X3)


@pytest.mark.parametrize("key", ALL)
def test_compressed_at_full_size_behaves_as_the_model_in_both_modes(key: str) -> None:
    model = make(ALL[key])
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert forms_in(small) == ALL[key].convs
    assert_behaves_as(model, small, X, X3)


@pytest.mark.parametrize("key", ALL)
def test_folding_gives_back_behaviour_and_state_dict(key: str) -> None:
    model = make(ALL[key])
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    folded = fold(small)
    assert forms_in(folded) == 0
    assert list(folded.state_dict()) == list(model.state_dict())
    assert_behaves_as(model, folded, X)


@pytest.mark.parametrize("key", ALL)
def test_saved_and_loaded_is_bit_equal(key: str, tmp_path: Any) -> None:
    model = make(ALL[key]).eval()
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    again, _ = quietly(load, model, save(small, tmp_path))
    seed_all()
    expected = small(X.clone())
    seed_all()
    found = again(X.clone())
    assert type(small).__name__ == type(again).__name__
    assert_same(expected, found)
    leaves = [torch.utils._pytree.tree_leaves(getattr(out, "value", out)) for out in (expected, found)]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("key", GRAPHS)
def test_is_one_graph(key: str) -> None:
    traced, messages = quietly(trace, make(GRAPHS[key]), X)
    assert messages == []
    assert isinstance(traced, fx.GraphModule)
    traced.graph.lint()


@pytest.mark.parametrize("key", PYTHON)
def test_stays_python_and_says_why(key: str) -> None:
    case, why = PYTHON[key]
    model = make(case)
    with pytest.warns(FxBasisWarning, match=f"{type(model).__name__} stays Python.*{why}"):
        traced = trace(model, X)
    assert type(traced) is type(model)
    assert traced is not model


@pytest.mark.parametrize("key", EVAL_ONLY)
def test_is_a_graph_in_eval_and_runs_its_python_in_train(key: str) -> None:
    case, why = EVAL_ONLY[key]
    traced, messages = quietly(trace, make(case), X)
    assert messages == []
    assert isinstance(traced, fx.GraphModule)
    (part,) = parts_of(traced)
    assert re.search(why, part.reason)
    with pytest.raises(
        TraceError, match=r"cannot be pickled: its graph is that of eval.*; use fxbasis\.save"
    ):
        pickle.dumps(traced)


WITHOUT_INPUTS = [key for key in PYTHON if key != "branch on a type"]


@pytest.mark.parametrize("key", WITHOUT_INPUTS)
def test_stays_python_without_example_inputs_too(key: str) -> None:
    model = make(PYTHON[key][0])
    with pytest.warns(FxBasisWarning, match="stays Python"):
        assert type(trace(model)) is type(model)


def test_warning_is_one_line() -> None:
    for case, _ in PYTHON.values():
        _, messages = quietly(trace, make(case), X)
        assert [message.count("\n") for message in messages] == [0]


@pytest.mark.parametrize("key", ALL)
def test_the_model_is_left_as_it_was(key: str) -> None:
    model = make(ALL[key])
    model.train()
    next(child for child in model.modules() if not list(child.children())).eval()
    keys = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.clone() for tensor in tensors]
    seed_all()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())

    quietly(trace, model, X)
    quietly(trace, model)
    quietly(compress, model, X, layers="re:.*", size=2)

    assert torch.equal(states[0], torch.get_rng_state())
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == keys
    assert [module.training for module in model.modules()] == modes
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, tensors, strict=True))
    if key != "random layer drop":  # its own forward draws from Python's generator when it runs
        assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("key", ALL)
def test_state_dict_keys_order_and_modes_are_the_models(key: str) -> None:
    model = make(ALL[key])
    model.train()
    model.eval().train(False)
    traced, _ = quietly(trace, model, X)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert [name for name, _ in traced.named_modules()] == [name for name, _ in model.named_modules()]
    assert [module.training for module in traced.modules()] == [module.training for module in model.modules()]


def test_mixed_modes_are_kept() -> None:
    model = DropoutModule().train()
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    modes = {name: module.training for name, module in small.named_modules()}
    assert (modes[""], modes["bn"], modes["drop"], modes["conv.basis"]) == (True, False, True, True)
    assert not small.conv.basis.weight.requires_grad
    assert not small.conv.composition.weight.requires_grad
    assert small.conv.composition.bias.requires_grad
    assert small.last.basis.weight.requires_grad


def test_one_training_step_gives_the_same_parameters() -> None:
    model = make(Case(Plain)).train()
    traced = trace(model, X)
    for one in (model, traced):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            one(X).square().mean().backward()
            optimizer.step()
    assert_same(dict(model.state_dict()), dict(traced.state_dict()))
    assert not torch.equal(traced.conv.weight, Plain().conv.weight)


def test_trained_compressed_graph_still_switches_mode() -> None:
    small, _ = quietly(compress, make(Case(DropoutInPart)), X, layers="re:.*", size=2)
    small.train()
    before = small.bn.running_mean.clone()
    assert not torch.equal(small(X), small(X))
    assert not torch.equal(before, small.bn.running_mean)
    small.eval()
    assert torch.equal(small(X), small(X))


def test_traced_copy_shares_nothing_with_the_model() -> None:
    model = make(Case(Plain))
    traced = trace(model, X)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(tensor.data_ptr() for tensor in (*traced.parameters(), *traced.buffers()))


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("key", ["plain", "unused parts", "tensor constants", "sequential"])
@pytest.mark.parametrize("compressed", [False, True], ids=["traced", "compressed"])
def test_survives_copies(compressed: bool, key: str, again: Callable[[Any], Any]) -> None:
    if torch.__version__.startswith("2.8.") and key in ("unused parts", "tensor constants"):
        pytest.skip("torch 2.8's pickle of a GraphModule reorders what it did not trace")
    model = make(GRAPHS[key])
    traced, _ = quietly(compress, model, X, layers="re:.*", size=2) if compressed else (trace(model, X), 0)
    other = again(again(traced))
    assert isinstance(other, fx.GraphModule)
    assert list(other.state_dict()) == list(traced.state_dict())
    assert_behaves_as(traced, other, X)
    assert [r.name for r in number_convs(other)] == [r.name for r in number_convs(model)]
    assert list(fold(other).state_dict()) == list(model.state_dict())


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("key", ["plain", "sequential"])
def test_traced_again_gives_the_same(key: str) -> None:
    once = trace(make(GRAPHS[key]), X)
    twice = trace(once, X)
    assert twice is not once
    assert_behaves_as(once, twice, X)
