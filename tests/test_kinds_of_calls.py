"""A graph serves the kinds of calls on which it was proven; for others the model's own Python runs."""

import collections.abc
import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from behaviour import X
from hard_modules import Base, assert_same
from torch import Tensor, nn

from fxbasis import compress, fold, load, parts_of, save, trace

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")

ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


class Pair(NamedTuple):
    image: Tensor
    mask: Any


class Asks(Base):
    """Doubles its output where a question about its arguments is answered with yes."""

    def prepare(self) -> None:
        self.asks = bool

    def forward(self, x: Any, more: Any, last: Any = None) -> Any:
        return self.out(x) * (2 if self.asks(more, last) else 1)


QUESTIONS: dict[str, tuple[Any, Any, Any]] = {
    "class by type": (lambda more, last: type(more) is int, (X, 0.5), (X, 2)),
    "abstract class": (lambda more, last: isinstance(more, collections.abc.Sequence), (X, ONE), (X, [ONE])),
    "the same object": (lambda more, last: more is last, (X, ONE, TWO), (X, ONE, ONE)),
    "a function": (lambda more, last: more is torch.relu, (X, torch.tanh), (X, torch.relu)),
    "two that are None": (lambda more, last: more is None and last is None, (X, ONE, TWO), (X, None, None)),
    "one that was left out": (lambda more, last: last is not None, (X, ONE), (X, ONE, TWO)),
    "a flag": (lambda more, last: more is True, (X, False), (X, True)),
    "an entry": (lambda more, last: more["a"]["b"] is None, (X, {"a": {"b": ONE}}), (X, {"a": {"b": None}})),
    "a field": (lambda more, last: more.mask is None, (X, Pair(X, ONE)), (X, Pair(X, None))),
    "an attribute": (
        lambda more, last: more.mask is None,
        (X, SimpleNamespace(mask=ONE)),
        (X, SimpleNamespace(mask=None)),
    ),
}


def asking(key: str) -> Asks:
    torch.manual_seed(0)
    model = Asks().eval()
    model.asks = QUESTIONS[key][0]
    return model


@pytest.mark.parametrize("key", QUESTIONS)
def test_another_kind_of_call_takes_its_own_way(key: str) -> None:
    _, example, other = QUESTIONS[key]
    model = asking(key)
    small = compress(model, example, layers="re:.*", size=1.0)
    assert parts_of(small)[0].graph
    for made in (small, copy.deepcopy(small), fold(small)):
        for inputs in (example, other, example):
            assert_same(model(*inputs), made(*inputs), 1e-5)


def test_saved_loaded_and_pickled_it_still_does(tmp_path: Path) -> None:
    _, example, other = QUESTIONS["the same object"]
    model = asking("the same object")
    small = compress(model, example, layers="re:.*", size=1.0)
    loaded = load(asking("the same object"), save(small, tmp_path / "small"))
    assert parts_of(loaded) == parts_of(small)
    assert_same(model(*other), loaded(*other), 1e-5)
    again = pickle.loads(pickle.dumps(trace(Chooses().eval(), (X, ONE))))
    assert_same(again(X), again.out(X), 1e-5)


class Chooses(Base):
    def forward(self, x: Tensor, scale: Any = None) -> Any:
        return self.out(x) if scale is None else self.out(x) * scale


def test_what_fx_asserts_of_an_argument_left_out_is_not_in_the_graph() -> None:
    traced = trace(Chooses().eval(), X)
    assert "specialized" not in traced.code
    torch.fx.symbolic_trace(traced)
    assert parts_of(trace(Chooses().eval(), X))[0].graph  # fx can trace on


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        return self.conv(x) if mask is None else self.conv(x) * mask


class Decides(Base):
    def prepare(self) -> None:
        self.part = Part()

    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        return self.part(y, y > 0) if x.mean() < 0 else self.part(y)


def test_a_part_of_a_python_model_that_is_called_in_another_way_later() -> None:
    model, x = Decides().eval(), X.abs()
    small = compress(model, x, layers="re:.*", size=1.0)
    assert [part.name for part in parts_of(small) if part.graph] == ["part"]
    for inputs in (x, -x):
        assert_same(model(inputs), small(inputs), 1e-5)
