"""What a traced copy could lose without a word: hooks, patches, attributes, contexts, random numbers."""

import copy
import random
from typing import Any

import pytest
import torch
from behaviour import X3, X, assert_behaves_as, assert_same, forms_in, quietly
from graph_nets import GRAPHS, Base, Case, Plain, PlainList, make
from python_nets import PYTHON, PythonLayerDrop
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxbasis import FxBasisError, FxBasisWarning, UsageError, compress, fold, number_convs, trace
from fxbasis.forms import BasisConv2d


def patched() -> nn.Module:
    model = Plain()
    first, last = model.conv, model.last
    model.forward = lambda x: last(first(x))  # type: ignore[method-assign]
    return model


class CalledThroughForward(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last.forward(self.body(x))


def test_a_part_that_sets_its_attributes_goes_on_doing_so() -> None:
    class Caches(nn.Module):
        seen: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x * 2
            return self.seen

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Caches(), nn.Conv2d(4, 4, 1))
    for _ in range(2):
        traced = trace(model, X)
        assert isinstance(traced, fx.GraphModule)
        assert model[1].seen is None
        traced(X)
        assert isinstance(traced[1].seen, Tensor)


def test_constants_do_not_enter_the_state_dict() -> None:
    model = make(GRAPHS["tensor constants"])
    traced = trace(model, X)
    assert list(traced.state_dict()) == list(model.state_dict())
    traced.load_state_dict(model.state_dict())
    assert traced.double()(X.double()).dtype == torch.float64


def test_hooks_fire_once_for_each_call_after_compression() -> None:
    class Counter:
        calls = 0

        def __call__(self, *_: Any) -> None:
            Counter.calls += 1

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Plain())
    model[0].register_forward_hook(Counter())
    model[1].conv.register_forward_pre_hook(Counter())
    model[1].register_forward_hook(Counter())
    model.register_forward_hook(Counter())
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    for one in (trace(model, X), small, fold(small)):
        assert isinstance(one, fx.GraphModule)
        Counter.calls = 0
        one(X)
        assert Counter.calls == 4


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_backward_hook_on_a_conv_still_fires() -> None:
    seen: list[torch.Size] = []
    model = Plain()
    model.conv.register_full_backward_hook(lambda module, into, out: seen.append(out[0].shape))
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    seen.clear()
    small(X).sum().backward()
    assert seen == [torch.Size([2, 8, 8, 8])]


def test_compressed_python_model_still_takes_both_ways() -> None:
    model = make(PYTHON["branch on the batch"][0])
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small, X, X3)
    assert forms_in(small) == 2


def test_conv_called_through_forward_is_left_alone_with_a_reason() -> None:
    model = make(Case(CalledThroughForward))
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    records = {record.name: record for record in number_convs(small, X)}
    assert records["conv"].status == "compressed"
    assert records["last"].status == "unsupported"
    assert records["last"].reason
    assert_behaves_as(model, small, X, X3)


def test_forward_patched_with_a_closure_over_the_original_runs_the_copy() -> None:
    """A plain deepcopy would go on calling the modules of the user's object."""
    model = patched()
    small, _ = quietly(compress, model, X, layers=[1], size=2)
    assert forms_in(small) == 1
    assert not torch.allclose(small(X), model(X), atol=1e-3)
    assert torch.allclose(small(X), fold(small)(X), atol=1e-5)


def test_conv_held_in_a_plain_list_of_a_python_model_is_exchanged_there_too() -> None:
    model = make(Case(lambda: PlainList(branches=True)))
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert small.steps[0] is small.conv
    assert isinstance(small.steps[0], BasisConv2d)
    assert_behaves_as(model, small, X, X3)
    assert fold(small).steps[2].weight.shape == model.last.weight.shape


def test_conv_called_from_outside_of_the_model_is_refused() -> None:
    """A copy cannot reach it: the form would never run, and nothing would tell."""
    outside: list[nn.Module] = []

    class Borrows(Base):
        def forward(self, x: Tensor) -> Tensor:
            return outside[0](x) if x.shape[0] < 3 else self.conv(x)

    model = Borrows()
    outside.append(model.conv)
    with pytest.raises(FxBasisError, match=r".+; .+"):
        quietly(compress, model, X, layers=[1], size=2)


