"""What Python asks by ``is`` and ``isinstance`` of values that a graph does not know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from behaviour import X
from hard_modules import Base, assert_same
from torch import Tensor, nn

from fxbasis import compress, parts_of
from fxbasis.passes.codes import compares_results

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")

DARK = -X.abs()
BRIGHT = X.abs()


class Gate(nn.Module):
    """Stays Python: what it gives back depends on the values."""

    def __init__(self, otherwise: Callable[[Tensor], Any], when_dark: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.otherwise, self.when_dark = otherwise, when_dark

    def forward(self, x: Tensor) -> Any:
        return self.when_dark(x) if x.mean() < 0 else self.otherwise(x)


class AsksItsPart(Base):
    def prepare(self) -> None:
        self.gate, self.asks, self.extra = nn.Identity(), bool, None

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * 2 if self.asks(self, x) else self.out(x)


def stored(model: Any, x: Tensor) -> bool:
    found = model.gate(x)
    return found is None


def unpacked(model: Any, x: Tensor) -> bool:
    _, extra = model.gate(x)
    return extra is None


def through_a_sequential(model: Any, x: Tensor) -> bool:
    found = nn.Sequential.forward(model.gate, x)
    return found is not None


QUESTIONS: dict[str, tuple[Callable[[Any, Tensor], bool], nn.Module]] = {
    "None at once": (lambda model, x: model.gate(x) is None, Gate(lambda x: x, lambda x: None)),
    "None, stored": (stored, Gate(lambda x: x, lambda x: None)),
    "None, unpacked": (unpacked, Gate(lambda x: (x, x), lambda x: (x, None))),
    "None behind a container": (
        through_a_sequential,
        nn.Sequential(nn.Identity(), Gate(lambda x: None, lambda x: x)),
    ),
    "a flag": (lambda model, x: model.gate(x) is True, Gate(lambda x: False, lambda x: True)),
    "the input itself": (lambda model, x: model.gate(x) is x, Gate(lambda x: x + 1, lambda x: x)),
    "an entry": (lambda model, x: model.gate(x).get("a") is None, Gate(lambda x: {"a": x}, lambda x: {})),
    "a class": (lambda model, x: isinstance(model.gate(x), tuple), Gate(lambda x: x, lambda x: (x, x))),
    "a class of an entry": (
        lambda model, x: isinstance(model.gate(x)["a"], tuple),
        Gate(lambda x: {"a": x}, lambda x: {"a": (x, x)}),
    ),
    "the class by type": (lambda model, x: type(model.gate(x)) is tuple, Gate(lambda x: x, lambda x: (x, x))),
    "a comparison of sizes": (lambda model, x: (x.shape[0] == 1) is True, nn.Identity()),
}


@pytest.mark.parametrize("key", QUESTIONS)
def test_the_answer_is_that_of_each_call(key: str) -> None:
    torch.manual_seed(0)
    model = AsksItsPart().eval()
    model.asks, model.gate = QUESTIONS[key]
    compressed = compress(model, BRIGHT, layers="re:.*", size=1.0)
    for inputs in (BRIGHT, DARK, BRIGHT[:1], DARK[:1]):
        assert_same(compressed(inputs), model(inputs), 1e-5)


class OnlyUsesIt(Base):
    def prepare(self) -> None:
        self.gate, self.extra = Gate(torch.relu, torch.sigmoid), [None, torch.tanh]

    def forward(self, x: Tensor, scale: Any = None) -> Any:
        y = self.gate(x) if scale is None else scale
        for index in range(2):
            if self.extra[index] is not None:
                y = self.extra[index](y)
        return self.out(y)


def test_what_is_no_answer_of_the_part_leaves_the_graph_around_it() -> None:
    torch.manual_seed(0)
    model = OnlyUsesIt().eval()
    compressed = compress(model, BRIGHT, layers="re:.*", size=1.0)
    assert parts_of(compressed)[0].graph
    assert_same(compressed(DARK), model(DARK), 1e-5)


def reassigned(f: Any, x: Any) -> Any:
    if x is None:
        x = f(x)
    return x


def matched(f: Any, x: Any) -> int:
    match f(x):
        case None:
            return 0
    return 1


def looked_up(self: Any, f: Any, x: Any) -> Any:
    drop = None
    kept = self.kept
    for part in self.parts:
        if part is not None and drop is None:
            x = part(x)
    y = f(x)
    return y if kept is None else kept(y)


def looked_up_alone(self: Any, x: Any) -> Any:
    aa = getattr(self, "aa", None)
    for y, part in zip(x, self.parts, strict=True):
        x = part(x) if y is not None else x
    return aa(x) if aa is not None else x


def counted(self: Any, x: Any) -> Any:
    total = None
    for part in self.parts:
        y = part(x)
        total = y if total is None else total + y
    return total


COMPARED: list[tuple[Any, bool]] = [
    (lambda f, x: f(x) is None, True),
    (lambda f, x: f(x).a.b is not None, True),
    (lambda f, x: f(x)[0] is None, True),
    (lambda f, x: x is f(x), True),
    (lambda f, x: (y := f(x)) is None or y, True),
    (lambda f, x: [y for y in (f(x), x) if f(y) is None], True),
    (reassigned, True),
    (matched, True),
    (counted, True),
    (looked_up, False),
    (looked_up_alone, False),
    (lambda f, x: x is None, False),
    (lambda f, x: x.a[0].b is f, False),
    (lambda f, x: f(x) == 1, False),
    (lambda f, x: f(x) if x.norm is not None else x, False),
]


@pytest.mark.parametrize("index", range(len(COMPARED)))
def test_comparisons_of_results_are_told_from_the_bytecode(index: int) -> None:
    function, compares = COMPARED[index]
    assert compares_results(function.__code__) is compares
