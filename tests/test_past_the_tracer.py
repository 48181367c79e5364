"""What forward does past a tracer: the copy must do it too, after training and on other inputs."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from behaviour import X, assert_same
from hard_modules import Base
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fxbasis import compress, parts_of, trace

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")

Use = Callable[[Any], Any]
CASES: dict[str, tuple[type[nn.Module], Any, Use]] = {}
ODD = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))


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


def changed_input(model: Any) -> Tensor:
    given = X.clone()
    model(given)
    return given


@case(X.half(), changed_input)
class NormalisesInPlace(Base):
    def forward(self, x: Tensor) -> Any:
        x = x.float()
        x -= 0.5
        return self.out(x)


@case((X * 64).to(torch.uint8), lambda model: model(X))
class AsksWhetherItConverted(Base):
    def forward(self, image: Tensor) -> Any:
        x = image.float()
        return self.out(x if x is image else x / 255)


@case(X, lambda model: model(nn.Parameter(X)))
class AsksForAParameter(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if type(x) is nn.Parameter else 1)


@case(X, lambda model: model(torch.randn(1, 3, 72, 72, generator=torch.Generator().manual_seed(1))))
class AsksForTheClassOfASize(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        return F.max_pool2d(y, 2) if isinstance(y.shape[-1], int) and y.shape[-1] > 64 else y


@case((X, [X + 1]), lambda model: model(X, [X]))
class AsksForANestedOne(Base):
    def forward(self, x: Tensor, more: list[Tensor]) -> Any:
        return self.out(x) * (2 if more[0] is x else 1)


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


@case((X, scaled(2.0)), lambda model: model(X, scaled(3.0)))
class CallsWhatItIsGiven(Base):
    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
        return function(self.out(x))


class Slots:
    __slots__ = ("mask",)

    def __init__(self, mask: Any) -> None:
        self.mask = mask


@case((X, Slots(1)), lambda model: model(X, Slots(None)))
class AsksForASlot(Base):
    def forward(self, x: Tensor, more: Slots) -> Any:
        return self.out(x) * (2 if more.mask is None else 1)


class Lazy:
    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def mask(self) -> int | None:
        return self.number if self.number > 0 else None


@case((X, Lazy(1)), lambda model: model(X, Lazy(-1)))
class AsksForAProperty(AsksForASlot):
    pass


@case(X, lambda model: model(model.proto))
class AsksForItsBuffer(Base):
    def prepare(self) -> None:
        self.register_buffer("proto", torch.ones(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if x is self.proto else 1)


@case((X, nn.Conv2d(1, 1, 1)), lambda model: model(X, model.last))
class AsksForItsPart(Base):
    def forward(self, x: Tensor, head: nn.Module) -> Any:
        return self.out(x) * (2 if self.last is head else 1)


def deep(value: Any) -> Any:
    for _ in range(6):
        value = SimpleNamespace(a=value)
    return value


@case((X, deep(1)), lambda model: model(X, deep(None)))
class AsksDeepInside(Base):
    def forward(self, x: Tensor, more: Any) -> Any:
        return self.out(x) * (2 if more.a.a.a.a.a.a is None else 1)


@case(X, lambda model: model(ODD))
class CatchesOddSizes(Base):
    def prepare(self) -> None:
        self.down, self.up = nn.Conv2d(8, 8, 3, 2, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.up(self.down(y))
        try:
            z = z + y
        except RuntimeError:
            z = F.interpolate(z, y.shape[-2:]) + y
        return self.last(z)


def inferred(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(X).clone()


@case(X, inferred)
class AsksForInference(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if torch.is_inference_mode_enabled() else 1)


def in_half(model: Any) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        return model(X)


@case(X, in_half)
class AsksForTheAutocastDtype(Base):
    def forward(self, x: Tensor) -> Any:
        return x.to(torch.get_autocast_dtype("cpu"))


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


@pytest.mark.parametrize("name", CASES)
def test_the_copy_does_what_the_model_does(name: str) -> None:
    kind, example, use = CASES[name]
    torch.manual_seed(0)
    model = kind().eval()
    copies = [trace(model, example), compress(model, example, layers="re:conv", size=1.0)]
    expected = use(model)
    for copied in copies:
        assert_same(expected, use(copied))


def test_steps_in_place_are_steps_of_the_graph() -> None:
    traced = trace(ZeroInitResidual().eval(), X)
    assert parts_of(traced)[0].graph
    assert "iadd" in str(traced.graph)


def test_parameters_get_their_values_back_after_the_proof() -> None:
    model = LayerScale().eval()
    nn.init.zeros_(model.last.bias)
    traced = trace(model, X)
    assert all(map(torch.equal, model.parameters(), traced.parameters()))


class ModeInAProduct(Base):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.out(x), 0.3 * self.training)


class ModeAsText(Base):
    def prepare(self) -> None:
        self.scales = {"True": 1.0, "False": 2.0}

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.scales[f"{self.training}"]


class ModeAsABool(Base):
    def forward(self, x: Tensor) -> Any:
        assert isinstance(self.training, bool)
        return self.out(x)


@pytest.mark.parametrize(
    ("kind", "reason"), [(ModeInAProduct, "train()"), (ModeAsText, "train()"), (ModeAsABool, "")]
)
def test_a_mode_is_used_as_a_bool(kind: type[nn.Module], reason: str) -> None:
    part = parts_of(trace(kind().eval(), X))[0]
    assert part.graph
    assert part.reason.startswith(reason)


class GrowsItsDefault(Base):
    def forward(self, x: Tensor, seen: list[int] = []) -> Any:  # noqa: B006
        seen.append(1)
        return self.out(x) * len(seen)


def test_a_default_that_may_change_is_named() -> None:
    assert (
        "the default of its argument seen is a list" in parts_of(trace(GrowsItsDefault().eval(), X))[0].reason
    )
