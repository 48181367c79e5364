"""Modules made to break a tracer: each must come out the same, as a graph or as Python, untouched."""

import collections
import contextlib
import copy
import functools
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint_sequential

from fxbasis import UsageError, compress, fold, load, parts_of, profile, save, trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X3 = torch.randn(3, 3, 10, 6, generator=torch.Generator().manual_seed(2))
X1 = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
TABLE: dict[str, Callable[[], nn.Module]] = {}
PYTHON: set[str] = set()


def hard(make: Any) -> Any:
    """Into the table; what is right without being a graph too."""
    TABLE[make.__name__] = make
    return make


def python(make: Any) -> Any:
    """Into the table; a graph would be wrong."""
    PYTHON.add(make.__name__)
    return hard(make)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.prepare()

    def prepare(self) -> None:
        pass

    def out(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.conv(x))))

    def forward(self, x: Tensor) -> Any:
        return self.out(x)


@python
class RemembersItsState(Base):
    def prepare(self) -> None:
        self.hidden = None

    def forward(self, x: Tensor) -> Any:
        mean = self.out(x).mean()
        self.hidden = mean if self.hidden is None else 0.9 * self.hidden.detach() + mean
        return self.out(x) * self.hidden


@python
class CountsItsCalls(Base):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.out(x) * self.calls


@python
class NestedStatistics(Base):
    def prepare(self) -> None:
        self.stats = {"a": {"n": 0}}

    def forward(self, x: Tensor) -> Any:
        self.stats["a"]["n"] += 1
        return self.out(x)


@python
class Deque(Base):
    def prepare(self) -> None:
        self.log = collections.deque(maxlen=3)

    def forward(self, x: Tensor) -> Any:
        self.log.append(1)
        return self.out(x)


@python
class CountsInItsClass(Base):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        CountsInItsClass.calls += 1
        return self.out(x)


@python
class OwnTorchGenerator(Base):
    def prepare(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Any:
        return self.out(x) + torch.randn(6, 1, 1, generator=self.generator)


@hard
class OwnRandomInTrain(Base):
    def prepare(self) -> None:
        self.random = random.Random(1)

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (self.random.random() if self.training else 1)


@hard
class TrainsWithGradients(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if self.training and torch.is_grad_enabled() else 1)


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(x, 0.5, self.training)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(6, 6, 1), FunctionalDropout()

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.conv(x))


@hard
class DropoutBelowAnAuxiliaryHead(Base):
    def prepare(self) -> None:
        self.drop, self.aux = Wrapped(), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.out(x))
        return (y, self.aux(y)) if self.training else y


@python
class ReadsTheModeOfAPart(Base):
    def prepare(self) -> None:
        self.head = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.out(x), 0.5, self.head.training)


@python
class LooksUpInASet(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if x.shape[-1] in {16, 32} else 1)


@python
class LooksUpInADict(Base):
    def prepare(self) -> None:
        self.table = {16: 2.0}

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.table.get(x.shape[-1], 1.0)


@hard
class TellsTheShape(Base):
    """As the patches of torchvision's and timm's vision transformers do: one graph."""

    def forward(self, x: Tensor) -> Any:
        torch._assert(x.shape[1] == 3, f"{x.shape[1]} channels, not {3}")
        return self.out(x)


@python
class TellsAndLooksUp(Base):
    def forward(self, x: Tensor) -> Any:
        torch._assert(x.shape[1] == 3, f"{x.shape[1]} channels")
        return self.out(x) if f"{x.shape[-1]}" == "8" else -self.out(x)


@python
class ComposesAName(Base):
    def prepare(self) -> None:
        self.head_16 = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Any:
        return getattr(self, f"head_{x.shape[-1]}", nn.Identity())(self.out(x))


