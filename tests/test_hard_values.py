"""Values that a graph would keep, share or mistake: constants, classes, entries, globals, wrappers."""

import copy
import pickle
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from behaviour import X, seed_all
from hard_modules import Base, assert_behaves_as, assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import TraceError, compress, doctor, fold, parts_of, profile, trace

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")


class GivesAConstant(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x), torch.zeros(()), torch.ones(3).view(1, 3)


def test_a_constant_that_is_given_away_is_a_new_one_at_each_call() -> None:
    small = compress(GivesAConstant().eval(), X, layers="re:.*", size=1.0)
    assert parts_of(small)[0].graph
    for model in (small, fold(small), copy.deepcopy(small)):
        for _ in range(2):
            _, loss, ones = model(X)
            assert (float(loss), ones.tolist()) == (0.0, [[1.0, 1.0, 1.0]])
            loss += 1
            ones.mul_(2)


class ScalesByAConstant(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * torch.linspace(0, 1, 6).view(1, -1, 1, 1)


def test_a_constant_keeps_its_dtype_when_the_model_changes_its_own() -> None:
    small = compress(ScalesByAConstant().eval(), X, layers="re:.*", size=1.0)
    assert parts_of(small)[0].graph
    assert small.bfloat16()(X.bfloat16()).dtype is torch.float32
    assert "_tensor" not in " ".join(small.state_dict())


class KeepsATensor(Base):
    level = 3

    def prepare(self) -> None:
        self.mean = torch.full((3, 1, 1), 0.5)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(x - self.mean) * self.scale * torch.ones(1)

    def doubled(self, x: Tensor) -> Any:
        return self(x) * 2


@pytest.mark.parametrize("rewrite", [trace, compress])
def test_a_pickle_is_of_its_own_class_and_holds_the_same(rewrite: Any) -> None:
    made = rewrite(KeepsATensor().eval(), X)
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again, KeepsATensor)
    held, before = ({key for key in vars(module) if "constant" not in key} for module in (again, made))
    assert held == before
    assert list(again.state_dict()) == list(made.state_dict())
    assert parts_of(again) == parts_of(made)
    assert again.level == 3
    for other in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(other.doubled(X), made(X) * 2)


class Way(Enum):
    LONG = 1
    SHORT = 2


class LeftAtAnEnum(Base):
    def forward(self, x: Tensor, way: Way = Way.LONG) -> Any:
        return self.out(x) if way is Way.LONG else self.conv(x)


class AsksForAClass(Base):
    def forward(self, x: Tensor, scale: Any) -> Any:
        return self.out(x) * (scale.view(-1, 1, 1, 1) if torch.is_tensor(scale) else scale)


class TakesAList(Base):
    def forward(self, x: Any) -> Any:
        return self.out(torch.cat(x) if isinstance(x, (list, tuple)) else x)


class LooksIntoADict(Base):
    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Any:
        index = more.get("index")
        return self.out(x) if index is None else self.out(x)[index]


class UnpacksAPair(Base):
    def forward(self, pair: Any) -> Any:
        image, mask = pair
        return self.out(image) if mask is None else self.out(image) * mask


ONE = torch.ones(1)
OTHERS = [
    (LeftAtAnEnum, (X,), (X, Way.SHORT)),
    (AsksForAClass, (X, 0.5), (X, torch.arange(len(X)) + 1.0)),
    (TakesAList, (X,), ([X, X],)),
    (LooksIntoADict, (X, {"index": torch.tensor([0])}), (X, {})),
    (UnpacksAPair, ((X, ONE),), ((X, None),)),
]


@pytest.mark.parametrize(("kind", "example", "other"), OTHERS, ids=[kind.__name__ for kind, _, _ in OTHERS])
def test_another_argument_takes_its_own_way(kind: Any, example: Any, other: Any) -> None:
    model = kind().eval()
    small = compress(model, example, layers="re:.*", size=1.0)
    for inputs in (example, other, example):
        assert_same(model(*inputs), small(*inputs), 1e-5)


COUNT = [0]
GENERATOR = np.random.default_rng(0)


class Meter:
    steps = 0

    def step(self) -> None:
        self.steps += 1


METER = Meter()


def tick() -> None:
    COUNT[0] += 1


class CountsInAFunction(Base):
    def forward(self, x: Tensor) -> Any:
        tick()
        return self.out(x)


class CountsInAnObject(Base):
    def forward(self, x: Tensor) -> Any:
        METER.step()
        return self.out(x) if METER.steps < 10**6 else x


