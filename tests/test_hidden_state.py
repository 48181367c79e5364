"""State of a forward that no attribute shows: in iterators, arrays, slots, classes, functions, generators."""

import collections
import functools
import itertools
import logging
import random
import re
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Callable, Iterator
from enum import Flag
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from behaviour import X
from hard_modules import Base
from torch import Tensor, nn

from fxbasis import compress, parts_of, trace

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")
HERE = sys.modules[__name__]
COUNTS = {"n": 0}
TICKS = itertools.count()
SELDOM = [*[1.0] * 299, 2.0]


def rare(count: float) -> float:
    """1, but for every 300th call."""
    return 1.0 if (count + 1) % 300 else 2.0


def up() -> float:
    COUNTS["n"] += 1
    return rare(COUNTS["n"])


class Scales(Base):
    """By what ``gain`` gives, which is seldom another."""

    gain: Callable[[], Any]

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.gain()


class Slots:
    __slots__ = ("missing", "n")

    def __init__(self) -> None:
        self.n = 0

    def gain(self) -> float:
        self.n += 1
        return rare(self.n)


class Chain:
    """A number deep inside."""

    def __init__(self) -> None:
        self.last: list[Any] = [0]
        self.first = self.last
        for _ in range(30):
            self.first = [self.first]


class HasCount(Scales):
    def prepare(self) -> None:
        self.steps = itertools.count()

    def gain(self) -> Any:
        return rare(next(self.steps))


class HasCycle(Scales):
    def prepare(self) -> None:
        self.ways = itertools.cycle(SELDOM)

    def gain(self) -> Any:
        return next(self.ways)


class HasNestedIterators(Scales):
    def prepare(self) -> None:
        self.ways = enumerate(zip(iter(SELDOM * 5), itertools.repeat(1), strict=False))

    def gain(self) -> Any:
        return next(self.ways)[1][0]


class HasArray(Scales):
    def prepare(self) -> None:
        self.history = np.zeros(1)

    def gain(self) -> Any:
        self.history[0] += 1
        return rare(float(self.history[0]))


class HasBytes(Scales):
    def prepare(self) -> None:
        self.history = bytearray(1)

    def gain(self) -> Any:
        self.history[0] = (self.history[0] + 1) % 250
        return 1.0 if self.history[0] < 249 else 2.0


class HasRandomState(Scales):
    def prepare(self) -> None:
        self.random = np.random.RandomState(0)

    def gain(self) -> Any:
        return 1.0 if self.random.rand() > 0.01 else 2.0


class HasSlots(Scales):
    def prepare(self) -> None:
        self.meter = Slots()

    def gain(self) -> Any:
        return self.meter.gain()


class HasData(Scales):
    def prepare(self) -> None:
        self.count = torch.zeros(1)

    def gain(self) -> Any:
        self.count.data.add_(1)
        return rare(float(self.count))


class HasDepth(Scales):
    def prepare(self) -> None:
        self.chain = Chain()

    def gain(self) -> Any:
        self.chain.last[0] += 1
        return rare(self.chain.last[0])


class HasPartial(Scales):
    def prepare(self) -> None:
        self.step = functools.partial(self._step, collections.Counter())

    @staticmethod
    def _step(count: Any) -> float:
        count["n"] += 1
        return rare(count["n"])

    def gain(self) -> Any:
        return self.step()


class HasHiddenModule(Scales):
    def prepare(self) -> None:
        self.hidden = [nn.Identity()]
        self.hidden[0].n = 0

    def gain(self) -> Any:
        self.hidden[0].n += 1
        return rare(self.hidden[0].n)


class ClassHasObject(Scales):
    meter = types.SimpleNamespace(n=0)

    def gain(self) -> Any:
        self.meter.n += 1
        return rare(self.meter.n)


class ClassHasRandom(Scales):
    random = random.Random(0)

    def gain(self) -> Any:
        return 1.0 if self.random.random() > 0.01 else 2.0


class Warm:
    n = 0


class GlobalClass(Scales):
    def gain(self) -> Any:
        Warm.n += 1
        return rare(Warm.n)


class WarmModule(nn.Module):
    n = 0


class GlobalClassOfModules(Scales):
    def gain(self) -> Any:
        WarmModule.n += 1
        return rare(WarmModule.n)


class OfThisFile(Scales):
    def gain(self) -> Any:
        HERE.steps = getattr(HERE, "steps", 0) + 1
        return rare(HERE.steps)


def counted() -> float:
    counted.n = getattr(counted, "n", 0) + 1
    return rare(counted.n)


class OfAFunction(Scales):
    def gain(self) -> Any:
        return counted()


class GlobalCount(Scales):
    def gain(self) -> Any:
        return rare(next(TICKS))


def endless() -> Iterator[float]:
    for count in itertools.count():
        yield rare(count)


ENDLESS = endless()


class GlobalGenerator(Scales):
    def gain(self) -> Any:
        return next(ENDLESS)


class Default(Scales):
    def gain(self, count: Any = [0]) -> Any:  # noqa: B006
        count[0] += 1
        return rare(count[0])


