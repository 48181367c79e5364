"""Graphs of parts: whichever submodule can be a graph is one, and the model around it does not notice."""

import copy
import warnings
from typing import Any

import pytest
import torch
from behaviour import X, assert_behaves_as, forms_in
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxbasis import (
    FxBasisWarning,
    Part,
    PlanError,
    compress,
    fold,
    load,
    number_convs,
    parts_of,
    save,
    trace,
)
from fxbasis.passes.tracing import retrace_

X3 = torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")


class Block(nn.Module):
    scale = 2.0

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.hidden_size = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def twice(self, x: Tensor) -> Tensor:
        return self.forward(x) * self.scale

    @property
    def weight(self) -> Tensor:
        return self.conv.weight


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block()
        self.other = Block()


class LoopsOverTheBatch(Base):
    """Python at the top; both blocks are graphs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.other(self.block(self.stem(image[None]))) for image in x])


class ReadsItsParts(Base):
    """Asks its children for an attribute, a class, another entry point, a property and a length."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[0] > 100:
            return x
        for child in self.children():
            if isinstance(child, Block):
                x = child(x) * child.hidden_size + child.twice(x) / child.scale
        x = x * self.block.weight.shape[0]
        return self.tail(x) * len(self.tail) + self.tail[1](x)


class Images(Base):
    """Takes a list, as detectors do, and returns a dict."""

    def forward(self, images: list[Tensor]) -> dict[str, list[Tensor]]:
        return {"found": [self.block(self.stem(image[None])) for image in images]}


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            return self.block(x) * 2
        return self.block(x)


class Leaf(Base):
    """A graph with a part in it that branches on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.branch(self.stem(x)))


class Shared(Base):
    """One block under two names, held in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.block
        self.steps = [self.block, self.other]

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.block(self.stem(x)))
        for step in self.steps if len(x) else ():
            x = step(x)
        return x


class Options(nn.Module):
    """A part whose optional argument some calls give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.conv(x) * scale
        return y if mask is None else y * mask


class Masked(Base):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.part = Options()
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        assert x.shape[1] == 4
        y = self.part(x, x.sigmoid())
        return y + self.part(x) if self.both else y


class Counts(nn.Module):
    """A running count in a buffer, as an exponential average would be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.conv(x)


class Remembers(Counts):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.last