class SkipsAtRandom(Base):
    def forward(self, x: Tensor) -> Any:
        return x if self.training and GENERATOR.random() < 0.1 else self.out(x)


@pytest.mark.parametrize("kind", [CountsInAFunction, CountsInAnObject, SkipsAtRandom])
def test_what_forward_changes_outside_of_its_module_is_changed_at_each_call(kind: Any) -> None:
    traced = trace(kind().eval(), X)
    part = parts_of(traced)[0]
    assert not part.graph or part.reason, "no graph in train() at least"
    before = COUNT[0], METER.steps, GENERATOR.bit_generator.state["state"]["state"]
    traced.train()(X)
    assert before != (COUNT[0], METER.steps, GENERATOR.bit_generator.state["state"]["state"])


class Delegates(nn.Module):
    """Answers for the module in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.other = inner, nn.Conv2d(3, 6, 3, padding=1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) * 2 + self.other(x)


def test_a_wrapper_that_answers_for_its_part_stays_itself() -> None:
    model = Delegates(Base()).eval()
    small = compress(model, X, layers="re:.*", size=1.0)
    assert type(small) is Delegates
    assert_behaves_as(model, small)
    assert_same(model(X), copy.deepcopy(small)(X), 1e-5)


@pytest.mark.parametrize("inner", [trace(Base().eval(), X), torch.fx.symbolic_trace(Base())])
def test_a_wrapper_of_a_graph_that_would_be_copied_as_that_is_refused(inner: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"hands on __deepcopy__ of what it wraps, .* let its __getattr__"):
        trace(Delegates(inner), X)


class AnswersNone(Base):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None


def test_a_class_that_answers_every_name_is_compressed() -> None:
    model = AnswersNone().eval()
    assert_behaves_as(model, compress(model, X, layers="re:.*", size=1.0))


class WritesIntoAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 1)

    def forward(self, x: list[Tensor]) -> Any:
        x[0] = self.conv(x[0])
        return x if x[0].shape[2] < 99 else x * 2


class Detector(Base):
    def prepare(self) -> None:
        self.head = WritesIntoAList()

    def forward(self, x: Tensor) -> Any:
        return self.head([self.out(x)])


def test_lists_that_parts_write_into_are_counted_as_they_run() -> None:
    model = Detector().eval()
    traced = trace(model, X)
    found = profile(traced, X)
    assert not found.disagreements
    assert found.macs == profile(model, X).macs
    assert "head.conv" in str(doctor(model, X))


@dataclass
class Output:
    logits: Tensor


class GivesAnObject(Base):
    def forward(self, x: Tensor) -> Any:
        return Output(self.out(x))


def test_a_training_step_of_an_object_is_counted() -> None:
    assert profile(GivesAnObject(), X, training=True).macs > profile(GivesAnObject(), X).macs


class Holder:
    def __init__(self, image: Tensor) -> None:
        self.image = image


class ChangesItsInput(Base):
    def forward(self, holder: Holder) -> Any:
        holder.image = holder.image * 2
        return self.out(holder.image.mul_(2))


def test_an_input_object_is_left_as_it_was() -> None:
    holder, before = Holder(X.clone()), X.clone()
    model = ChangesItsInput().eval()
    small = compress(model, (holder,), layers="re:.*", size=1.0)
    assert torch.equal(holder.image, before)
    assert_same(model(Holder(X.clone())), small(Holder(X.clone())), 1e-5)


def test_folding_checks_on_the_cpu_whatever_the_default_device() -> None:
    small = compress(Base().eval(), X, layers="re:.*", size=1.0)
    with torch.device("meta"):
        folded = fold(small)
    assert_same(small(X), folded(X), 1e-5)


class DropsByAMode(Base):
    """By the mode of a module two levels below."""

    def prepare(self) -> None:
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.out(self.inner(x)), 0.5, self.inner[1].training)


@pytest.mark.parametrize("training", [False, True])
def test_a_part_two_levels_below_in_another_mode_than_the_rest(training: bool) -> None:
    model = DropsByAMode().train(training)
    small = compress(model, X, layers="re:.*", size=1.0)
    for each in (model, small):
        each.inner[1].train(not training)
    outputs = []
    for each in (model, small):
        seed_all()
        outputs.append(each(X))
    assert_same(*outputs, 1e-5)


class DropsByTwoModes(Base):
    def prepare(self) -> None:
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.out(x), 0.5, self.drop.training and not self.bn.training)


def test_parts_beside_each_other_in_other_modes() -> None:
    model = DropsByTwoModes().train()
    small = compress(model, X, layers="re:.*", size=1.0)
    assert "train() and eval() of drop take different ways" in parts_of(small)[0].reason
    outputs = []
    for each in (model, small):
        each.bn.eval()
        seed_all()
        outputs.append(each(X))
    assert_same(*outputs, 1e-5)


class AsksAPartForNothing(Base):
    """As timm's rotary embeddings do: the mode is asked in a method of a part, and changes nothing."""

    class Embedding(nn.Module):
        augmented = False

        def level(self) -> float:
            return 2.0 if self.training and self.augmented else 1.0

    def prepare(self) -> None:
        self.embedding = self.Embedding()

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.embedding.level()


