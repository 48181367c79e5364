"""profile: the count of what ran is the closed form that each net carries, in every shape of the net."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import NETS, Net, build
from torch import Tensor, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxbasis import FxBasisWarning, InputError, compress, fold, profile, trace
from fxbasis.passes.base import MACS
from fxbasis.passes.profiling import Profile, ProfilePass

UNGROUPED = [key for key in NETS if key not in ("grouped", "depthwise")]


def counted(found: Profile) -> dict[str, int]:
    return {layer.name: layer.counted for layer in found.layers}


def formulas(found: Profile) -> dict[str, int]:
    return {layer.name: layer.macs for layer in found.layers}


def numbers(found: Profile) -> list[tuple[Any, ...]]:
    """All that a profile says, in any order of the layers."""
    return sorted(
        (layer.name, layer.kind, layer.macs, layer.counted, layer.params, layer.activations)
        for layer in found.layers
    )


def torch_macs(model: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2


def halved(net: Net) -> nn.Module:
    return compress(net, net.example, layers="re:.*", size=0.2)


def test_count_and_formula_are_the_closed_form_of_the_net(net: Net) -> None:
    found = profile(net, net.example)
    assert counted(found) == formulas(found) == net.macs
    assert found.macs == found.macs_before == found.counted == sum(net.macs.values())
    assert found.params == found.params_before == sum(p.numel() for p in net.parameters())
    assert (found.batch, found.conv_ratio, found.disagreements) == (2, 1.0, ())


def test_graph_and_python_model_give_the_same_profile(net: Net) -> None:
    traced = trace(net, net.example)
    assert isinstance(traced, torch.fx.GraphModule)
    assert numbers(profile(traced, net.example)) == numbers(profile(net, net.example))
    assert profile(traced, net.example).uncounted == profile(net, net.example).uncounted


@pytest.mark.parametrize("key", UNGROUPED)
@pytest.mark.parametrize(
    "make", [lambda net: net, halved, lambda net: fold(halved(net))], ids=["dense", "compressed", "folded"]
)
def test_total_is_that_of_the_flop_counter(make: Callable[[Net], nn.Module], key: str) -> None:
    net = build(key)
    model = make(net)
    assert profile(model, net.example).counted == torch_macs(model, net.example)


def test_compressed_net_has_the_formula_of_its_ranks(net: Net) -> None:
    found = profile(halved(net), net.example)
    assert found.disagreements == ()
    assert {layer.name: layer.macs_before for layer in found.layers} == net.macs
    assert found.params_before == sum(p.numel() for p in net.parameters())
    assert found.params == sum(p.numel() for p in halved(net).parameters())
    for layer in found.layers:
        for rank in layer.ranks:
            shape = trace(net).get_submodule(layer.name)
            fan_in, width = shape.weight[0].numel(), shape.out_channels
            assert layer.macs * width * fan_in == layer.macs_before * rank * (fan_in + width // shape.groups)
            assert layer.activations * width == layer.activations_before * (rank + width)
            assert layer.activations_before * fan_in == layer.macs_before


def test_compressed_python_net_has_the_profile_of_the_compressed_graph(net: Net) -> None:
    class Plain(nn.Module):
        """Calls the compressed net's modules from Python, so that no node is a layer."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    small = halved(net)
    inside, outside = profile(Plain(small), net.example), profile(small, net.example)
    renamed = {"(top level)": "inner"}
    assert counted(inside) == {
        renamed.get(name, f"inner.{name}"): macs for name, macs in counted(outside).items()
    }
    assert formulas(inside).keys() == counted(inside).keys()
    assert inside.disagreements == ()


def test_shared_conv_is_counted_for_each_call(shared_net: Net) -> None:
    found = profile(compress(shared_net, shared_net.example, layers="shared", size=2), shared_net.example)
    layer = found.layers[1]
    assert layer.counted == layer.macs == 2 * (8 * 8 + 4 * 4) * 2 * (72 + 8)
    assert layer.params == 2 * (72 + 8) + 8


def test_groups_are_counted_as_groups(grouped_net: Net) -> None:
    found = profile(compress(grouped_net, grouped_net.example, layers="conv2", size=4), grouped_net.example)
    assert found.layers[1].counted == 2 * 8 * 8 * (4 * 18 + 12 * 1)
    assert found.layers[1].break_even_rank == 12 * 72 / (72 + 12)


def test_linear_and_functional_convolution_are_layers_without_a_number(functional_net: Net) -> None:
    found = profile(functional_net, functional_net.example)
    rows = [(layer.number, layer.name, layer.kind, layer.note) for layer in found.layers]
    assert rows == [
        (1, "conv", "Conv2d", ""),
        (None, "(top level)", "FunctionalNet", "counted only"),
        (None, "head", "Linear", "counted only"),
    ]
    assert [layer.name for layer in found.convs] == ["conv"]
    small = profile(compress(functional_net, functional_net.example, size=2), functional_net.example)
    before, after = 2 * 8 * 8 * 8 * 27, 2 * 8 * 8 * 2 * (27 + 8)
    assert small.conv_ratio == after / before
    assert small.macs_before - small.macs == before - after


