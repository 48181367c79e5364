"""Identities on random nets: what must hold for every net, by Hypothesis.

The fixed profile (the default) draws the same nets each time; the long one draws others:
``pytest tests/test_properties.py --hypothesis-profile=long``.
"""

from __future__ import annotations

import random
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOLERANCES
from hypothesis import assume, given
from hypothesis import strategies as st
from random_modules import Result
from random_nets import Net, nets
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxbasis import FxBasisWarning, compress, fold, load, number_convs, plan_of, profile, save
from fxbasis.bases import decompose
from fxbasis.forms import BasisConv2d
from fxbasis.passes.numbering import conv_layers
from fxbasis.running import in_mode
from fxbasis.snapshots import Snapshot
from fxbasis.structures import FORMS

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),
]
REASONS = ("depthwise", "its parameter is also", "is also read by", "not called")
SIZES = st.one_of(st.sampled_from([0.5, 0.25, 0.75, 1.0]), st.integers(1, 6))
HOW = st.sampled_from([{"form": form, "method": method} for form in FORMS for method in FORMS[form].methods])
OTHERS = ((3, (2, 1)), (1, (0, 0)), (4, (0, 3)))


def outcome(model: nn.Module, inputs: Any, training: bool = False) -> Any:
    """Output and buffers of one seeded run, which leaves no trace; None where the model does not run."""
    inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    before = Snapshot(model.modules())
    with torch.no_grad(), in_mode(model, training):
        torch.manual_seed(0)
        try:
            output = model(*args, **kwargs)
        except (RuntimeError, ValueError):  # BatchNorm on one value, padding wider than the image
            return None
        else:
            return output, {
                name: buffer.clone() for name, buffer in model.named_buffers() if not _of_form(name)
            }
        finally:
            before.restore()


def _of_form(buffer: str) -> bool:
    return buffer.endswith(("composition.order", "composition.first", "composition.second"))


def behaviour(net: Net, model: nn.Module) -> list[Any]:
    """Outcomes in eval() and train(), and in eval() on other batches and images."""
    found = [outcome(model, net.example(), training) for training in (False, True)]
    return found + [outcome(model, net.example(*other)) for other in OTHERS]


def assert_close(expected: Any, actual: Any) -> None:
    """Same types and shapes, and equal to the dtype's tolerance of the largest magnitude."""
    assert (expected is None) == (actual is None)
    assert type(expected) is type(actual)
    left, right = (pytree.tree_flatten(_plain(value)) for value in (expected, actual))
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            gap, scale = float((a - b).detach().abs().max()), float(a.detach().abs().max())
            assert gap <= TOLERANCES.get(a.dtype, 0.0) * scale, f"differs by {gap:.1e} of {scale:.1e}"


def _plain(value: Any) -> Any:
    """The same nest with each dataclass made a dict under its name, which pytree looks into."""
    if isinstance(value, Result):
        return {"Result": vars(value)}
    if type(value) in (list, tuple):
        return type(value)(_plain(part) for part in value)
    return value


def assert_same_behaviour(expected: list[Any], actual: list[Any]) -> None:
    for before, after in zip(expected, actual, strict=True):
        assert_close(before, after)


