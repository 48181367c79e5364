"""Uses of a model that a graph or a rewritten layer would answer wrongly without a word."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch
from behaviour import X
from hard_modules import Base, assert_behaves_as, assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import (
    FxBasisWarning,
    LayerError,
    VerificationError,
    compress,
    fold,
    number_convs,
    parts_of,
    plan_of,
    profile,
    trace,
)
from fxbasis.export.checking import frozen_copy
from fxbasis.passes.selection import select

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")


@dataclass
class Batch:
    image: Tensor
    features: Any = None


class SetsAnAttributeOfItsInput(Base):
    def forward(self, batch: Any) -> Any:
        batch.features = self.conv(batch.image)
        return self.last(F.relu(batch.features))


class AsksForTheGradientOfItsInput(Base):
    def forward(self, x: Tensor) -> Any:
        x.requires_grad = True
        return self.out(x)


class NamesItsOutput(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        y.kind = "logits"
        return y


@pytest.mark.parametrize("inputs", [X, None], ids=["proven", "unproven"])
def test_attributes_that_forward_sets_on_a_value_are_set(inputs: Any) -> None:
    traced = trace(SetsAnAttributeOfItsInput(), None if inputs is None else (Batch(inputs),))
    batch = Batch(X)
    traced(batch)
    assert batch.features.shape == (2, 8, 8, 8)
    x = X.clone()
    trace(AsksForTheGradientOfItsInput(), inputs)(x)
    assert x.requires_grad
    assert trace(NamesItsOutput(), inputs)(X).kind == "logits"


class Gain(Base):
    def prepare(self) -> None:
        self.gain = nn.Parameter(torch.full((6, 1, 1), 3.0))


class SetsTheDataOfAParameter(Gain):
    def forward(self, x: Tensor) -> Any:
        self.gain.data = self.gain.data.clamp(0, 1)
        return self.out(x) * self.gain


class FreezesAParameter(Gain):
    def forward(self, x: Tensor) -> Any:
        self.gain.requires_grad = False
        return self.out(x) * self.gain


class ClampsAParameter(Gain):
    def forward(self, x: Tensor) -> Any:
        self.gain.data.clamp_(0, 1)
        return self.out(x) * self.gain


class ClampsAllParameters(Gain):
    def forward(self, x: Tensor) -> Any:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.1, 0.1)
        return self.out(x) * self.gain


class NormalisesAPart(Base):
    def prepare(self) -> None:
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.head.weight.copy_(F.normalize(self.head.weight, dim=1))
        return self.head(self.out(x).mean((2, 3)))


class ClampsAConvolution(Base):
    def forward(self, x: Tensor) -> Any:
        self.conv.weight.data.clamp_(-0.1, 0.1)
        return self.out(x)


CHANGES_ITS_PARAMETERS: list[Callable[[], nn.Module]] = [
    SetsTheDataOfAParameter,
    FreezesAParameter,
    ClampsAParameter,
    ClampsAllParameters,
    NormalisesAPart,
    ClampsAConvolution,
]


@pytest.mark.parametrize("kind", CHANGES_ITS_PARAMETERS)
def test_a_forward_that_changes_its_parameters_stays_python(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    for traced in (trace(model, X), trace(model)):
        assert_behaves_as(model, traced)
        own, other = copy.deepcopy(model), copy.deepcopy(traced)
        own(X), other(X)
        assert_same(list(own.parameters()), list(other.parameters()), 0)
    assert not parts_of(trace(model, X))[0].graph


@pytest.mark.parametrize("kind", CHANGES_ITS_PARAMETERS)
def test_the_model_keeps_its_parameters_whatever_is_run(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    before = copy.deepcopy(list(model.parameters()))
    number_convs(model, X)
    profile(model, X)
    frozen_copy(model)(X)  # what export_onnx and measure run
    small = compress(model, X, layers="all", size=2)
    assert_same(before, list(model.parameters()), 0)
    values = copy.deepcopy(list(small.parameters()))
    profile(fold(small), X)
    number_convs(small, X)
    assert_same(values, list(small.parameters()), 0)


class AsksForTheClassInTrain(Base):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            x = self.conv(x) * 2 if isinstance(self.conv, nn.Conv2d) else x.repeat(1, 3, 1, 1)[:, :8]
            return self.last(x)
        return self.out(x)


class ClampsInTrain(Base):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.conv.weight.data.clamp_(-0.05, 0.05)
        return self.out(x)


class RegularisesInTrain(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        return (y, self.conv.weight.square().sum()) if self.training else y


@pytest.mark.parametrize("kind", [ClampsInTrain, RegularisesInTrain])
def test_a_weight_that_is_read_in_train_alone_is_left_alone(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    first, second = number_convs(trace(model, X), X)
    assert (first.status, second.status) == ("unsupported", "ok")
    assert "its weight is also read by the forward of" in first.reason
    with pytest.raises(LayerError, match=r"conv 1 \(conv\).*its weight is also read"):
        compress(model, X, layers=1, size=4)
    assert_behaves_as(model, compress(model, X, layers="re:.*", size=1.0))


def test_a_way_that_train_alone_takes_is_proven_too() -> None:
    model = AsksForTheClassInTrain()
    with pytest.warns(FxBasisWarning, match=r"left alone: conv 1 \(conv\).*its class is asked for"):
        small = compress(model, X, layers="re:.*", size=1.0)
    assert [layer.form for layer in plan_of(small)] == ["dense", "output"]
    assert_behaves_as(model, small)
    with pytest.raises(VerificationError, match=r"conv 1 \(conv\).*its class is asked for.*out of layers="):
        compress(model, X, layers=1, size=1.0)
    with pytest.raises(VerificationError, match=r"conv 1 \(conv\).*its class is asked for"):
        compress(model, X, plan=select(number_convs(model, X), size=4))


class AsksInAHook(nn.Sequential):
    """Two layers of three are asked what they are, and only the outputs of the model show it."""

    def __init__(self) -> None:
        super().__init__(*(nn.Conv2d(channels, 16, 3, padding=1) for channels in (3, 16, 16)))
        for conv in (self[0], self[2]):
            conv.register_forward_hook(lambda m, args, y: y * 2 if isinstance(m, nn.Conv2d) else y)


@pytest.mark.parametrize("how", [{"size": 0.4}, {"macs": 0.7}, {"macs": 0.7, "calibration": [X, X]}])
def test_layers_that_cannot_be_proven_are_found_and_left_alone(how: dict[str, Any]) -> None:
    model = AsksInAHook().eval()
    with pytest.warns(FxBasisWarning, match="left alone: [02]: something asks what it is"):
        small = compress(model, X, **how)
    table = number_convs(small, X)
    assert table[1].status == "compressed"
    assert {table[0].status, table[2].status} <= {"unsupported", "ok"}
    assert "something asks what it is" in table[0].reason + table[2].reason
    assert_behaves_as(fold(small), small)
    with pytest.raises(VerificationError, match=r"0: something asks .*; leave it out of layers="):
        compress(model, X, plan=select(number_convs(model, X), size=4))


class Switching(nn.Module):
    """Keeps in an attribute what its train() was told."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.merged = nn.Conv2d(3, 8, 3, padding=1), False

    def train(self, mode: bool = True) -> Any:
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x) if self.merged else self.conv(x) * 3