class Mixed(nn.Module):
    """Other operations that multiply: a transposed convolution, a Linear, two products, a Conv1d."""

    macs = 2 * (5 * 4 * 4 * 6 + 5 * 6 * 6 + 5 * 5 * 6 + 5 * 6 * 5) + 2 * 6 * 5 * 3

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose1d(4, 6, 4, stride=4)
        self.line = nn.Linear(6, 6, bias=False)
        self.slide = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(self.grow(x)[:, :, ::4].mT)
        return self.slide((y @ y.mT @ y).mT)


def test_other_products_are_counted() -> None:
    found = profile(nn.Sequential(Mixed()), torch.randn(2, 4, 5))
    assert found.counted == found.macs == Mixed.macs
    assert {layer.name: layer.kind for layer in found.layers} == {
        "0": "Mixed",
        "0.grow": "ConvTranspose1d",
        "0.line": "Linear",
        "0.slide": "Conv1d",
    }


def test_attention_is_counted_or_listed() -> None:
    """torch 2.8 has no formula for its CPU kernel, which then stands under ``uncounted``."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    found = profile(Attention(), torch.randn(2, 3, 5, 4))
    assert found.counted == 2 * 3 * 2 * 5 * 5 * 4 or "attention" in str(found.uncounted)


def test_work_between_the_layers_of_a_child_belongs_to_the_child() -> None:
    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel)

    net, example = nn.Sequential(nn.Sequential(Child(), nn.Conv2d(4, 2, 1))), torch.randn(2, 3, 5, 5)
    for model in (net, trace(net, example)):
        found = profile(model, example)
        assert {layer.name: (layer.kind, layer.counted, layer.params) for layer in found.layers} == {
            "0.1": ("Conv2d", 2 * 25 * 2 * 4, 10),
            "0.0": ("Child", 2 * 25 * 4 * 3, 12),
        }


class InThreads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(2) as pool:
            return self.last(sum(pool.map(self.inner, (x, x.flip(3)))))


def test_what_runs_in_another_thread_is_told() -> None:
    with pytest.warns(FxBasisWarning, match=r"^inner, inner.0: called in another thread, where nothing is"):
        found = profile(InThreads(), torch.zeros(1, 3, 8, 8))
    assert [layer.counted for layer in found.layers] == [0, 36 * 8 * 4]
    assert [layer.name for layer in found.disagreements] == ["inner.0"]


def test_what_is_not_counted_is_listed_with_how_often(plain_net: Net, residual_net: Net) -> None:
    assert profile(plain_net, plain_net.example).uncounted == {"aten.native_batch_norm": 1, "aten.relu": 1}
    found = profile(residual_net, residual_net.example)
    assert found.uncounted == {"aten.native_batch_norm": 1, "aten.relu": 2, "aten.add": 1}
    assert "not counted: aten.relu x2, " in str(found)


def test_a_conv_that_does_not_run_has_no_work(plain_net: Net) -> None:
    plain_net.spare = nn.Conv2d(3, 3, 3)
    found = profile(plain_net, plain_net.example)
    assert (found.layers[2].name, found.layers[2].macs, found.layers[2].counted) == ("spare", 0, 0)
    assert found.layers[2].note == "it is not called on these inputs"
    assert found.params == sum(p.numel() for p in plain_net.parameters())


@pytest.mark.parametrize("batch", [1, 3])
def test_work_is_that_of_the_whole_batch_which_is_stated(net: Net, batch: int) -> None:
    found = profile(net, torch.randn(batch, 3, 8, 8))
    assert found.batch == batch
    assert {name: macs * 2 for name, macs in counted(found).items()} == {
        name: macs * batch for name, macs in net.macs.items()
    }
    assert f"batch {batch}; FLOPs = 2 x MACs; formula = count" in found.summary()


def test_inputs_by_keyword(functional_net: Net) -> None:
    for model in (functional_net, trace(functional_net)):
        assert counted(profile(model, {"x": functional_net.example})) == functional_net.macs


def test_inputs_that_the_net_cannot_use_are_refused(plain_net: Net) -> None:
    for model in (plain_net, trace(plain_net)):
        with pytest.raises(
            InputError, match=r"failed on the example inputs \(\(2, 5, 8, 8\) float32 cpu\).*; pass inputs"
        ):
            profile(model, torch.randn(2, 5, 8, 8))


def test_a_disagreement_is_shouted_and_listed(plain_net: Net) -> None:
    small = compress(plain_net, plain_net.example, layers=[1, 2], size=2)
    basis = small.get_submodule("conv1.basis")
    basis.forward = lambda x: F.conv2d(x, basis.weight.repeat(1, 1, 1, 2), padding=(1, 3)).narrow(3, 0, 8)
    found = profile(small, plain_net.example)
    assert [layer.name for layer in found.disagreements] == ["conv1"]
    assert "FORMULA DIFFERS FROM COUNT" in found.summary()


def test_the_table_shows_numbers_ranks_and_ratios(plain_net: Net) -> None:
    found = profile(compress(plain_net, plain_net.example, layers="conv2", size=2), plain_net.example)
    text = found.table("github")
    row = next(line for line in text.splitlines() if " conv2 " in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    before, after = 2 * 36 * 6 * 72, 2 * 36 * 2 * (72 + 6)
    assert cells[:6] == ["2", "conv2", "Conv2d", "6x8x3x3", "output", "2"]
    assert cells[7:] == [f"{before:,}", f"{after:,}", f"{after:,}", f"{after / before:.3f}", "438", "162", ""]
    assert found.summary() in str(found)


def test_to_dict_is_plain(plain_net: Net) -> None:
    found = profile(plain_net, plain_net.example)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["unit"] == "MACs (FLOPs = 2 x MACs), whole batch"
    assert [layer["counted"] for layer in plain["layers"]] == list(plain_net.macs.values())
    assert (plain["macs"], plain["batch"], plain["params"]) == (found.macs, 2, found.params)


def test_profile_pass_writes_the_macs_of_each_node(net: Net) -> None:
    traced = trace(net, net.example)
    result = ProfilePass(net.example)(traced)
    assert result.graph_module is traced
    assert result.modified
    by_target: dict[str, int] = {}
    for node in traced.graph.nodes:
        name = node.target if node.op == "call_module" else "(top level)"
        by_target[name] = by_target.get(name, 0) + node.meta[MACS]
    assert {name: macs for name, macs in by_target.items() if macs} == net.macs
    assert all(type(node.meta[MACS]) is int for node in traced.graph.nodes)


def test_profile_pass_says_modified_only_when_a_count_changes(plain_net: Net) -> None:
    traced = trace(plain_net, plain_net.example)
    assert ProfilePass(plain_net.example)(traced).modified
    assert not ProfilePass(plain_net.example)(traced).modified
    assert not ProfilePass(torch.randn(2, 3, 8, 8))(traced).modified
    assert ProfilePass(torch.randn(3, 3, 8, 8))(traced).modified


def test_profile_pass_leaves_no_hook_and_no_statistics(plain_net: Net) -> None:
    traced = trace(plain_net.train(), plain_net.example)
    before = {name: buffer.tolist() for name, buffer in traced.named_buffers()}
    ProfilePass(plain_net.example)(traced)
    assert not [module for module in traced.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert {name: buffer.tolist() for name, buffer in traced.named_buffers()} == before
    assert traced.training


def test_profile_pass_runs_in_the_manager_of_fx(shared_net: Net) -> None:
    traced = trace(shared_net, shared_net.example)
    PassManager(passes=[ProfilePass(shared_net.example)], steps=2)(traced)
    calls = [node.meta[MACS] for node in traced.graph.find_nodes(op="call_module", target="shared")]
    assert calls == [2 * 64 * 8 * 72, 2 * 16 * 8 * 72]


def test_profile_pass_splits_a_form_between_its_nodes(plain_net: Net) -> None:
    small = compress(plain_net, plain_net.example, layers="conv2", size=2)
    ProfilePass(plain_net.example)(small)
    parts = {str(node.target): node.meta[MACS] for node in small.graph.nodes if "conv2" in str(node.target)}
    assert parts == {"conv2.basis": 2 * 36 * 2 * 72, "conv2.composition": 2 * 36 * 2 * 6}


def test_hooked_conv_is_profiled_through_its_form(plain_net: Net) -> None:
    plain_net.get_submodule("conv2").register_forward_hook(lambda *_: None)
    small = compress(plain_net, plain_net.example, layers="conv2", size=2)
    shape = profile(plain_net, plain_net.example).layers[1]
    layer = profile(small, plain_net.example).layers[1]
    assert layer.counted == layer.macs == 2 * 36 * 2 * (72 + 6)
    assert layer.macs_before == shape.macs
    ProfilePass(plain_net.example)(small)
    (node,) = small.graph.find_nodes(op="call_module", target="conv2")
    assert node.meta[MACS] == layer.counted


def test_profiling_twice_gives_the_same(net: Net) -> None:
    assert profile(net, net.example) == profile(net, net.example)


@pytest.mark.parametrize("form", ["output", "gauge", "reduced"])
def test_a_model_that_is_one_layer_is_counted_by_its_steps(form: str) -> None:
    conv, example = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 9, 9)
    found = profile(compress(conv, example, layers=1, form=form, size=6), example)
    assert len(found.layers) == 1
    assert not found.disagreements