def test_a_mode_that_is_asked_for_and_changes_nothing_leaves_a_graph() -> None:
    (part,) = parts_of(trace(AsksAPartForNothing().eval(), X))
    assert (part.graph, part.reason) == (True, "")


class CarefulUnderAutocast(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        wide = torch.is_autocast_enabled("cpu") and (not self.training or torch.is_grad_enabled())
        return y.float() if wide else y


@pytest.mark.parametrize(("training", "gradients"), [(False, False), (False, True), (True, True)])
def test_a_model_that_asks_for_autocast(training: bool, gradients: bool) -> None:
    model = CarefulUnderAutocast().train(training)
    small = compress(model, X, layers="re:.*", size=1.0)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        assert small(X).dtype is model(X).dtype is torch.float32


class ComparesBy(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        return y * 2 if self.asks(y) else y


@pytest.mark.parametrize(
    ("asks", "change"),
    [
        (lambda y: y.dtype is torch.bfloat16, lambda model: model.bfloat16()),
        (lambda y: torch.float64 is y.dtype, lambda model: model.double()),
        (lambda y: y.requires_grad is False, lambda model: model.requires_grad_(False)),
        (lambda y: y.grad_fn is None, lambda model: model.requires_grad_(False)),
    ],
)
def test_what_is_compared_by_identity_is_asked_at_each_call(asks: Any, change: Any) -> None:
    model = ComparesBy().eval()
    model.asks = asks
    small = compress(model, X, layers="re:.*", size=1.0)
    assert not parts_of(small)[0].graph
    change(small), change(model)
    x = X.to(model.conv.weight.dtype)
    torch.testing.assert_close(small(x), model(x), rtol=2e-2, atol=2e-2)
    assert asks(model(x))


def test_an_identity_that_is_asked_of_other_things_leaves_a_graph() -> None:
    class AsksForNone(Base):
        def forward(self, x: Tensor, scale: Any = None) -> Any:
            dtype = x.dtype
            y = self.out(x.float()).to(dtype)
            return y if scale is None or self.training is None else y * scale

    assert parts_of(trace(AsksForNone().eval(), X))[0].graph


class AsksItsParameters(Base):
    """As diffusers and transformers do."""

    def prepare(self) -> None:
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        kind = next(self.parameters())
        y = self.out(x.to(kind.dtype)) + torch.zeros(1, dtype=kind.dtype, device=next(self.buffers()).device)
        return y.float() if self.training else y.softmax(1).to(kind.dtype)


def test_the_dtype_of_parameters_is_asked_at_each_call() -> None:
    model = AsksItsParameters().eval()
    small = compress(model, X, layers="re:.*", size=1.0)
    assert parts_of(small)[0].graph
    for made in (small, fold(small)):
        assert made(X).dtype is torch.float32
        assert_same(model.double()(X), made.double()(X), 1e-5)
        assert_same(model.float()(X), made.float()(X), 1e-5)
    assert not {"dtype", "tolist"} & {*vars(torch.Tensor)}


class ListsABuffer(AsksItsParameters):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self._buffers["level"].tolist()


def test_values_of_a_buffer_are_asked_at_each_call() -> None:
    model = ListsABuffer().eval()
    small = compress(model, X, layers="re:.*", size=1.0)
    for each in (model, small):
        each.level.fill_(3.0)
    assert_same(model(X), small(X), 1e-5)


class ChoosesItsForward(Base):
    @property
    def forward(self) -> Any:
        return self.doubled if self.training else self.out

    def doubled(self, x: Tensor) -> Any:
        return self.out(x) * 2


def test_a_forward_that_is_a_property_stays_python() -> None:
    model = ChoosesItsForward().eval()
    small = compress(model, X, layers="re:.*", size=1.0)
    assert "its forward is no method" in parts_of(small)[0].reason
    assert_same(model(X), small(X), 1e-5)
    assert_same(model.train()(X), small.train()(X), 1e-4)