class SwitchingPart(Base):
    def prepare(self) -> None:
        self.conv = Switching()


class OwnEval(Base):
    mode = "train"

    def eval(self) -> Any:
        self.mode = "eval"
        return super().eval()

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if self.mode == "eval" else 1)


@pytest.mark.parametrize("kind", [Switching, SwitchingPart, OwnEval])
@pytest.mark.parametrize("inputs", [X, None], ids=["proven", "unproven"])
def test_attributes_that_train_sets_are_read_at_each_call(kind: Callable[[], nn.Module], inputs: Any) -> None:
    model = kind()
    traced = trace(model, inputs)
    assert_behaves_as(model, traced)
    assert_behaves_as(model, compress(model, X, layers="re:.*", size=1.0))
    assert_same(copy.deepcopy(model).eval()(X), traced.eval()(X), 1e-5)


class Kind(Enum):
    ONE = 1
    TWO = 2


class AsksForNone(Base):
    def forward(self, x: Tensor, aux: Any = None) -> Any:
        y = self.out(x)
        return y if aux is None else (y, y.mean())


class AsksForFalse(Base):
    def forward(self, x: Tensor, flag: Any) -> Any:
        y = self.out(x)
        return y if flag is False else y * 2


class AsksForAMember(Base):
    def forward(self, x: Tensor, kind: Any) -> Any:
        y = self.out(x)
        return y * 2 if kind is Kind.ONE else y