class Property(Base):
    @property
    def gain(self) -> float:
        return up()

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.gain


class Static(Scales):
    gain = staticmethod(up)


class Class(Scales):
    @classmethod
    def gain(cls) -> Any:
        return up()


class Lambda(Scales):
    def gain(self) -> Any:
        return sum(one() for one in (lambda: up(),))


class Helper:
    def gain(self) -> float:
        return up()


class OfAnObject(Scales):
    def prepare(self) -> None:
        self.helper = Helper()

    def gain(self) -> Any:
        return self.helper.gain()


class InAnObject(Scales):
    def gain(self) -> Any:
        return Helper().gain()


class ImportsInside(Scales):
    def gain(self) -> Any:
        import hidden_counter

        hidden_counter.n += 1
        return rare(hidden_counter.n)


sys.modules["hidden_counter"] = types.ModuleType("hidden_counter")
vars(sys.modules["hidden_counter"])["n"] = 0

KINDS = [kind for kind in Scales.__subclasses__() if kind.__module__ == __name__] + [Property]


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_call_changes_is_changed_at_each_call(kind: Any) -> None:
    COUNTS["n"] = 0
    small = compress(kind().eval(), X, layers="re:.*", size=1.0)
    part = parts_of(small)[0]
    assert not part.graph
    assert re.search("holds or uses|sets the attribute", part.reason)
    with torch.no_grad():
        found = {round(float(small(X)[0, 0, 0, 0] / small.out(X)[0, 0, 0, 0]), 3) for _ in range(300)}
    assert found == {1.0, 2.0}


ENTROPY: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.random.default_rng().random(),
    "legacy numpy": lambda: np.random.RandomState().rand(),
    "Random": lambda: random.Random().random(),
    "SystemRandom": lambda: random.SystemRandom().random(),
    "uuid": lambda: uuid.uuid4().int % 2,
}


class DropsAtRandom(Base):
    draw: Any

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (0.0 if self.training and self.draw() < -1 else 1.0)


@pytest.mark.parametrize("source", ENTROPY)
def test_a_new_generator_without_a_seed_is_seen(source: str) -> None:
    model = DropsAtRandom()
    model.draw = ENTROPY[source]
    part = parts_of(trace(model.eval(), X))[0]
    assert "random numbers" in part.reason


class Hostile:
    """Refuses whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    __eq__ = __iter__ = __len__ = __bool__ = __getattribute__
    __hash__ = object.__hash__

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Lazy:
    """Must not be asked while nobody uses it."""

    @property
    def loaded(self) -> Any:
        raise AssertionError

    def __iter__(self) -> Any:
        raise AssertionError


HOSTILE, LOCK, LOCAL, SYSTEM = Hostile(), threading.Lock(), threading.local(), random.SystemRandom()
LOOP: list[Any] = []
LOOP.append(LOOP)
WEAK: Any = weakref.WeakKeyDictionary({Warm: 1})


class HoldsOddThings(Base):
    """None of which changes."""

    def prepare(self) -> None:
        self.many = [*range(10**5)]
        self.objects = [Lazy(), Slots(), np.array([None]), np.datetime64("2020-01-01"), frozenset({1}), ...]
        self.tensors = [torch.zeros(2, device="meta"), torch.zeros(2).bfloat16(), torch.eye(2).to_sparse()]
        self.iterators = [itertools.cycle([1]), itertools.count(), iter({1: 2}), iter((1, 2))]
        self.nan, self.random = (
            float("nan"),
            [random.Random(1), np.random.RandomState(1)],
        )
        self.queue = collections.OrderedDict(a=collections.defaultdict(list), b=collections.deque([1], 3))

    def used(self) -> Any:
        return LOOP, HOSTILE, LOCK, LOCAL, SYSTEM, WEAK, ENDLESS

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * len(self.used())


def test_odd_objects_that_do_not_change_are_no_obstacle() -> None:
    assert parts_of(trace(HoldsOddThings().eval(), X))[0].graph


class Mode(Flag):
    ONE = 1
    TWO = 2


LOGGER = logging.getLogger(__name__)


class ChangesNothing(Base):
    """Makes its own iterators, arrays and seeded generators, imports, logs, and unites members of an Enum."""

    def forward(self, x: Tensor) -> Any:
        import hidden_and_new

        LOGGER.isEnabledFor(logging.DEBUG)
        drawn = np.random.default_rng(0).random() + random.Random(0).random() + float(np.zeros(1)[0])
        return self.out(x) * (
            next(itertools.count()) + drawn + (Mode.ONE | Mode.TWO).value + hidden_and_new.n
        )


def test_what_is_made_anew_at_each_call_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hidden_and_new.py").write_text("import random\n\nn = 1\nunused = random.Random()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert parts_of(trace(ChangesNothing().eval(), X))[0].graph


class Inner(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * up()


def test_the_module_that_does_it_stays_python_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Inner()).eval()
    parts = {part.name: part.graph for part in parts_of(trace(model, X))}
    assert parts == {"": True, "1": False}
