"""Modules that do something past a tracer with their parameters, parts and state, and what is then done."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from behaviour import X
from hard_modules import Base
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Use = Callable[[Any], Any]
CASES: dict[str, tuple[type[nn.Module], Any, Use]] = {}


def case(example: Any, use: Use) -> Any:
    """Into the table: the example on which a copy is made, and what is done with model and copy."""

    def kept(kind: type[nn.Module]) -> type[nn.Module]:
        CASES[kind.__name__] = (kind, example, use)
        return kind

    return kept


def trained(*names: str) -> Use:
    """The output after parameters have got other values, as by training."""

    def use(model: Any) -> Any:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in names:
                    parameter.fill_(0.1)
        return model(X)

    return use


class InPlaceResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        x += self.bn(self.conv(x))
        return F.relu(x)


@case(X, trained("block.bn.weight"))
class ZeroInitResidual(Base):
    def prepare(self) -> None:
        self.block = InPlaceResidual()

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.last(self.block(y)) + self.last(y)


@case(X, trained("gamma"))
class LayerScale(Base):
    def prepare(self) -> None:
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Any:
        y = z = self.conv(x)
        z += self.gamma * F.relu(y)
        return self.last(y + z)


@case(X, trained("last.weight"))
class ZeroLast(Base):
    """Asks for the class of what a convolution gives; all that comes out is zero at first."""

    def prepare(self) -> None:
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.last(F.relu(y) if isinstance(y, Tensor) else y)


@case(X, trained("gate"))
class SwitchesDilation(Base):
    def prepare(self) -> None:
        self.gate, self.mid = nn.Parameter(torch.zeros(1)), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z, kept = self.mid(y), (self.mid.dilation, self.mid.padding)
        self.mid.dilation = self.mid.padding = (2, 2)
        z = z + self.gate * self.mid(y)
        self.mid.dilation, self.mid.padding = kept
        return self.last(z)


@case(X, trained("gate"))
class HooksForACall(Base):
    def prepare(self) -> None:
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        hook = self.last.register_forward_hook(lambda module, given, output, gate=self.gate: output + gate)
        try:
            return self.out(x)
        finally:
            hook.remove()


@case(X, trained("net.0.weight"))
class AveragedWeights(Base):
    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.average = {name: value.detach().clone() for name, value in self.net.named_parameters()}

    def forward(self, x: Tensor) -> Any:
        return self.net(x) if self.training else functional_call(self.net, self.average, (x,))


@case(X, trained("net.weight"))
class SwapsParameters(Base):
    def prepare(self) -> None:
        self.net = nn.Conv2d(3, 4, 1)
        self.average = copy.deepcopy(self.net)

    def forward(self, x: Tensor) -> Any:
        kept = dict(self.net._parameters)
        self.net._parameters.update(self.average._parameters)
        y = self.net(x)
        self.net._parameters.update(kept)
        return y


@case(X, lambda model: (model.train()(X, 0.5), model(X))[1])
class SetsDropout(Base):
    def prepare(self) -> None:
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, p: float = 0.0) -> Any:
        self.drop.p = p
        return self.last(self.drop(self.conv(x)))


@case(X, lambda model: (model.step(X), model(X), model.step(X))[2])
class ResetsItsState(Base):
    def prepare(self) -> None:
        self.state: Any = None

    def step(self, x: Tensor) -> Any:
        y = self.conv(x) + (0 if self.state is None else self.state)
        self.state = y.detach()
        return self.last(y)

    def forward(self, x: Tensor) -> Any:
        self.state = None
        return self.out(x)


def gradient_of_two(model: Any) -> Tensor:
    for _ in range(2):
        model(X).sum().backward()
    return model.last.weight.grad


@case(X, gradient_of_two)
class ClearsItsGradients(Base):
    def forward(self, x: Tensor) -> Any:
        self.zero_grad()
        return self.out(x)


@case(X, gradient_of_two)
class HooksItsParameters(Base):
    def forward(self, x: Tensor) -> Any:
        for parameter in self.last.parameters():
            parameter.register_hook(lambda gradient: gradient * 0.5)
        return self.out(x)


@case(
    X, lambda model: (model.conv.requires_grad_(True), model(X).sum().backward(), model.conv.weight.grad)[2]
)
class FreezesAgain(Base):
    def prepare(self) -> None:
        self.conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        self.conv.requires_grad_(False)
        return self.out(x)


@case(X, lambda model: model.double()(X))
class AsksForTheTypeOfParameters(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x.type(next(self.parameters()).type()))


@case(X, lambda model: (model.weights[0].data.fill_(3.0), model(X))[1])
class TensorInAList(Base):
    def prepare(self) -> None:
        self.weights = [torch.ones(6, 1, 1, requires_grad=True)]

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.weights[0]


@case(X, lambda model: model(X))
class GradientsInForward(Base):
    """Normals of a surface: its forward works without gradients of the caller's own."""

    def forward(self, x: Tensor) -> Any:
        x = x.detach().requires_grad_()
        y = self.out(x)
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


@case(X, lambda model: (model.eval()(X), model.sm.zero_(), model(X))[2])
class ScriptedPart(Base):
    def prepare(self) -> None:
        self.sm = torch.jit.script(Scripted())

    def forward(self, x: Tensor) -> Any:
        return self.last(self.sm(self.conv(x)))


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) * self.weight

    @torch.jit.export
    def zero_(self) -> None:
        with torch.no_grad():
            self.weight.zero_()
