"""Traced copies behave as the model does, in eval() and in train(); what a graph cannot keep stays Python."""

import copy
import io
import pickle
import random
import re
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from fxbasis import (
    FxBasisError,
    FxBasisWarning,
    InputError,
    LayerError,
    TraceError,
    UsageError,
    compress,
    fold,
    load,
    number_convs,
    parts_of,
    save,
    trace,
)
from fxbasis.forms import BasisConv2d

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

TOLERANCE = 1e-5
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X3 = torch.randn(3, 3, 10, 6, generator=torch.Generator().manual_seed(2))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Record:
    value: Tensor
    label: str


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


class DropoutAmongConvs(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.body(x), 0.5, training=self.training))


class TrainingBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.last(y) if self.training else self.last(y + self.body(x))


class AuxiliaryHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return (self.last(y), self.aux(y)) if self.training else self.last(y)


class TrainingConstant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) * torch.tensor(2.0 if self.training else 3.0)


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
        return self.last(y)


class EnableGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.conv(x)
        return self.last(y)


class Autocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        return self.last(y.float())


class AutocastOff(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            return self.last(y.float())


class Checkpoint(Base):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.last, self.body(x), use_reentrant=self.reentrant)


class BatchBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.body(x))
        return y * 2 if x.shape[0] > 2 else y


class BatchLoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.last(self.conv(sample[None])) for sample in x])


class RangeLoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.last(self.conv(x[i : i + 1])) for i in range(x.shape[0])])


class Assertion(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        return self.last(self.body(x))


class DataBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) if x.sum() > 0 else self.conv(x)


class TypeBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) if isinstance(x, Tensor) else x


class DrawsInForward(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) + torch.rand(1)


class PythonLayerDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.body(x))
        return y if self.training and random.random() < 0.5 else y * 2