def layout(model: nn.Module) -> list[tuple[Any, ...]]:
    """Keys, shapes, dtypes, in order; and which keys are one tensor."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return [
        (key, tuple(t.shape), t.dtype, t.requires_grad, first.setdefault(id(t), key))
        for key, t in state.items()
    ]


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model that a caller could see change, and the random states."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = list(model.named_modules(remove_duplicate=False))
    return [
        [
            (name, id(t), t.detach().numpy().tobytes(), t.stride(), t.dtype, t.requires_grad, t.grad)
            for name, t in tensors
        ],
        [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in modules],
        [(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for _, m in modules],
        (torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()),
    ]


def numbers(model: nn.Module) -> list[tuple[int, str]]:
    return [(record.index, record.name) for record in number_convs(model)]


def left_alone(net: Net, compressed: nn.Module) -> list[str]:
    """Why layers are not compressed although all were asked for."""
    table = number_convs(compressed, net.example())
    return [record.reason for record in table if record.status != "compressed"]


def same_layout(net: Net, how: dict[str, str]) -> bool:
    """Whether the form has the layout of the original: with one channel it is ambiguous, and dropout
    draws its numbers in the order of the memory."""
    return not net.channels_last or how["form"] in ("output", "gauge", "weight")


@given(nets(), HOW)
def test_full_rank_equals_the_original(net: Net, how: dict[str, str]) -> None:
    assume(same_layout(net, how))
    model, example = net.build(), net.example()
    before = snapshot(model)
    full = compress(model, example, layers="re:.*", size=1.0, **how)
    folded = fold(full)
    assert snapshot(model) == before
    assert all(any(known in reason for known in REASONS) for reason in left_alone(net, full))
    expected = behaviour(net, model)
    assert expected[0] is not None
    assert_same_behaviour(expected, behaviour(net, full))
    assert_same_behaviour(expected, behaviour(net, folded))
    assert layout(folded) == layout(model)
    assert numbers(model) == numbers(full) == numbers(folded)


@given(nets(), SIZES, HOW)
def test_any_rank_equals_its_fold(net: Net, size: float, how: dict[str, str]) -> None:
    assume(same_layout(net, how))
    model = net.build()
    small = compress(model, net.example(), layers="re:.*", size=size, **how)
    before = snapshot(small)
    folded = fold(small)
    again = fold(folded)
    assert snapshot(small) == before
    assert_same_behaviour(behaviour(net, small), behaviour(net, folded))
    assert layout(folded) == layout(again) == layout(model)
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), again.parameters(), strict=True))
    assert not any(isinstance(layer, BasisConv2d) for layer in conv_layers(folded).values())
    model.load_state_dict(folded.state_dict())
    assert_close(outcome(folded, net.example()), outcome(model, net.example()))


@given(nets(), SIZES, HOW, st.data())
def test_each_form_equals_its_folded_convolution(
    net: Net, size: float, how: dict[str, str], data: st.DataObject
) -> None:
    model = net.build()
    chosen = data.draw(st.sets(st.sampled_from([index for index, _ in numbers(model)]), min_size=1))
    small = compress(model, net.example(), layers=lambda record: record.index in chosen, size=size, **how)
    assert {layer.number for layer in plan_of(small).compressed} <= chosen
    for name, form in conv_layers(small).items():
        if isinstance(form, BasisConv2d):
            x = torch.randn(2, form.in_channels, 12, 11, dtype=net.dtype)
            conv = fold(small).get_submodule(name)
            assert_close((conv(x), {}), (form(x), {}))


@given(nets(), SIZES, HOW)
def test_saved_and_loaded_is_bit_equal(net: Net, size: float, how: dict[str, str]) -> None:
    model, example = net.build(), net.example()
    small = compress(model, example, layers="re:.*", size=size, **how)
    with tempfile.TemporaryDirectory() as name:
        folder = save(small, Path(name, "saved"))
        assert sorted(file.name for file in Path(folder).iterdir()) == ["model.safetensors", "plan.json"]
        loaded = load(net.build(seed=1), folder)
    assert layout(loaded) == layout(small)
    assert numbers(loaded) == numbers(model)
    assert plan_of(loaded) == plan_of(small)
    pairs = zip(*(pytree.tree_leaves(_plain(behaviour(net, each))) for each in (small, loaded)), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in pairs)


@given(nets(), SIZES, HOW)
def test_formula_of_the_work_equals_the_count(net: Net, size: float, how: dict[str, str]) -> None:
    model, example = net.build(), net.example()
    small = compress(model, example, layers="re:.*", size=size, **how)
    dense, found = profile(model, example), profile(small, example)
    assert not dense.disagreements
    assert not found.disagreements
    assert [layer.macs_before for layer in found.convs] == [layer.macs for layer in dense.convs]
    assert found.params_before == dense.params
    assert found.macs_before == dense.macs or "reader" in repr(net)  # making form.weight is work
    assert dense.params == sum(parameter.numel() for parameter in model.parameters())
    assert found.params == sum(parameter.numel() for parameter in small.parameters())
    for each, macs in ((model, dense.counted), (small, found.counted)):
        with FlopCounterMode(display=False) as counter:
            outcome(each, example)
        # copies and sums are products entry by entry, which that counter does not know
        assert counter.get_total_flops() == 2 * macs or (how["form"] == "reduced" and each is small)


@given(nets())
def test_nothing_selected_equals_the_original_and_says_so(net: Net) -> None:
    model = net.build()
    before = snapshot(model)
    with pytest.warns(FxBasisWarning, match="nothing is compressed: not selected"):
        same = compress(model, net.example(), layers={"all": None})
    assert snapshot(model) == before
    assert layout(same) == layout(model)
    for training in (False, True):
        left, right = (outcome(each, net.example(), training) for each in (model, same))
        assert_close(left, right)


@given(nets(), st.sampled_from(FORMS["gauge"].methods))
def test_error_of_the_fit_falls_with_the_rank(net: Net, method: str) -> None:
    for conv in conv_layers(net.build()).values():
        weight = conv.weight.detach().double().reshape(conv.groups, conv.out_channels // conv.groups, -1)
        found = decompose(conv.weight, conv.groups, method)
        ranks = range(1, min(weight.shape[1:]) + 1)
        errors = [found.relative_error(rank) for rank in ranks]
        assert all(after <= before for before, after in pairwise(errors))
        for rank, error in zip(ranks, errors, strict=True):
            factors = found.factors(rank)
            left = float((weight - factors.composition @ factors.basis).norm())
            assert left**2 == pytest.approx((error * float(weight.norm())) ** 2, abs=1e-12)
        assert errors[-1] == 0.0
