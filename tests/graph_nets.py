"""Small nets that come out of a tracer as one graph, which must behave as they do."""

from collections import OrderedDict, namedtuple
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Base(nn.Module):
    """Two convolutions for the nets below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


class DropoutModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.body(x)))


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training)


class DropoutInPart(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head = FunctionalDropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.head(self.body(x))))


class Depth(Base):
    def __init__(self) -> None:
        super().__init__()
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.last(y + self.depth(y))


class RandomPart(nn.Module):
    """timm's way: a random mask, made only in train()."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)


class DropPath(Depth):
    def __init__(self) -> None:
        super().__init__()
        self.depth = RandomPart()


class DictOutput(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"features": y, "out": self.last(y)}


class OrderedOutput(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return OrderedDict(features=y, out=self.last(y))


class NamedOutput(Base):
    def forward(self, x: Tensor) -> Pair:
        y = self.body(x)
        return Pair(y, self.last(y))


class ListOutput(Base):
    def forward(self, x: Tensor) -> list[Any]:
        y = self.body(x)
        return [y, (self.last(y), None, 3)]


class OptionalMask(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
        y = self.last(self.body(x))
        y = y if mask is None else y * mask
        return y * 2 if double else y


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += 1
        y.mul_(2).relu_()
        return self.last(F.relu(y, inplace=True))


class ChangesInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x.sub_(0.3)))


class OwnTrain(Base):
    """Keeps its BatchNorm frozen in train()."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.bn.eval()
        return self


class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.Conv2d(3, 4, 3), "2 x": nn.Conv2d(4, 4, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["2 x"](self.parts["a-b"](x))


class RootTensors(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.last(self.body(x)), self.kernel, self.shift)


class PlainList(Base):
    """Calls its convolutions through a list, where nn.Module does not see them."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.steps = [self.conv, self.bn, self.last]
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.shape[0] > 2:
            x = x * 2
        for step in self.steps:
            x = step(x)
        return x


class Constants(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body((x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) * torch.ones(1)))


class Script(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(self.last(self.body(x)))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Conv2d(3, 4, 3)
        self.register_buffer("table", torch.arange(4.0))
        self.part = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(2, 2))
        self.part.register_buffer("seen", torch.zeros(2))
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.empty = nn.Module()
        self.none = None

    def forward(self, x: Tensor) -> Tensor:
        return self.part[0](x)


def hooked_conv() -> nn.Module:
    model = Plain()
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    model.last.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def hooked_parent() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Plain0(), nn.Conv2d(6, 2, 1))
    model[1].register_forward_hook(lambda module, args, output: output * 3)
    return model


def hooked_root() -> nn.Module:
    model = Plain()
    model.register_forward_hook(lambda module, args, output: output * 3)
    return model


class Plain0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


Case = namedtuple("Case", "make convs", defaults=(2,))
GRAPHS: dict[str, Case] = {
    "plain": Case(Plain),
    "nn.Dropout": Case(DropoutModule),
    "functional dropout in a part": Case(DropoutInPart),
    "stochastic depth": Case(Depth),
    "drop path": Case(DropPath),
    "dict output": Case(DictOutput),
    "NamedTuple output": Case(NamedOutput),
    "OrderedDict output": Case(OrderedOutput),
    "own train()": Case(OwnTrain),
    "list output": Case(ListOutput),
    "optional arguments": Case(OptionalMask),
    "in-place operations": Case(InPlace),
    "tensor constants": Case(Constants),
    "ScriptModule inside": Case(Script),
    "changes its input": Case(ChangesInput),
    "odd names": Case(OddNames),
    "parameter and buffer of the root": Case(RootTensors),
    "plain list": Case(PlainList),
    "unused parts": Case(Unused, 1),
    "hook on a conv": Case(hooked_conv),
    "hook on a parent": Case(hooked_parent, 3),
    "hook on the model": Case(hooked_root),
    "sequential": Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))),
}


def make(case: Case) -> nn.Module:
    """The net with BatchNorm statistics that matter."""
    model = case.make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model