class CountsCalls(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.last(self.body(x))


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


class DataclassOutput(Base):
    def forward(self, x: Tensor) -> Record:
        return Record(self.last(self.body(x)), "logits")


class ListOutput(Base):
    def forward(self, x: Tensor) -> list[Any]:
        y = self.body(x)
        return [y, (self.last(y), None, 3)]


class VarArgs(Base):
    def forward(self, *images: Tensor) -> Tensor:
        return self.last(self.body(images[0]))


class KeywordArgs(Base):
    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        y = self.last(self.body(x))
        return y * options["scale"] if "scale" in options else y


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


class ItemAssignment(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0] = 0
        return self.last(y)


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


class KeywordOnly(Base):
    def forward(self, *, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.last(self.body(x)) * scale


class TupleDefault(Base):
    def forward(self, x: Tensor, size: tuple[int, int] = (4, 4)) -> Tensor:
        return F.adaptive_avg_pool2d(self.last(self.body(x)), size)


class FunctionDefault(Base):
    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        return activation(self.last(self.body(x)))


class ReservedNames(Base):
    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Conv2d(6, 6, 1)
        self.meta = {"classes": 6}

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(self.last(self.body(x)))


class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.Conv2d(3, 4, 3), "2 x": nn.Conv2d(4, 4, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["2 x"](self.parts["a-b"](x))


class KeywordName(OddNames):
    def __init__(self) -> None:
        super().__init__()
        self.parts["class"] = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["class"](super().forward(x))


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


class GraphInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = fx.symbolic_trace(Plain())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.shape[0] < 3 else self.part(x) * 2


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


class Nested(nn.Module):
    """A part that branches inside a model that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.part = BatchBranch()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.stem(x))


def patched() -> nn.Module:
    model = Plain()
    first, last = model.conv, model.last
    model.forward = lambda x: last(first(x))  # type: ignore[method-assign]
    return model


def patched_for_copies() -> nn.Module:
    """Patched with a bound method, which a deep copy binds to the copy."""
    model = Plain()
    model.forward = model.body  # type: ignore[method-assign]
    return model


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


class CalledThroughForward(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last.forward(self.body(x))


def one_conv() -> nn.Module:
    return nn.Conv2d(3, 8, 3, padding=1)


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

PYTHON: dict[str, tuple[Case, str]] = {
    "no_grad": (Case(NoGrad), "no_grad"),
    "enable_grad": (Case(EnableGrad), "no_grad"),
    "autocast": (Case(Autocast), "autocast"),
    "autocast switched off": (Case(AutocastOff), "autocast"),
    "reentrant checkpoint": (Case(lambda: Checkpoint(True)), ""),
    "checkpoint": (Case(lambda: Checkpoint(False)), ""),
    "branch on the batch": (Case(BatchBranch), r"control flow.*test_tracing\.py:\d+"),
    "loop over the batch": (Case(BatchLoop), r"iterated.*test_tracing\.py:\d+"),
    "range over the batch": (Case(RangeLoop), r"test_tracing\.py:\d+"),
    "assert": (Case(Assertion), r"test_tracing\.py:\d+"),
    "branch on data": (Case(DataBranch), r"test_tracing\.py:\d+"),
    "branch on a type": (Case(TypeBranch), ""),
    "random numbers in forward": (Case(DrawsInForward), ""),
    "buffer that counts": (Case(CountsCalls), r"sets its attribute count.*test_tracing\.py:\d+"),
    "item assignment": (Case(ItemAssignment), r"test_tracing\.py:\d+"),
    "tuple as default": (Case(TupleDefault), "no Python code"),
    "function as default": (Case(FunctionDefault), "NotImplementedError"),
    "reserved names": (Case(ReservedNames, 3), "graph has another meaning"),
    "keyword as a name": (Case(KeywordName, 3), "no Python code"),
    "graph inside": (Case(GraphInside), r"test_tracing\.py:\d+"),
    "patched forward": (Case(patched_for_copies, 1), "replaced on the instance"),
    "DataParallel": (Case(lambda: nn.DataParallel(Plain())), ""),
}

EVAL_ONLY: dict[str, tuple[Case, str]] = {
    "functional dropout among convs": (
        Case(DropoutAmongConvs),
        r"train\(\) and eval\(\) take different ways",
    ),
    "training branch": (Case(TrainingBranch), r"train\(\) and eval\(\) take different ways"),
    "auxiliary head": (Case(AuxiliaryHead), r"train\(\) and eval\(\) take different ways"),
    "constant of the mode": (Case(TrainingConstant), "use different constants"),
    "random layer drop": (Case(PythonLayerDrop), "draws random numbers"),
}

EITHER: dict[str, Case] = {
    "branching part": Case(Nested, 3),
    "dataclass output": Case(DataclassOutput),
    "*args": Case(VarArgs),
    "**kwargs": Case(KeywordArgs),
    "one Conv2d": Case(one_conv, 1),
}

WITH_REASON = PYTHON | EVAL_ONLY
ALL = GRAPHS | {key: case for key, (case, _) in WITH_REASON.items() if key != "autocast"} | EITHER


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The result, and the messages of fxbasis' own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [str(entry.message) for entry in caught if issubclass(entry.category, FxBasisWarning)]


def make(case: Case) -> nn.Module:
    """The net with BatchNorm statistics that matter."""
    model = case.make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def seed_all() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def assert_same(expected: Any, actual: Any) -> None:
    """Same types all the way down, same tensors to the tolerance."""
    assert type(expected) is type(actual)
    if isinstance(expected, Tensor):
        assert expected.shape == actual.shape
        assert expected.dtype == actual.dtype
        assert (expected - actual).abs().max() <= TOLERANCE * expected.abs().max()
    elif isinstance(expected, dict):
        assert list(expected) == list(actual)
        assert_same(list(expected.values()), list(actual.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_same(one, other)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(expected, field.name), getattr(actual, field.name))
    else:
        assert expected == actual


def assert_behaves_as(model: nn.Module, other: nn.Module, *inputs: Any) -> None:
    """Outputs and buffers of both, twice in eval() and twice in train(), from the same random state."""
    model, other = copy.deepcopy(model), copy.deepcopy(other)
    for training in (False, False, True, True):
        for given in inputs:
            results = []
            for one in (model, other):
                seed_all()
                one.train(training)
                results.append(one(given.clone()))
            assert_same(*results)
            assert_same(dict(model.named_buffers()), dict(_own_buffers(other, model)))


def _own_buffers(module: nn.Module, like: nn.Module) -> list[tuple[str, Tensor]]:
    names = {name for name, _ in like.named_buffers()}
    return [(name, buffer) for name, buffer in module.named_buffers() if name in names]


def forms_in(model: nn.Module) -> int:
    return sum(isinstance(module, BasisConv2d) for module in model.modules())


@pytest.mark.parametrize("key", ALL)
def test_traced_copy_behaves_as_the_model_in_both_modes(key: str) -> None:
    model = make(ALL[key])
    traced, _ = quietly(trace, model, X)
    assert_behaves_as(model, traced, X, X3)


@pytest.mark.parametrize("key", ALL)
def test_compressed_at_full_size_behaves_as_the_model_in_both_modes(key: str) -> None:
    model = make(ALL[key])
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert forms_in(small) == ALL[key].convs
    assert_behaves_as(model, small, X, X3)


@pytest.mark.parametrize("key", ALL)
def test_folding_gives_back_behaviour_and_state_dict(key: str) -> None:
    model = make(ALL[key])
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    folded = fold(small)
    assert forms_in(folded) == 0
    assert list(folded.state_dict()) == list(model.state_dict())
    assert_behaves_as(model, folded, X)


@pytest.mark.parametrize("key", ALL)
def test_saved_and_loaded_is_bit_equal(key: str, tmp_path: Any) -> None:
    model = make(ALL[key]).eval()
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    again, _ = quietly(load, model, save(small, tmp_path))
    seed_all()
    expected = small(X.clone())
    seed_all()
    found = again(X.clone())
    assert type(small).__name__ == type(again).__name__
    assert_same(expected, found)
    leaves = [torch.utils._pytree.tree_leaves(getattr(out, "value", out)) for out in (expected, found)]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("key", GRAPHS)
def test_is_one_graph(key: str) -> None:
    traced, messages = quietly(trace, make(GRAPHS[key]), X)
    assert messages == []
    assert isinstance(traced, fx.GraphModule)
    traced.graph.lint()


@pytest.mark.parametrize("key", PYTHON)
def test_stays_python_and_says_why(key: str) -> None:
    case, why = PYTHON[key]
    model = make(case)
    with pytest.warns(FxBasisWarning, match=f"{type(model).__name__} stays Python.*{why}"):
        traced = trace(model, X)
    assert type(traced) is type(model)
    assert traced is not model


@pytest.mark.parametrize("key", EVAL_ONLY)
def test_is_a_graph_in_eval_and_runs_its_python_in_train(key: str) -> None:
    case, why = EVAL_ONLY[key]
    traced, messages = quietly(trace, make(case), X)
    assert messages == []
    assert isinstance(traced, fx.GraphModule)
    (part,) = parts_of(traced)
    assert re.search(why, part.reason)
    with pytest.raises(
        TraceError, match=r"cannot be pickled: its graph is that of eval.*; use fxbasis\.save"
    ):
        pickle.dumps(traced)


WITHOUT_INPUTS = [key for key in PYTHON if key != "branch on a type"]


@pytest.mark.parametrize("key", WITHOUT_INPUTS)
def test_stays_python_without_example_inputs_too(key: str) -> None:
    model = make(PYTHON[key][0])
    with pytest.warns(FxBasisWarning, match="stays Python"):
        assert type(trace(model)) is type(model)


def test_warning_is_one_line() -> None:
    for case, _ in PYTHON.values():
        _, messages = quietly(trace, make(case), X)
        assert [message.count("\n") for message in messages] == [0]


@pytest.mark.parametrize("key", ALL)
def test_the_model_is_left_as_it_was(key: str) -> None:
    model = make(ALL[key])
    model.train()
    next(child for child in model.modules() if not list(child.children())).eval()
    keys = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.clone() for tensor in tensors]
    seed_all()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())

    quietly(trace, model, X)
    quietly(trace, model)
    quietly(compress, model, X, layers="re:.*", size=2)

    assert torch.equal(states[0], torch.get_rng_state())
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == keys
    assert [module.training for module in model.modules()] == modes
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, tensors, strict=True))
    if key != "random layer drop":  # its own forward draws from Python's generator when it runs
        assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("key", ALL)
def test_state_dict_keys_order_and_modes_are_the_models(key: str) -> None:
    model = make(ALL[key])
    model.train()
    model.eval().train(False)
    traced, _ = quietly(trace, model, X)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert [name for name, _ in traced.named_modules()] == [name for name, _ in model.named_modules()]
    assert [module.training for module in traced.modules()] == [module.training for module in model.modules()]


def test_mixed_modes_are_kept() -> None:
    model = DropoutModule().train()
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    modes = {name: module.training for name, module in small.named_modules()}
    assert (modes[""], modes["bn"], modes["drop"], modes["conv.basis"]) == (True, False, True, True)
    assert not small.conv.basis.weight.requires_grad
    assert not small.conv.composition.weight.requires_grad
    assert small.conv.composition.bias.requires_grad
    assert small.last.basis.weight.requires_grad


def test_one_training_step_gives_the_same_parameters() -> None:
    model = make(Case(Plain)).train()
    traced = trace(model, X)
    for one in (model, traced):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            one(X).square().mean().backward()
            optimizer.step()
    assert_same(dict(model.state_dict()), dict(traced.state_dict()))
    assert not torch.equal(traced.conv.weight, Plain().conv.weight)


def test_trained_compressed_graph_still_switches_mode() -> None:
    small, _ = quietly(compress, make(Case(DropoutInPart)), X, layers="re:.*", size=2)
    small.train()
    before = small.bn.running_mean.clone()
    assert not torch.equal(small(X), small(X))
    assert not torch.equal(before, small.bn.running_mean)
    small.eval()
    assert torch.equal(small(X), small(X))


def test_traced_copy_shares_nothing_with_the_model() -> None:
    model = make(Case(Plain))
    traced = trace(model, X)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(tensor.data_ptr() for tensor in (*traced.parameters(), *traced.buffers()))


def test_a_part_that_sets_its_attributes_goes_on_doing_so() -> None:
    class Caches(nn.Module):
        seen: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x * 2
            return self.seen

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Caches(), nn.Conv2d(4, 4, 1))
    for _ in range(2):
        traced = trace(model, X)
        assert isinstance(traced, fx.GraphModule)
        assert model[1].seen is None
        traced(X)
        assert isinstance(traced[1].seen, Tensor)


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("key", ["plain", "unused parts", "tensor constants", "sequential"])
@pytest.mark.parametrize("compressed", [False, True], ids=["traced", "compressed"])
def test_survives_copies(compressed: bool, key: str, again: Callable[[Any], Any]) -> None:
    if torch.__version__.startswith("2.8.") and key in ("unused parts", "tensor constants"):
        pytest.skip("torch 2.8's pickle of a GraphModule reorders what it did not trace")
    model = make(GRAPHS[key])
    traced, _ = quietly(compress, model, X, layers="re:.*", size=2) if compressed else (trace(model, X), 0)
    other = again(again(traced))
    assert isinstance(other, fx.GraphModule)
    assert list(other.state_dict()) == list(traced.state_dict())
    assert_behaves_as(traced, other, X)
    assert [r.name for r in number_convs(other)] == [r.name for r in number_convs(model)]
    assert list(fold(other).state_dict()) == list(model.state_dict())


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("key", ["plain", "sequential"])
def test_traced_again_gives_the_same(key: str) -> None:
    once = trace(make(GRAPHS[key]), X)
    twice = trace(once, X)
    assert twice is not once
    assert_behaves_as(once, twice, X)


def test_constants_do_not_enter_the_state_dict() -> None:
    model = make(GRAPHS["tensor constants"])
    traced = trace(model, X)
    assert list(traced.state_dict()) == list(model.state_dict())
    traced.load_state_dict(model.state_dict())
    assert traced.double()(X.double()).dtype == torch.float64


def test_hooks_fire_once_for_each_call_after_compression() -> None:
    class Counter:
        calls = 0

        def __call__(self, *_: Any) -> None:
            Counter.calls += 1

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Plain())
    model[0].register_forward_hook(Counter())
    model[1].conv.register_forward_pre_hook(Counter())
    model[1].register_forward_hook(Counter())
    model.register_forward_hook(Counter())
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    for one in (trace(model, X), small, fold(small)):
        assert isinstance(one, fx.GraphModule)
        Counter.calls = 0
        one(X)
        assert Counter.calls == 4


def test_backward_hook_on_a_conv_still_fires() -> None:
    seen: list[torch.Size] = []
    model = Plain()
    model.conv.register_full_backward_hook(lambda module, into, out: seen.append(out[0].shape))
    small, _ = quietly(compress, model, X, layers="re:.*", size=2)
    seen.clear()
    small(X).sum().backward()
    assert seen == [torch.Size([2, 8, 8, 8])]


def test_compressed_python_model_still_takes_both_ways() -> None:
    model = make(PYTHON["branch on the batch"][0])
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small, X, X3)
    assert forms_in(small) == 2


def test_conv_called_through_forward_is_left_alone_with_a_reason() -> None:
    model = make(Case(CalledThroughForward))
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    records = {record.name: record for record in number_convs(small, X)}
    assert records["conv"].status == "compressed"
    assert records["last"].status == "unsupported"
    assert records["last"].reason
    assert_behaves_as(model, small, X, X3)


def test_forward_patched_with_a_closure_over_the_original_is_no_silent_no_op() -> None:
    """The closure goes on calling the modules of the user's object: nothing in the copy would run."""
    model = patched()
    with pytest.raises(FxBasisError, match=r".+; .+"):
        quietly(compress, model, X, layers=[1], size=2)


def test_conv_held_in_a_plain_list_of_a_python_model_is_exchanged_there_too() -> None:
    model = make(Case(lambda: PlainList(branches=True)))
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert small.steps[0] is small.conv
    assert isinstance(small.steps[0], BasisConv2d)
    assert_behaves_as(model, small, X, X3)
    assert fold(small).steps[2].weight.shape == model.last.weight.shape


def test_conv_called_from_outside_of_the_model_is_refused() -> None:
    """A copy cannot reach it: the form would never run, and nothing would tell."""
    outside: list[nn.Module] = []

    class Borrows(Base):
        def forward(self, x: Tensor) -> Tensor:
            return outside[0](x) if x.shape[0] < 3 else self.conv(x)

    model = Borrows()
    outside.append(model.conv)
    with pytest.raises(FxBasisError, match=r".+; .+"):
        quietly(compress, model, X, layers=[1], size=2)


def test_names_basis_and_composition_are_no_form_of_ours() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.basis = nn.Conv2d(3, 4, 3)
            self.composition = nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.composition(F.relu(self.basis(x)))

    model = nn.Sequential(Own(), nn.Conv2d(8, 16, 3))
    small, _ = quietly(compress, model, X, layers=[3], size=16)
    assert [record.name for record in number_convs(small)] == ["0.basis", "0.composition", "1"]
    assert list(fold(small).state_dict()) == list(model.state_dict())
    assert_behaves_as(model, small, X)
    assert_behaves_as(model, fold(small), X)


def test_example_inputs_are_left_as_they_were() -> None:
    inputs = X.clone()
    quietly(compress, make(GRAPHS["changes its input"]), inputs, layers="re:.*", size=2)
    assert torch.equal(inputs, X)


def test_model_without_conv_is_a_no_op_with_a_message() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.warns(FxBasisWarning, match="nothing is compressed.*no Conv2d"):
        small = compress(model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small, X)
    assert len(number_convs(model, X)) == 0


def test_a_single_conv_becomes_a_form_and_folds_back() -> None:
    conv = one_conv()
    small, _ = quietly(compress, conv, X, layers=[1], size=3)
    assert isinstance(small, BasisConv2d)
    assert [name for name, _ in small.named_parameters()] == [
        "basis.weight",
        "composition.weight",
        "composition.bias",
    ]
    assert type(fold(small)) is nn.Conv2d
    assert_behaves_as(small, fold(small), X)


class TwoWays(Plain):
    classes = 6

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    @property
    def first(self) -> nn.Module:
        return self.conv

    @staticmethod
    def twice(x: Tensor) -> Tensor:
        return x * 2

    @classmethod
    def named(cls) -> str:
        return cls.__name__


def test_second_entry_point_still_works_on_the_rewritten_layers() -> None:
    model = make(Case(TwoWays)).eval()
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    for one in (small, copy.deepcopy(small), fold(small)):
        assert isinstance(one, fx.GraphModule)
        assert_same(model.features(X), one.features(X))
        assert one.first is one.conv
        assert (one.classes, one.twice(3), one.named()) == (6, 6, "TwoWays")
    with torch.no_grad():
        small.conv.composition.weight.zero_()
    assert not torch.equal(model.features(X), small.features(X))


@pytest.mark.parametrize("name", ["nothing", "_nothing"])
def test_missing_attributes_are_still_missing(name: str) -> None:
    traced = trace(make(GRAPHS["sequential"]), X)
    with pytest.raises(AttributeError, match=name):
        getattr(traced, name)


def test_a_traced_sequential_is_read_and_never_grown_in_silence() -> None:
    traced = trace(make(GRAPHS["sequential"]), X)
    assert len(traced) == 3
    assert traced[-1] is traced.get_submodule("2")
    traced[1] = nn.Identity()
    assert torch.equal(traced(X), traced[2](traced[0](X)))
    with pytest.raises(UsageError, match=r"append: a traced Sequential is fixed; change the model"):
        traced.append(nn.ReLU())
    with pytest.raises(UsageError, match="fixed; change the model"):
        del traced[0]


def test_plain_attributes_survive() -> None:
    model = Plain()
    model.classes = ["cat", "dog"]
    model.conv.note = "stem"
    traced = trace(model, X)
    assert (traced.classes, traced.conv.note, type(traced).__name__) == (["cat", "dog"], "stem", "Plain")


OPTIONAL: dict[str, Any] = {
    "left out": X,
    "mask by position": (X, torch.rand(2, 1, 8, 8)),
    "mask by name": {"x": X, "mask": torch.rand(2, 1, 8, 8)},
    "both": (X, torch.rand(2, 1, 8, 8), True),
    "flag by name": {"x": X, "double": True},
}


@pytest.mark.parametrize("key", OPTIONAL)
def test_optional_arguments_take_the_way_of_the_example(key: str, tmp_path: Any) -> None:
    given = OPTIONAL[key]
    args, kwargs = (
        ((), given) if isinstance(given, dict) else (given if type(given) is tuple else (given,), {})
    )
    model = make(GRAPHS["optional arguments"]).eval()
    expected = model(*args, **kwargs)
    small, _ = quietly(compress, model, given, layers="re:.*", size=1.0)
    assert_same(expected, small(*args, **kwargs))
    again, _ = quietly(load, model, save(small, tmp_path))
    assert torch.equal(small(*args, **kwargs), again(*args, **kwargs))


@pytest.mark.parametrize("given", [{"x": X}, {"x": X, "scale": 3.0}], ids=["default", "given"])
def test_keyword_only_arguments(given: dict[str, Any]) -> None:
    model = make(Case(KeywordOnly)).eval()
    small, _ = quietly(compress, model, given, layers="re:.*", size=1.0)
    assert isinstance(small, fx.GraphModule)
    assert_same(model(**given), small(**given))


def test_an_argument_that_was_left_out_is_refused_later_and_not_ignored() -> None:
    traced = trace(make(GRAPHS["optional arguments"]).eval(), X)
    with pytest.raises(AssertionError, match="mask"):
        traced(X, torch.rand(2, 1, 8, 8))


def test_keyword_arguments_are_used() -> None:
    model = make(EITHER["**kwargs"]).eval()
    given = {"x": X, "scale": torch.rand(2, 1, 1, 1)}
    small, _ = quietly(compress, model, given, layers="re:.*", size=1.0)
    assert_same(model(**given), small(**given))


@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_own_grad_context_does_not_matter(under: Any) -> None:
    model = make(Case(Plain))
    with under():
        traced, messages = quietly(trace, model, X)
    assert messages == []
    assert_behaves_as(model, traced, X)


@pytest.mark.parametrize("key", ["no_grad", "enable_grad", "autocast", "autocast switched off"])
@pytest.mark.parametrize("under", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_contexts_of_the_model_are_seen_inside_the_same_context(under: Any, key: str) -> None:
    with under(), pytest.warns(FxBasisWarning, match="stays Python.*it opens a context"):
        trace(make(PYTHON[key][0]))


def test_autocast_around_the_traced_model_acts_as_around_the_model() -> None:
    model = make(PYTHON["autocast switched off"][0]).eval()
    traced, _ = quietly(trace, model, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model(X), traced(X))


def test_model_that_computes_in_bfloat16_inside_can_be_compressed() -> None:
    """Its convolution runs in bfloat16, so that is the tolerance, though the output is float32."""
    model = make(PYTHON["autocast"][0]).eval()
    expected = model(X)
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    for one in (small, fold(small)):
        assert (one(X) - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_random_layer_drop_is_never_baked_in() -> None:
    """Tracing and proof may meet any draw: whichever it is, the copy must go on drawing."""
    model = PythonLayerDrop().train()
    for seed in range(8):
        random.seed(seed)
        traced, _ = quietly(trace, model, X)
        assert len({round(float(traced(X).detach().abs().sum()), 2) for _ in range(20)}) == 2


ERRORS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "lazy conv": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3)),
        LayerError,
        r"0 \(LazyConv2d\).*run one forward",
    ),
    "lazy linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(2)),
        LayerError,
        r"2 \(LazyLinear\).*run one forward",
    ),
    "old weight_norm after a run": (
        lambda: _run_once(nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)))),
        TraceError,
        "cannot be deep-copied.*remove_weight_norm",
    ),
    "no module": (lambda: lambda x: x, TraceError, "function; pass a torch.nn.Module"),
    "a state_dict": (lambda: Plain().state_dict(), TraceError, "OrderedDict; pass a torch.nn.Module"),
}


def _run_once(model: nn.Module) -> nn.Module:
    model(X)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("verb", [trace, compress], ids=["trace", "compress"])
@pytest.mark.parametrize("key", ERRORS)
def test_models_that_cannot_be_used_are_refused(key: str, verb: Any) -> None:
    build, kind, message = ERRORS[key]
    with pytest.raises(kind, match=message):
        verb(build(), X)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.nn.modules.lazy")
def test_lazy_module_works_after_one_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
    model(X)
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small, X)


WRONG_INPUTS: dict[str, Any] = {
    "channels": torch.zeros(2, 4, 8, 8),
    "dimensions": torch.zeros(2, 3),
    "dtype": X.double(),
    "device": X.to("meta"),
    "a list": [X],
    "a number": 3,
    "too many": (X, X),
    "unknown name": {"image": X},
    "nothing": (),
}


@pytest.mark.parametrize("verb", [trace, compress, number_convs], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("key", WRONG_INPUTS)
def test_wrong_inputs_are_refused_with_a_remedy(key: str, verb: Any) -> None:
    with pytest.raises(InputError, match=r"; pass .+$|pass a tensor"):
        verb(Plain(), WRONG_INPUTS[key])


def test_compress_without_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="pass one batch"):
        compress(Plain(), None)