class AsksForAKeyword(Base):
    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.out(x) * (2 if options.get("mask") is None else 1)


IDENTITY: dict[str, tuple[Callable[[], nn.Module], Any, list[Any]]] = {
    "None": (AsksForNone, (X, X), [(X,), (X, None), (X, X)]),
    "False": (AsksForFalse, (X, True), [(X, True), (X, False)]),
    "member": (AsksForAMember, (X, Kind.TWO), [(X, Kind.TWO), (X, Kind.ONE)]),
    "keyword": (AsksForAKeyword, {"x": X, "mask": X}, [{"x": X, "mask": X}, {"x": X}]),
}


@pytest.mark.parametrize("key", IDENTITY)
def test_what_an_argument_is_may_change_from_call_to_call(key: str) -> None:
    make, example, calls = IDENTITY[key]
    model = make().eval()
    for found in (trace(model, example), compress(model, example, layers="re:.*", size=1.0)):
        for given in calls:
            args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
            assert_same(model(*args, **kwargs), found(*args, **kwargs), 1e-5)


SEEN: list[Any] = []


class WritesIntoAGlobal(Base):
    def forward(self, x: Tensor) -> Any:
        SEEN.append(self.conv(x).detach())
        return self.out(x)


class CallsBack(Base):
    def prepare(self) -> None:
        seen = SEEN
        self.callback = lambda y: seen.append(y.detach())

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        self.callback(y)
        return self.last(F.relu(y))


@pytest.mark.parametrize("kind", [WritesIntoAGlobal, CallsBack])
@pytest.mark.parametrize("inputs", [X, None], ids=["proven", "unproven"])
def test_what_forward_leaves_outside_of_the_model_is_left_there(kind: Any, inputs: Any) -> None:
    model = kind()
    for found in (trace(model, inputs), compress(model, X, layers="re:.*", size=1.0)):
        SEEN.clear()
        found(X)
        assert [value.shape for value in SEEN] == [(2, 8, 8, 8)]


def test_the_table_of_a_model_says_what_that_of_its_trace_says() -> None:
    model = RegularisesInTrain()
    found = [(record.status, record.reason) for record in number_convs(model, X)]
    assert found == [(record.status, record.reason) for record in number_convs(trace(model, X), X)]
    assert found[0][0] == "unsupported"


@pytest.mark.parametrize("form", ["output", "tt"])
def test_weights_below_what_the_dtype_resolves_are_left_alone(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).half().eval()
    model[0].weight.data *= 1e-6
    with pytest.warns(FxBasisWarning, match=r"left alone: conv 1 \(0\).*the folded convolution differs by"):
        small = compress(model, X.half(), form=form, size=0.25)
    assert [layer.form for layer in plan_of(small)] == ["dense", form]
    with pytest.raises(VerificationError, match=r"conv 1 \(0\).*the folded convolution differs by"):
        compress(model, X.half(), form=form, size=0.25, layers=[1])
