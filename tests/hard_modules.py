"""Modules made to break a tracer, right as a graph or as Python; and how it is told that they are."""

import collections
import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from behaviour import X3, X, seed_all
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint_sequential

X1 = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
TABLE: dict[str, Callable[[], nn.Module]] = {}


def hard(make: Any) -> Any:
    """Into the table; what is right without being a graph too."""
    TABLE[make.__name__] = make
    return make


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


@hard
class TellsTheShape(Base):
    """As the patches of torchvision's and timm's vision transformers do: one graph."""

    def forward(self, x: Tensor) -> Any:
        torch._assert(x.shape[1] == 3, f"{x.shape[1]} channels, not {3}")
        return self.out(x)


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


@hard
class CheckpointedSequence(Base):
    def prepare(self) -> None:
        self.tail = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return checkpoint_sequential(self.tail, 2, self.out(x), use_reentrant=False)


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
    model.register_forward_pre_hook(lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True)
    return model


@hard
def jit_traced_part() -> nn.Module:
    return nn.Sequential(Base(), torch.jit.trace(nn.Conv2d(6, 6, 1), torch.rand(1, 6, 4, 4)))


@hard
def frozen_script_part() -> nn.Module:
    part = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()).eval()))
    return nn.Sequential(Base(), part)


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


@hard
def compiled() -> nn.Module:
    return torch.compile(Base(), backend="eager")


@hard
class CompiledPart(Base):
    def prepare(self) -> None:
        self.last = torch.compile(self.last, backend="eager")
        self.tail = torch.compile(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), backend="eager")

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.out(x))


@hard
class CompiledFunction(Base):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Any:
        return self.out(x).mean((2, 3))


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
