"""Uses of a model that a graph or a rewritten layer would answer wrongly without a word."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_hard_modules import Base, X, assert_behaves_as, assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import compress, fold, number_convs, parts_of, profile, trace

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
    small = compress(model, X, layers="all", size=2)
    assert_same(before, list(model.parameters()), 0)
    values = copy.deepcopy(list(small.parameters()))
    profile(fold(small), X)
    number_convs(small, X)
    assert_same(values, list(small.parameters()), 0)