class Records(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen.append(y)
        return y


class Draws(Counts):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (torch.rand(1) if self.training else 0)


class NoGrad(Counts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.conv(x)


class Around(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.part = part
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.part(self.stem(x)))


def graphs(model: nn.Module) -> dict[str, bool]:
    return {part.name: part.graph for part in parts_of(model)}


def names_of_buffers(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_buffers()]


CASES: dict[str, tuple[Any, Any, dict[str, bool]]] = {
    "loop over the batch": (LoopsOverTheBatch, X, {"": False, "block": True, "other": True}),
    "reads its parts": (ReadsItsParts, X, {"": False, "block": True, "other": True, "tail": True}),
    "list of images": (Images, ([X[0], X3[0]],), {"": False, "block": True}),
    "branching leaf": (Leaf, X, {"": True, "branch": False, "branch.block": True}),
    "shared and listed": (Shared, X, {"": False, "block": True, "other": True}),
    "optional argument": (lambda: Masked(False), X, {"": False, "part": True}),
    "argument given by some calls": (lambda: Masked(True), X, {"": False, "part": True}),
    "counting part": (lambda: Around(Counts()), X, {"": True, "part": False}),
    "remembering part": (lambda: Around(Remembers()), X, {"": True, "part": False}),
    "recording part": (lambda: Around(Records()), X, {"": True, "part": False}),
    "drawing part": (lambda: Around(Draws()), X, {"": True, "part": True}),
    "no_grad part": (lambda: Around(NoGrad()), X, {"": True, "part": False}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, dict[str, bool]]:
    make, example, expected = CASES[request.param]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return model.eval(), example, expected


def more_inputs(example: Any) -> list[Any]:
    return [example, X3] if isinstance(example, Tensor) else [example[0]]


def test_parts_are_graphs_where_they_can_be(case: Any) -> None:
    model, example, expected = case
    traced = trace(model, example)
    found = graphs(traced)
    assert {name: found.get(name) for name in expected} == expected
    for part in parts_of(traced):
        assert isinstance(traced.get_submodule(part.name), fx.GraphModule) == part.graph
        assert part.graph or ".py:" in part.reason
    assert names_of_buffers(traced) == names_of_buffers(model)
    assert_behaves_as(model, traced, *more_inputs(example))


def test_rewritten_folded_saved_and_loaded(case: Any, tmp_path: Any) -> None:
    model, example, _ = case
    small = compress(model, example, layers="re:.*", size=1.0)
    executed = sum(bool(record.calls) for record in number_convs(model, example))
    assert forms_in(small) == executed
    assert names_of_buffers(small) == names_of_buffers(fold(small)) == names_of_buffers(model)
    assert_behaves_as(model, small, *more_inputs(example))
    assert_behaves_as(small, fold(small), *more_inputs(example))
    assert list(fold(small).state_dict()) == list(model.state_dict())
    half = compress(model, example, layers="re:.*", size=2)
    again = load(model, save(half, tmp_path))
    assert {name for name, graph in graphs(again).items() if graph} == {
        name for name, graph in graphs(half).items() if graph
    }
    given = more_inputs(example)[0]
    pairs = [torch.utils._pytree.tree_leaves(one.eval()(copy.deepcopy(given))) for one in (half, again)]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_graphs_inside_get_two_nodes_for_each_rewritten_conv() -> None:
    small = compress(LoopsOverTheBatch().eval(), X, layers="re:.*", size=2)
    targets = [str(node.target) for node in small.block.graph.find_nodes(op="call_module")]
    assert "op" not in targets
    calls = [str(n.target) for n in small.block.graph.nodes if n.op == "call_module"]
    assert calls == ["conv.basis", "conv.composition", "bn"]
    assert [str(n.target) for n in fold(small).block.graph.nodes if n.op == "call_module"] == ["conv", "bn"]


def test_a_part_is_what_it_was_for_those_around_it() -> None:
    traced = trace(ReadsItsParts().eval(), X)
    assert isinstance(traced.block, Block)
    assert isinstance(traced.block, fx.GraphModule)
    assert traced.block.hidden_size == 4
    assert traced.block.weight is traced.block.conv.weight
    assert type(traced.tail).__name__ == "Sequential"


def test_the_message_names_part_and_line() -> None:
    with pytest.warns(
        FxBasisWarning, match=r"Leaf is a graph, in which branch stays Python: .*test_parts\.py:\d+"
    ):
        trace(Leaf().eval(), X)
    with pytest.warns(
        FxBasisWarning, match=r"LoopsOverTheBatch stays Python, 2 of its parts are graphs: .*iterat"
    ):
        trace(LoopsOverTheBatch().eval(), X)


def test_one_graph_is_one_part_and_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = trace(Around(Block()).eval(), X)
    assert parts_of(traced) == (Part("", True, given=("x",), calls=("x: Tensor",)),)


def test_traced_model_is_not_traced_again() -> None:
    traced = trace(LoopsOverTheBatch().eval(), X)
    again = trace(traced, X)
    assert again is not traced
    assert parts_of(again) == parts_of(traced)
    assert_behaves_as(traced, compress(traced, X, layers="re:.*", size=1.0), X)


class LooksAtItsPart(Base):
    """Takes another way for a part that is a graph: proven part by part it is right, as a whole it is not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return x * 2 if type(self.block) is Block and len(x) else x


def test_a_part_stays_python_when_the_model_around_it_would_notice() -> None:
    model = LooksAtItsPart().eval()
    traced = trace(model, X)
    assert graphs(traced)["block"] is False
    reasons = {part.name: part.reason for part in parts_of(traced)}
    assert "changes the model around it" in reasons["block"]
    assert_behaves_as(model, traced, X, X3)


def test_without_inputs_parts_are_graphs_unless_their_arguments_are_unknown() -> None:
    assert graphs(trace(LoopsOverTheBatch())) == {"": False, "block": True, "other": True}
    found = graphs(trace(Masked(False)))
    assert found["part"] is False


def test_retrace_refuses_what_is_not_there() -> None:
    with pytest.raises(PlanError, match=r"cannot be traced as it was: .*; use the model that was compressed"):
        retrace_(LoopsOverTheBatch(), [Part("missing", True, given=("x",))])
    with pytest.raises(PlanError, match="cannot be traced as it was"):
        retrace_(LoopsOverTheBatch(), [Part("", True, given=("x",))])
    with pytest.raises(PlanError, match="0 is a convolution, which is no graph; use the model"):
        retrace_(nn.Sequential(nn.Conv2d(3, 8, 3)), [Part("0", True, given=("x",))])


def test_specialised_to_the_size_of_the_example_is_noticed() -> None:
    """fx.wrap'd code sees real values when the graph runs and Proxies before: a cache by size is the trap."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            side = x.shape[-1] if isinstance(x.shape[-1], int) else 8
            return self.conv(x) * torch.ones(side)

    model = nn.Sequential(Sized(), nn.Conv2d(4, 4, 1)).eval()
    traced = trace(model, X)
    assert_behaves_as(model, traced, X, X3)
    assert graphs(traced)["0"] is False


class SizeOfWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(5, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.weight.view(self.weight.size(0), -1, 1, self.weight.size(dim=3)))


def test_one_size_of_a_parameter_is_known() -> None:
    assert parts_of(trace(SizeOfWeight(), X))[0].graph