@python
class CatchesTheBranch(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        with contextlib.suppress(Exception):
            if x.shape[-1] == 16:
                y = y * 2
        return y


@python
class CatchesTheNumber(Base):
    def forward(self, x: Tensor) -> Any:
        try:
            count = int(x.shape[0])
        except TypeError:
            count = 2
        return self.out(x) * (1 if count > 1 else 3)


@python
class CatchesTheArray(Base):
    def forward(self, x: Tensor) -> Any:
        try:
            return self.out(x) * np.asarray(x.detach()).mean()
        except Exception:
            return self.out(x)


@python
class SeedsItself(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            noise = torch.randn_like(x)
        return self.out(x + noise)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@python
class StraightThrough(Base):
    def forward(self, x: Tensor) -> Any:
        return Rounded.apply(self.out(x) * 3)


@python
class AccumulatesInAConstant(Base):
    def forward(self, x: Tensor) -> Any:
        total = torch.zeros(6, 1, 1)
        y = self.out(x)
        total.add_(y.mean())
        return y * total


@python
class PlainTensorInPlace(Base):
    def prepare(self) -> None:
        self.total = [torch.zeros(1)]

    def forward(self, x: Tensor) -> Any:
        self.total[0].add_(1.0)
        return self.out(x) * self.total[0]


@python
class BufferThroughAList(Base):
    def prepare(self) -> None:
        self.register_buffer("scale", torch.ones(1))
        self.held = [self.scale]

    def forward(self, x: Tensor) -> Any:
        self.held[0].mul_(1.1)
        return self.out(x) * self.scale


@python
class BufferMadeAtTheFirstCall(Base):
    def prepare(self) -> None:
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        if self.shift is None:
            self.shift = y.detach().mean()
        return y - self.shift


@hard
class AverageInPlace(Base):
    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
        return y - self.mean[:, None, None]


@hard
class BufferItem(Base):
    def prepare(self) -> None:
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.scale.item()


@python
class ParameterBranch(Base):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.tensor(-0.1))

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if self.gate > 0 else 1)


@hard
class Recursion(Base):
    def prepare(self) -> None:
        self.again = nn.Conv2d(6, 6, 1)

    def repeat(self, x, times):
        return x if times == 0 else self.repeat(self.again(x), times - 1)

    def forward(self, x: Tensor) -> Any:
        return self.repeat(self.out(x), 3)


@hard
class ReturnsItsInput(Base):
    def forward(self, x: Tensor) -> Any:
        return x, self.out(x), x.shape, None


@hard
class UnpacksTheShape(Base):
    def forward(self, x: Tensor) -> Any:
        batch, _, height, width = x.shape
        return self.out(x).reshape(batch, 6, height * width).transpose(1, 2)


@hard
class PadsToAMultiple(Base):
    def forward(self, x: Tensor) -> Any:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, (4 - width % 4) % 4, 0, (4 - height % 4) % 4))
        return self.out(padded)[..., :height, :width]


@hard
class RecurrentCell(Base):
    def prepare(self) -> None:
        self.cell = nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Any:
        y = self.out(x).flatten(2).mean(2)
        state = torch.zeros_like(y)
        for _ in range(3):
            state = self.cell(y, state)
        return state


@hard
class ListsOfParameters(Base):
    def prepare(self) -> None:
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(6, 1, 1)) for _ in range(2)])

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.scales[0] + self.scales[1]


@python
class MakesAModule(Base):
    def forward(self, x: Tensor) -> Any:
        return nn.Conv2d(6, 2, 1)(self.out(x))


@hard
class CheckpointedSequence(Base):
    def prepare(self) -> None:
        self.tail = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return checkpoint_sequential(self.tail, 2, self.out(x), use_reentrant=False)


