"""What the numbering run sees in graphs and in Python: functional convolutions, other readers of a weight."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from conftest import Net, build, close
from timm.layers import CondConv2d
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fxbasis import FxBasisWarning, LayerError, compress, number_convs, profile, trace
from fxbasis.passes.watching import REMEDY, UNREGISTERED

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Base(nn.Module):
    """One ordinary convolution, and a branch on the batch that keeps the model Python when asked to."""

    def __init__(self, python: bool = True) -> None:
        super().__init__()
        self.python = python
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        if self.python and bool(x.sum() > 1e9):
            return x
        return self.read(self.other(self.conv(x)))

    def read(self, x: Tensor) -> Any:
        return x


class TiedDecoder(Base):
    def read(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.conv.weight)


class Returned(Base):
    def read(self, x: Tensor) -> Any:
        return x, {"weights": [self.conv.weight]}


class ReturnedView(Base):
    def read(self, x: Tensor) -> Any:
        return x, self.conv.weight.reshape(16, -1)


class Regulariser(Base):
    def read(self, x: Tensor) -> Any:
        return x, sum(conv.weight.square().sum() for conv in (self.conv,))


class Normalised(Base):
    """A reader in another module."""

    def __init__(self, python: bool = True) -> None:
        super().__init__(python)
        self.head = nn.Module()
        self.head.forward = lambda x, w: x * w.norm()  # type: ignore[method-assign]

    def read(self, x: Tensor) -> Tensor:
        return self.head(x, self.conv.weight)


class SameWeight(Base):
    """Its own convolution, with the weight of another module."""

    def read(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, :3], self.conv.weight)


class ReadsBias(Base):
    def read(self, x: Tensor) -> Tensor:
        return x + self.conv.bias.view(1, -1, 1, 1)


class ReadsData(Base):
    def read(self, x: Tensor) -> Tensor:
        return x * float(self.conv.weight.data.mean())


READERS = [TiedDecoder, Returned, ReturnedView, Regulariser, Normalised, SameWeight, ReadsBias, ReadsData]
python = pytest.mark.parametrize("python", [True, False], ids=["python", "graph"])


def quiet(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxBasisWarning)
        return function(*args, **options)


@python
@pytest.mark.parametrize("kind", READERS)
def test_a_weight_that_something_else_reads_is_refused(kind: type[Base], python: bool) -> None:
    model = kind(python).eval()
    what = "bias" if kind is ReadsBias else "weight"
    for one in (model, quiet(trace, model, X)):
        first, second = number_convs(one, X)
        assert (first.status, second.status) == ("unsupported", "ok")
        assert first.reason.startswith(f"its {what} is also read by ")
    with pytest.raises(LayerError, match=rf"conv 1 \(conv\).* its {what} is also read by .*; leave it out"):
        quiet(compress, model, X, layers=1, size=4)
    small = quiet(compress, model, X, layers="re:.*", size=16)
    assert [record.status for record in number_convs(small, X)] == ["unsupported", "compressed"]
    with torch.no_grad():
        expected, found = model(X), small(X)
    pairs = [(expected, found)] if isinstance(expected, Tensor) else [(expected[0], found[0])]
    assert all(close(a, b) for a, b in pairs)


def test_the_reader_is_named_with_its_line() -> None:
    lines, first = inspect.getsourcelines(TiedDecoder)
    line = first + next(i for i, text in enumerate(lines) if "conv_transpose2d" in text)
    reason = number_convs(TiedDecoder(), X)[0].reason
    assert reason == f"its weight is also read by the forward of TiedDecoder ({__file__}:{line})"
    assert number_convs(Returned(), X)[0].reason == "its weight is also read by the model's output"
    assert "node" in quiet(lambda: number_convs(trace(TiedDecoder(False), X), X))[0].reason


class LooksAtAttributes(Base):
    def read(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        x = x.to(weight.dtype).to(weight.device).type_as(weight).to(weight)
        assert weight.shape[0] == weight.size(0) == len(weight)
        assert weight.dim() == weight.ndim == 4
        return x + torch.zeros_like(weight).sum() + weight.new_zeros(1) + self.conv.out_channels * 0


@python
def test_attributes_of_a_weight_may_be_read(python: bool) -> None:
    model = LooksAtAttributes(python).eval()
    for one in (model, quiet(trace, model, X)):
        assert [record.status for record in number_convs(one, X)] == ["ok", "ok"]
    full = quiet(compress, model, X, layers="re:.*", size=16)
    with torch.no_grad():
        assert close(model(X), full(X))


@pytest.mark.parametrize(
    "make",
    [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm],
    ids=["weight_norm", "spectral_norm", "parametrization"],
)
def test_readers_of_a_weight_that_is_made(make: Callable[[nn.Module], nn.Module]) -> None:
    for kind, status in ((TiedDecoder, "unsupported"), (Base, "ok")):
        model = kind().eval()
        make(model.conv)
        assert number_convs(model, X)[0].status == status


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, groups=2)
        for _ in range(2):
            x = torch.conv2d(input=x, weight=torch.ones(4, 4, 1, 1))
        return x


class Functional(Base):
    def __init__(self, python: bool = True) -> None:
        super().__init__(python)
        self.branch = Branch()

    def read(self, x: Tensor) -> Tensor:
        x = self.branch(x[:, :4])
        return F.conv2d(x, torch.ones(5, 4, 3, 3), stride=2)


def source_line(kind: type, text: str) -> str:
    lines, first = inspect.getsourcelines(kind)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def test_functional_convolutions_are_listed_and_have_no_number() -> None:
    table = number_convs(Functional(), X)
    assert [(record.index, record.name, record.calls) for record in table] == [
        (1, "conv", 1),
        (2, "other", 1),
    ]
    grouped, ones, last = table.functional
    assert (grouped.scope, grouped.weight, grouped.output_size) == ("branch", (4, 2, 3, 3), (6, 6))
    assert (grouped.calls, grouped.macs) == (1, 2 * 36 * 4 * 2 * 9)
    assert grouped.source == source_line(Branch, "groups=2")
    assert (ones.calls, ones.macs, ones.weight) == (2, 2 * (2 * 36 * 4 * 4), (4, 4, 1, 1))
    assert ones.source == source_line(Branch, "torch.conv2d")
    assert (last.scope, last.output_size, last.macs) == ("", (2, 2), 2 * 4 * 5 * 36)
    assert last.source == source_line(Functional, "stride=2")
    assert last.reason == REMEDY
    with pytest.raises(FrozenInstanceError):
        last.calls = 3  # type: ignore[misc]


def test_functional_convolutions_of_a_graph_keep_their_scope() -> None:
    model = Functional(python=False)
    graph = trace(model, X)
    assert isinstance(graph, fx.GraphModule)
    expected, found = number_convs(model, X).functional, number_convs(graph, X).functional
    assert [c.scope for c in found] == ["branch", "branch", "branch", ""]  # an unrolled loop has two nodes
    assert sum(c.macs for c in found) == sum(c.macs for c in expected)
    assert [c.source for c in found] == ["node conv2d", "node conv2d_1", "node conv2d_2", "node conv2d_3"]
    nested = nn.Sequential(graph, nn.Conv2d(5, 4, 1))
    assert [c.scope for c in number_convs(nested, X).functional] == ["0.branch"] * 3 + ["0"]
    with pytest.warns(FxBasisWarning, match="because it was asked for"):
        small = compress(model, X, layers=2, size=16)
    assert number_convs(small, X).functional == found


ZEROS, ONES = (0, 0), (1, 1)
SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "packet": lambda x, kernel: torch.ops.aten.conv2d(x, kernel),
    "overload": lambda x, kernel: torch.ops.aten.conv2d.default(x, kernel),
    "padding": lambda x, kernel: torch.ops.aten.conv2d.padding(x, weight=kernel, padding="valid"),
    "convolution": lambda x, kernel: torch.convolution(x, kernel, None, ONES, ZEROS, ONES, False, ZEROS, 1),
}


class Spelled(nn.Module):
    def __init__(self, convolve: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.convolve, self.kernel = convolve, nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(x, self.kernel)
        return torch.convolution(x, self.kernel, None, ONES, ZEROS, ONES, True, ZEROS, 1)  # transposed


@pytest.mark.parametrize("key", SPELLINGS)
def test_functional_convolutions_of_every_spelling_are_listed(key: str) -> None:
    (conv,) = number_convs(Spelled(SPELLINGS[key]).eval(), X).functional
    assert (conv.weight, conv.macs, conv.reason) == ((8, 3, 3, 3), 2 * 36 * 8 * 27, REMEDY)


def test_an_exported_model_has_functional_convolutions() -> None:
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval(), (X,))
    found = number_convs(program.module(), X).functional
    assert [(conv.source, conv.scope, conv.weight) for conv in found] == [
        ("node conv2d", "0", (8, 3, 3, 3)),
        ("node conv2d_1", "1", (4, 8, 1, 1)),
    ]
    assert sum(conv.macs for conv in found) == profile(program.module(), X).counted


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kernel = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x: Tensor) -> Any:
        y = torch.vmap(self.conv)(x)
        one = torch.vmap(lambda part: F.conv2d(part[None], self.kernel))(y)
        slopes, _ = torch.vmap(torch.func.grad_and_value(lambda part: self.conv(part).sum()))(x)
        return one, slopes


def test_all_samples_of_vmap_are_counted() -> None:
    table = number_convs(Mapped(), X)
    assert (table[0].calls, table[0].macs, table[0].output_size) == (2, 2 * (2 * 36 * 8 * 27), (6, 6))
    assert [conv.macs for conv in table.functional] == [2 * 36 * 4 * 8]


class Unregistered(Base):
    def __init__(self, python: bool = True) -> None:
        super().__init__(python)
        self.plain = [nn.Conv2d(16, 4, 1), Scaled(4, 4, 1)]

    def read(self, x: Tensor) -> Tensor:
        for conv in self.plain:
            x = conv(x)
        return F.conv2d(x, self.other.weight[:4, :4])


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * 2)


def test_a_convolution_that_is_no_submodule_is_told_to_be_registered() -> None:
    found = number_convs(Unregistered(), X).functional
    assert [conv.weight[:2] for conv in found] == [(4, 16), (4, 4), (4, 4)]
    assert [conv.reason for conv in found] == [UNREGISTERED, UNREGISTERED, REMEDY]


def test_functional_convolutions_agree_with_the_profile() -> None:
    net = build("functional")
    (conv,) = number_convs(net, net.example).functional
    assert conv.macs == net.macs["(top level)"]
    counted = {layer.name: layer.counted for layer in profile(net, net.example).layers}
    assert counted["(top level)"] == conv.macs


def test_functional_convolutions_are_printed_under_the_table() -> None:
    text = str(number_convs(Functional(), X))
    lines = text.splitlines()
    assert len(lines) == 4 + 3
    place = r"- branch \(.*test_watching.py:\d+\), weight \(4, 4, 1, 1\), output 6x6"
    assert re.fullmatch(rf"{place}, 2 calls, 2,304 MACs: {REMEDY}", lines[5])
    assert lines[6].startswith("- (top level) (")
    assert "functional" not in str(number_convs(Functional()))


def test_conditional_convolutions_of_timm_are_functional() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cond = CondConv2d(3, 8, 3, padding=1, num_experts=2)
            self.conv = nn.Conv2d(8, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.cond(x, torch.ones(x.shape[0], 2)))

    table = number_convs(Routed(), X)
    assert [record.name for record in table] == ["conv"]
    (conv,) = table.functional
    assert (conv.scope, conv.weight, conv.macs) == ("cond", (16, 3, 3, 3), 2 * 64 * 8 * 27)
    assert "cond_conv2d.py:" in conv.source


def test_convolutions_inside_of_a_conv_module_are_no_functional_ones(net: Net) -> None:
    found = number_convs(net, net.example).functional
    assert len(found) == ("(top level)" in net.macs)
    small = quiet(compress, net, net.example, layers="re:.*")
    assert len(number_convs(small, net.example).functional) == len(found)


def test_the_model_is_left_as_it_was() -> None:
    model = Functional()
    number_convs(model, X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_is_the_models_own() -> None:
    class Catching(Base):
        def read(self, x: Tensor) -> Tensor:
            try:
                return self.conv(x)
            except RuntimeError:
                return self.other(x)

    table = number_convs(Catching(), X)
    assert [record.calls for record in table] == [1, 2]


class Decayed(Base):
    """Its penalty reads weights that it keeps in a list, or in an optimizer."""

    def __init__(self, keep: Any) -> None:
        super().__init__(python=False)
        self._kept = keep(self.conv)


@pytest.mark.parametrize(
    "keep",
    [
        lambda conv: [conv.weight],
        lambda conv: {"decay": (conv.bias,)},
        lambda conv: torch.optim.SGD(conv.parameters(), 0.1),
    ],
)
def test_weights_in_plain_attributes_would_be_orphans(keep: Any) -> None:
    first, second = number_convs(Decayed(keep).eval(), X)
    assert first.reason == "its parameter is also _kept (a plain attribute)"
    assert second.status == "ok"


def test_tied_originals_of_parametrizations_are_seen() -> None:
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Conv2d(3, 3, 3)) for _ in range(2)))
    first, second = (module.parametrizations.weight for module in model)
    second.original1 = first.original1
    assert [record.reason for record in number_convs(model, X)] == [
        f"its parameter is also {other}.parametrizations.weight.original1" for other in (1, 0)
    ]


class CallsForward(Base):
    def read(self, x: Tensor) -> Tensor:
        return x + self.other.forward(x)


class OnlyForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv.forward(x))


def test_a_forward_that_is_called_past_its_module_is_named() -> None:
    model = OnlyForward()
    reason = "its forward is called, past the module; call the module itself to compress it"
    for one in (model, trace(model, X)):
        assert reason in str(number_convs(one, X)[0].reason)
    assert number_convs(model, X).functional[0].reason == f"functional: {reason}"
    assert number_convs(CallsForward(), X)[1].reason == reason
    with pytest.raises(LayerError, match=rf"conv 1 \(conv\).*{reason}; leave it out of layers="):
        quiet(compress, model, X, layers=[1], size=4)
