"""Modules made to break a tracer, of which a graph would be wrong: they must stay Python."""

import collections
import contextlib
from typing import Any, ClassVar

import numpy as np
import torch
from hard_modules import Base, hard
from torch import Tensor, nn
from torch.nn import functional as F

PYTHON: set[str] = set()


def python(make: Any) -> Any:
    """Into the table; a graph would be wrong."""
    PYTHON.add(make.__name__)
    return hard(make)


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


@python
class ParameterBranch(Base):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.tensor(-0.1))

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if self.gate > 0 else 1)


@python
class ReturnsItsPenalty(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x), sum(parameter.square().sum() for parameter in self.parameters())


@python
class ScalesByItsBuffers(Base):
    def prepare(self) -> None:
        self.register_buffer("scale", torch.rand(6, 1, 1))

    def forward(self, x: Tensor) -> Any:
        held = [buffer.mean() for buffer in self.buffers() if buffer.is_floating_point()]
        return self.out(x) * torch.stack(held).sum()


@python
class MakesAModule(Base):
    def forward(self, x: Tensor) -> Any:
        return nn.Conv2d(6, 2, 1)(self.out(x))


@python
class InferenceMode(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.inference_mode():
            y = self.conv(x)
        return self.last(y.clone())


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