@python
class InferenceMode(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.inference_mode():
            y = self.conv(x)
        return self.last(y.clone())


@hard
class KnowsItsParent(Base):
    def prepare(self) -> None:
        self.child, self.scale = nn.Conv2d(6, 6, 1), nn.Parameter(torch.rand(1))
        self.child.parent = [self]

    def forward(self, x: Tensor) -> Any:
        return self.child(self.out(x)) * self.child.parent[0].scale


@hard
class PartialOfItself(Base):
    def prepare(self) -> None:
        self.step, self.bound = functools.partial(Base.out, self), self.out

    def forward(self, x: Tensor) -> Any:
        return self.step(x) + self.bound(x)


@hard
class PartialMethod(Base):
    def scaled(self, x, scale):
        return self.out(x) * scale

    forward = functools.partialmethod(scaled, scale=3.0)


@hard
class HookedGradient(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        if torch.is_grad_enabled():
            y.register_hook(lambda gradient: gradient * 2)
        return y


@hard
def hooks_with_keywords() -> nn.Module:
    model = Base()
    model.conv.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True, always_call=True)
    model.bn.register_forward_pre_hook(lambda m, a, k: ((a[0] + 1,), k), with_kwargs=True)
    model.bn.register_full_backward_pre_hook(lambda m, out: tuple(g * 3 for g in out))
    return model


@hard
def jit_traced_part() -> nn.Module:
    return nn.Sequential(Base(), torch.jit.trace(nn.Conv2d(6, 6, 1), torch.rand(1, 6, 4, 4)))


@hard
def odd_names() -> nn.Module:
    names = ("größe", "class", "input", "self", "return", "getitem", "a b", "weight")
    return nn.Sequential(collections.OrderedDict((name, nn.Conv2d(3, 3, 1)) for name in names))


@hard
def very_deep() -> nn.Module:
    model = nn.Conv2d(3, 3, 1)
    for _ in range(30):
        model = nn.Sequential(model)
    return nn.Sequential(model, nn.Conv2d(3, 4, 3))


REGISTER = {}


class Registered(Base):
    def __init_subclass__(cls, *, tag, **kwargs):
        REGISTER[cls.__name__] = cls


@hard
class RegistersSubclasses(Registered, tag="a"):
    pass


class Meta(type):
    made: ClassVar[list[str]] = []

    def __new__(cls, name, bases, body):
        Meta.made.append(name)
        return super().__new__(cls, name, bases, body)


@python
class OwnMetaclass(Base, metaclass=Meta):
    pass


@python
class OwnCall(Base):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


@hard
class LengthAndTruth(Base):
    def __bool__(self):
        return False

    def __len__(self):
        return 0


@hard
class Experts(Base):
    def prepare(self) -> None:
        self.experts = nn.ModuleList([nn.Conv2d(6, 4, 1) for _ in range(3)])
        self.gate = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        weights = self.gate(y.mean((2, 3))).softmax(1)
        return sum(part(y) * weights[:, i, None, None, None].mean() for i, part in enumerate(self.experts))


def seed_all() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def made(key: str) -> nn.Module:
    seed_all()
    model = TABLE[key]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return model


def assert_same(expected: Any, found: Any, tolerance: float) -> None:
    assert type(expected) is type(found)
    for one, other in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if isinstance(one, Tensor):
            assert (one.shape, one.dtype, one.requires_grad) == (
                other.shape,
                other.dtype,
                other.requires_grad,
            )
            assert (one - other).abs().max() <= tolerance * one.abs().max()
        else:
            assert one == other


def assert_behaves_as(model: nn.Module, other: nn.Module, tolerance: float = 1e-5, part: str = "") -> None:
    """Both modes in turn, with and without gradients, other sizes; one part in the other mode if named."""
    model, other = copy.deepcopy(model), copy.deepcopy(other)
    for training in (False, True, False):
        for one in (model, other):
            one.train(training)
            one.get_submodule(part).train(training is (part == ""))
        for gradients, x in ((True, X), (False, X3), (True, X1)):
            outputs = []
            for one in (model, other):
                seed_all()
                with torch.set_grad_enabled(gradients):
                    outputs.append(one(x.clone()))
            assert_same(*outputs, tolerance)
    own = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer, own[name], rtol=1e-4)


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


@pytest.mark.parametrize("key", [key for key in TABLE if key not in ("jit_traced_part", "MakesAModule")])
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