def test_names_basis_and_composition_are_no_form_of_ours() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.basis = nn.Conv2d(3, 4, 3)
            self.composition = nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.composition(F.relu(self.basis(x)))

    model = nn.Sequential(Own(), nn.Conv2d(8, 16, 3))
    small, _ = quietly(compress, model, X, layers=[3], size=16)
    assert [record.name for record in number_convs(small)] == ["0.basis", "0.composition", "1"]
    assert list(fold(small).state_dict()) == list(model.state_dict())
    assert_behaves_as(model, small, X)
    assert_behaves_as(model, fold(small), X)


class TwoWays(Plain):
    classes = 6

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    @property
    def first(self) -> nn.Module:
        return self.conv

    @staticmethod
    def twice(x: Tensor) -> Tensor:
        return x * 2

    @classmethod
    def named(cls) -> str:
        return cls.__name__


def test_second_entry_point_still_works_on_the_rewritten_layers() -> None:
    model = make(Case(TwoWays)).eval()
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    for one in (small, copy.deepcopy(small), fold(small)):
        assert isinstance(one, fx.GraphModule)
        assert_same(model.features(X), one.features(X))
        assert one.first is one.conv
        assert (one.classes, one.twice(3), one.named()) == (6, 6, "TwoWays")
    with torch.no_grad():
        small.conv.composition.weight.zero_()
    assert not torch.equal(model.features(X), small.features(X))


@pytest.mark.parametrize("name", ["nothing", "_nothing"])
def test_missing_attributes_are_still_missing(name: str) -> None:
    traced = trace(make(GRAPHS["sequential"]), X)
    with pytest.raises(AttributeError, match=name):
        getattr(traced, name)


def test_a_traced_sequential_is_read_and_never_grown_in_silence() -> None:
    traced = trace(make(GRAPHS["sequential"]), X)
    assert len(traced) == 3
    assert traced[-1] is traced.get_submodule("2")
    traced[1] = nn.Identity()
    assert torch.equal(traced(X), traced[2](traced[0](X)))
    with pytest.raises(UsageError, match=r"append: a traced Sequential is fixed; change the model"):
        traced.append(nn.ReLU())
    with pytest.raises(UsageError, match="fixed; change the model"):
        del traced[0]


def test_plain_attributes_survive() -> None:
    model = Plain()
    model.classes = ["cat", "dog"]
    model.conv.note = "stem"
    traced = trace(model, X)
    assert (traced.classes, traced.conv.note, type(traced).__name__) == (["cat", "dog"], "stem", "Plain")


@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_own_grad_context_does_not_matter(under: Any) -> None:
    model = make(Case(Plain))
    with under():
        traced, messages = quietly(trace, model, X)
    assert messages == []
    assert_behaves_as(model, traced, X)


@pytest.mark.parametrize("key", ["no_grad", "enable_grad", "autocast", "autocast switched off"])
@pytest.mark.parametrize("under", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_contexts_of_the_model_are_seen_inside_the_same_context(under: Any, key: str) -> None:
    with under(), pytest.warns(FxBasisWarning, match="stays Python.*it opens a context"):
        trace(make(PYTHON[key][0]))


def test_autocast_around_the_traced_model_acts_as_around_the_model() -> None:
    model = make(PYTHON["autocast switched off"][0]).eval()
    traced, _ = quietly(trace, model, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model(X), traced(X))


def test_model_that_computes_in_bfloat16_inside_can_be_compressed() -> None:
    """Its convolution runs in bfloat16, so that is the tolerance, though the output is float32."""
    model = make(PYTHON["autocast"][0]).eval()
    expected = model(X)
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    for one in (small, fold(small)):
        assert (one(X) - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_random_layer_drop_is_never_baked_in() -> None:
    """Tracing and proof may meet any draw: whichever it is, the copy must go on drawing."""
    model = PythonLayerDrop().train()
    for seed in range(8):
        random.seed(seed)
        traced, _ = quietly(trace, model, X)
        assert len({round(float(traced(X).detach().abs().sum()), 2) for _ in range(20)}) == 2
