"""Every form on every convolution option: exact at full rank, folded, saved, counted; and what each costs."""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Net, close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv_options import CASES, Case, SideBySide, layout, modes, options, output
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxbasis import compress, export_onnx, fold, load, number_convs, plan_of, profile, save
from fxbasis.costs import ConvShape, dense_macs, dense_params
from fxbasis.errors import FxBasisWarning, LayerError, SelectionError
from fxbasis.fitting import fit
from fxbasis.forms import BasisConv2d
from fxbasis.passes.selection import select
from fxbasis.recipe import LayerPlan
from fxbasis.structures import (
    FORMS,
    break_even_rank,
    form_macs,
    form_params,
    saved_activations,
    training_macs,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*it is rewritten because it was asked for"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),
]

OTHERS = [form for form in FORMS if form != "output"]  # which has the grid of test_conv_options
METHODS = [(form, method) for form in FORMS for method in FORMS[form].methods]
WEIGHTS_ONLY = Case((6, 12, 3), 9, 4, {"groups": 6, "padding": 1})  # two filters in each group
GRID = CASES | {"two-filters": WEIGHTS_ONLY}

forms = pytest.mark.parametrize("form", OTHERS)
cases = pytest.mark.parametrize("key", GRID)
MODES = ("train", "frozen", "channels", "half", "bfloat", "float64", "unbatched", "batch")
kinds = pytest.mark.parametrize("key", [key for key in GRID if not any(mode in key for mode in MODES)])


@cache
def made(key: str, form: str, size: float, method: str | None = None) -> nn.Module:
    """Compressed once for all tests; these leave it as it is."""
    case = GRID[key]
    return compress(case.net(), case.example(), layers=1, form=form, size=size, method=method)


def form_of(model: nn.Module) -> BasisConv2d:
    (plan,) = plan_of(model).compressed
    return BasisConv2d({step.name: model.get_submodule(f"conv.{step.name}") for step in plan.steps})


@forms
@cases
def test_equals_the_original_at_full_rank(key: str, form: str) -> None:
    case, full = GRID[key], made(key, form, 1.0)
    largest = FORMS[form].largest_ranks(number_convs(case.net())[0].shape)
    free = 1 if form == "reduced" else len(largest)  # exact with any number of sums
    assert form_of(full).plan.ranks[:free] == largest[:free]
    for seed in (1, 2):
        assert close(output(case.net(), case.example(seed)), output(full, case.example(seed)))


@forms
@pytest.mark.parametrize("key", ["channels-last", "channels-last-groups"])
def test_channels_last_is_kept(key: str, form: str) -> None:
    case, model = GRID[key], made(key, form, 4)
    for example in (case.example(), case.example().contiguous()):
        assert output(model, example).stride() == output(case.net(), example).stride()


def test_one_filter_of_the_gauge_form_has_the_strides_of_the_convolution() -> None:
    """With one channel they are ambiguous; dropout draws its numbers in their order."""
    conv = nn.Conv2d(3, 1, 2).to(memory_format=torch.channels_last)
    example = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    form = compress(conv, example, layers=[1], size=1.0, form="gauge")
    assert form(example).stride() == conv(example).stride()


@pytest.mark.parametrize("form", ["output", "gauge", "weight"])
def test_channels_last_is_kept_where_padding_wraps_around_a_1x1(form: str) -> None:
    conv = nn.Conv2d(4, 2, 1, padding=1, padding_mode="circular").to(memory_format=torch.channels_last)
    example = torch.randn(1, 4, 9, 4).contiguous(memory_format=torch.channels_last)
    small = compress(conv, example, layers=1, form=form, size=1)
    assert output(small, example).stride() == output(conv, example).stride()


@pytest.mark.parametrize(("form", "method"), METHODS)
@pytest.mark.parametrize("key", ["plain", "groups", "groups-small-fan-in", "same-even-dilated", "1x5", "1x1"])
def test_every_method_is_exact_at_full_rank(key: str, form: str, method: str) -> None:
    case, full = GRID[key], made(key, form, 1.0, method)
    assert form_of(full).plan.method == method
    assert close(output(case.net(), case.example()), output(full, case.example()))


@forms
@cases
def test_fold_equals_what_it_folds_and_has_the_layout_of_the_original(key: str, form: str) -> None:
    case, net, model = GRID[key], GRID[key].net(), made(key, form, 0.5)
    folded = fold(model)
    assert type(folded.get_submodule("conv")) is nn.Conv2d
    for seed in (1, 2):
        assert close(output(model, case.example(seed)), output(folded, case.example(seed)))
    assert layout(dict(folded.named_parameters())) == layout(dict(net.named_parameters()))
    assert layout(folded.state_dict()) == layout(net.state_dict())
    assert form_of(model).weight.stride() == net.conv.weight.stride()
    assert modes(folded) == modes(net)
    for name in (*nn.Conv2d.__constants__, "transposed"):
        assert getattr(folded.get_submodule("conv"), name) == getattr(net.conv, name), name
        assert getattr(form_of(model), name) == getattr(net.conv, name), name


@forms
@pytest.mark.parametrize("key", [key for key in GRID if any(mode in key for mode in MODES)])
def test_dtype_gradients_and_modes_are_kept(key: str, form: str) -> None:
    net, model = GRID[key].net(), made(key, form, 0.5)
    trained = {"weight": net.conv.weight.requires_grad}
    if net.conv.bias is not None:
        trained["bias"] = net.conv.bias.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.dtype == net.conv.weight.dtype
        assert parameter.requires_grad == trained[name.rpartition(".")[2]]
    assert [name for name, _ in model.named_parameters() if name.endswith("bias")] == [
        "conv.composition.bias"
    ] * (net.conv.bias is not None)
    assert {module.training for module in form_of(model).factors.values()} == {net.conv.training}


@forms
@kinds
def test_save_and_load_are_bit_equal(key: str, form: str, tmp_path: Path) -> None:
    case, model = GRID[key], made(key, form, 0.5)
    loaded = load(case.net(), save(model, tmp_path / "saved"))
    assert torch.equal(output(loaded, case.example()), output(model, case.example()))
    assert layout(dict(loaded.named_parameters())) == layout(dict(model.named_parameters()))
    assert plan_of(loaded) == plan_of(model)


@forms
@kinds
def test_formula_of_the_work_equals_the_count(key: str, form: str) -> None:
    case, model = GRID[key], made(key, form, 0.5)
    dense, found = profile(case.net(), case.example()), profile(model, case.example())
    assert not found.disagreements
    assert found.macs_before == dense.macs > 0
    assert (found.params_before, found.params) == (dense.params, sum(p.numel() for p in model.parameters()))
    assert found.convs[0].activations_before == dense.convs[0].activations_before


@forms
@pytest.mark.parametrize("key", ["plain", "groups", "stride-2-1", "same-even", "1x1", "channels-last"])
def test_the_work_is_that_of_the_flop_counter(key: str, form: str) -> None:
    case, model = GRID[key], made(key, form, 0.5)
    with FlopCounterMode(display=False) as counter:
        output(model, case.example())
    apart = 0
    if form == "reduced":  # products entry by entry, which that counter does not know
        found = output(model, case.example())
        apart = found.numel() // found.shape[1] * form_of(model).plan.steps[-1].weights
    assert counter.get_total_flops() == 2 * (profile(model, case.example()).macs - apart)


@forms
def test_the_onnx_file_equals_the_model(form: str, tmp_path: Path) -> None:
    keys = options(torch.float32)
    model = SideBySide(keys, lambda net: net)
    model.nets = nn.ModuleList(made(key, form, 0.5) for key in keys)
    file = export_onnx(model, torch.randn(2, 8, 9, 8), tmp_path / "m.onnx")
    assert (file.exporter, file.dynamic_batch) == ("dynamo", True)


def everything(form: str, shape: ConvShape, ranks: tuple[int, ...], **settings: Any) -> BasisConv2d:
    """The form of a random convolution of this shape, stride (2, 1)."""
    options = {"stride": (2, 1), "groups": shape.groups, "bias": shape.bias}
    conv = nn.Conv2d(shape.in_channels, shape.out_channels, shape.kernel_size, **options)
    plan = LayerPlan(
        number=1,
        name="conv",
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        kernel_size=shape.kernel_size,
        groups=shape.groups,
        form=form,
        method=FORMS[form].methods[0],
        ranks=ranks,
        **settings,
    )
    return BasisConv2d.from_conv2d(conv, plan, fit(conv.weight, plan))


RANKS = {"tucker2": (3, 5), "tt": (3, 4, 5), "reduced": (4, 3)}


class Products(TorchDispatchMode):
    """Counts the results of products entry by entry."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.count += output.numel() if func is torch.ops.aten.mul.Tensor else 0
        return output


@pytest.mark.parametrize("fixed_basis", [False, True], ids=["trained", "fixed"])
@pytest.mark.parametrize("input_gradient", [True, False], ids=["inside", "first-layer"])
@pytest.mark.parametrize("form", FORMS)
def test_training_is_counted_as_autograd_does_it(form: str, input_gradient: bool, fixed_basis: bool) -> None:
    shape, ranks = ConvShape(6, 8, (3, 2)), RANKS.get(form, (4,))
    module = everything(form, shape, ranks, fixed_basis=fixed_basis)
    example = torch.randn(2, 6, 9, 7, requires_grad=input_gradient)
    with FlopCounterMode(display=False) as counter, Products() as products:
        found = module(example)
        found.backward(torch.ones_like(found))
    after = (found.shape[2], found.shape[3])
    trained = [not fixed_basis, *[True] * (len(module.plan.steps) - 1)]
    expected = training_macs(
        form, shape, ranks, after, (9, 7), 2, input_gradient=input_gradient, trained=trained
    )
    grouped = [step for step in module.plan.steps if step.groups > 1]
    positions = {"depthwise": prod(after), "vertical": after[0] * 7, "horizontal": prod(after)}
    over = sum(2 * positions[step.name] * step.weights * (step.groups - 1) for step in grouped)
    counted = counter.get_total_flops() + 2 * products.count
    assert counted in (2 * expected, 2 * (expected + over))  # torch 2.15 counts a grouped
    # convolution's weight gradient as many times as it has groups
    assert (module.basis.weight.grad is None) == fixed_basis


@pytest.mark.parametrize("fixed_basis", [False, True], ids=["trained", "fixed"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_activations_are_what_autograd_keeps(form: str, fixed_basis: bool) -> None:
    shape, ranks = ConvShape(6, 8, (3, 2)), RANKS.get(form, (4,))
    module = everything(form, shape, ranks, fixed_basis=fixed_basis)
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in weights and tensor.shape[-2:] != (1, 1):
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = module(torch.randn(2, 6, 9, 7, requires_grad=True))
    after = (found.shape[2], found.shape[3])
    assert sum(kept.values()) == saved_activations(form, shape, ranks, after, (9, 7), 2)


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([(1, 1), (3, 3), (1, 2)]),
)
@settings(deadline=None, max_examples=60)
def test_gauge_equals_output_and_is_cheaper_than_dense(
    channels: int, filters: int, groups: int, kernel: tuple[int, int]
) -> None:
    shape = ConvShape(groups * channels, groups * filters, kernel, groups)
    for rank in range(1, min(filters, shape.fan_in) + 1):
        ranks = (groups * rank,)
        macs = form_macs("gauge", shape, ranks, (5, 4), (5, 4))
        if rank < min(filters, shape.fan_in):
            assert macs < dense_macs(shape, (5, 4))
        torch.manual_seed(rank)
        weight = torch.randn(shape.out_channels, channels, *kernel, dtype=torch.float64)
        found = [_folded(form, shape, ranks, weight).detach() for form in ("output", "gauge")]
        assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-10


def _folded(form: str, shape: ConvShape, ranks: tuple[int, ...], weight: Tensor) -> Tensor:
    conv = nn.Conv2d(
        shape.in_channels, shape.out_channels, shape.kernel_size, groups=shape.groups, dtype=torch.float64
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
    plan = everything(form, shape, ranks).plan
    return BasisConv2d.from_conv2d(conv, plan, fit(conv.weight, plan)).weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cost", ["macs_ratio", "params_ratio"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_a_ratio_is_met_as_closely_as_ranks_allow(form: str, cost: str, ratio: float) -> None:
    table = number_convs(nn.Conv2d(12, 16, 3, stride=2, groups=2), torch.zeros(1, 12, 9, 8))
    record, layer = table[0], select(table, [1], form=form, **{cost: ratio}).layers[0]
    sizes = (record.output_size, record.input_size)

    def part(ranks: tuple[int, ...]) -> float:
        if cost == "params_ratio":
            return form_params(form, record.shape, ranks) / record.params
        return form_macs(form, record.shape, ranks, *sizes) / dense_macs(record.shape, record.output_size)

    largest = FORMS[form].largest_ranks(record.shape)
    lowest = (record.groups, 0) if form == "reduced" else tuple(record.groups for _ in largest)
    assert part(layer.ranks) <= ratio or layer.ranks == lowest
    more = tuple(min(rank + record.groups, most) for rank, most in zip(layer.ranks, largest, strict=True))
    if form == "reduced":
        more = (more[0], 4)  # a quarter of the outputs
    if len(largest) == 1 or form == "reduced":  # several grow in step
        assert part(more) > ratio or layer.ranks[0] == largest[0]


def test_a_fixed_basis_is_frozen_and_stays_so(net: Net, tmp_path: Path) -> None:
    small = compress(net, net.example, layers="re:.*", size=0.5, fixed_basis=True)
    for model in (small, load(net, save(small, tmp_path / "small"))):
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        basis = [trained for name, trained in flags.items() if name.endswith("basis.weight")]
        assert basis
        assert not any(basis)
        assert all(trained for name, trained in flags.items() if not name.endswith("basis.weight"))


def test_the_weight_form_shares_a_basis_among_the_filters_of_a_depthwise_layer(depthwise_net: Net) -> None:
    small = compress(depthwise_net, depthwise_net.example, layers="depthwise", form="weight", size=2)
    (layer,) = plan_of(small).compressed
    conv = depthwise_net.get_submodule("depthwise")
    filters, taps = conv.out_channels, prod(conv.kernel_size)
    assert sum(p.numel() for p in small.get_submodule("depthwise").parameters() if p.ndim == 4) == 2 * (
        filters + taps
    )
    assert layer.ranks == (2,)
    full = compress(depthwise_net, depthwise_net.example, layers="depthwise", form="weight", size=1.0)
    assert close(output(depthwise_net, depthwise_net.example), output(full, depthwise_net.example))


class Padded(nn.Conv2d):
    """Pads by itself, as timm's Conv2dSame does."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


def test_a_class_that_pads_by_itself_keeps_its_kernel_in_one_piece() -> None:
    model, example = nn.Sequential(Padded(4, 8, 3)), torch.randn(1, 4, 8, 8)
    for form in ("output", "gauge"):
        full = compress(model, example, layers=1, form=form, size=1.0)
        assert close(output(model, example), output(full, example))
    with pytest.raises(LayerError, match=r"prepares the input.*use form='output' or 'gauge'"):
        compress(model, example, layers=1, form="spatial")
    with pytest.warns(FxBasisWarning, match="nothing is compressed: unsupported: its class prepares"):
        compress(model, example, form="cp")


def test_two_ways_to_say_the_rank_are_refused(net: Net) -> None:
    with pytest.raises(SelectionError, match="macs_ratio and params_ratio both say the rank; pass one"):
        compress(net, net.example, macs_ratio=0.5, params_ratio=0.5)
    with pytest.raises(SelectionError, match=r"macs_ratio=1\.5 is no ratio in \(0, 1\]; pass"):
        compress(net, net.example, macs_ratio=1.5)
    with pytest.raises(SelectionError, match="method='svd' is not known for the cp form; choose one of als"):
        compress(net, net.example, form="cp", method="svd")


def test_forms_can_be_mixed_by_rules(residual_net: Net) -> None:
    net = residual_net
    rules: dict[Any, Any] = {"re:.*": {"form": "cp", "macs_ratio": 0.5}, 1: {"form": "gauge", "size": 2}}
    small = compress(net, net.example, layers=rules)
    first, *others = plan_of(small)
    assert (first.form, first.method) == ("gauge", "svd")
    assert {layer.form for layer in others} <= {"cp", "dense"}
    assert not profile(small, net.example).disagreements


@pytest.mark.parametrize("form", FORMS)
def test_hooks_of_the_layer_run_around_every_form(form: str) -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.randn(2, 3, 8, 8)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda module, args, output: output * 0.5)
    full = compress(model, example, layers=1, form=form, size=1.0)
    assert close(output(model, example), output(full, example))
    assert close(output(model, example), output(fold(full), example))


MATRIX = [form for form in FORMS if form not in ("cp", "cp4", "reduced")]


def planted() -> nn.Conv2d:
    """A convolution whose weight has rank 3 between its filters and the rest, and between channels too."""
    conv = nn.Conv2d(12, 16, 3, groups=1)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("or,ris,st->oit", *_factors()).reshape(16, 12, 3, 3))
    return conv


def _factors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(16, 3), torch.randn(3, 12, 9), torch.eye(9)


def test_energy_finds_the_rank_of_a_weight_and_keeps_what_it_says() -> None:
    conv, example = planted(), torch.randn(1, 12, 8, 8)
    found = compress(conv, example, layers=1, energy=1.0)
    assert plan_of(found).layers[0].ranks == (3,)
    assert close(output(conv, example), output(found, example))
    for energy in (0.3, 0.7, 0.95):
        conv = nn.Conv2d(12, 16, 3, groups=2)
        form = compress(conv, example, layers=1, energy=energy)
        (rank,) = plan_of(form).layers[0].ranks
        total, kept = (float(each.weight.detach().square().sum()) for each in (conv, fold(form)))
        assert kept >= energy * total * (1 - 1e-6)
        less = compress(conv, example, layers=1, size=rank - 2)
        assert float(fold(less).weight.detach().square().sum()) < energy * total


@pytest.mark.parametrize("form", MATRIX)
def test_energy_of_one_is_exact_in_every_form_with_matrices(form: str) -> None:
    conv, example = nn.Conv2d(8, 12, 3, groups=2), torch.randn(1, 8, 7, 7)
    full = compress(conv, example, layers=1, form=form, energy=1.0)
    assert plan_of(full).layers[0].ranks == FORMS[form].largest_ranks(ConvShape(8, 12, (3, 3), 2))
    assert close(output(conv, example), output(full, example))


def test_evbmf_finds_a_planted_rank_under_noise() -> None:
    conv, example = nn.Conv2d(32, 48, 3), torch.randn(1, 32, 7, 7)
    with torch.no_grad():
        conv.weight.copy_((torch.randn(48, 5) @ torch.randn(5, 288)).reshape(48, 32, 3, 3))
        conv.weight.add_(0.1 * torch.randn(48, 32, 3, 3))
    assert plan_of(compress(conv, example, layers=1, evbmf=True)).layers[0].ranks == (5,)
    with torch.no_grad():
        conv.weight.normal_()
    assert plan_of(compress(conv, example, layers=1, evbmf=True)).layers[0].ranks == (1,)


@pytest.mark.parametrize(("multiple", "expected"), [(1, 5), (4, 8), (16, 16), (64, 24)])
def test_ranks_are_rounded_up_to_a_multiple(multiple: int, expected: int) -> None:
    conv, example = nn.Conv2d(12, 24, 3), torch.randn(1, 12, 7, 7)
    small = compress(conv, example, layers=1, size=5, multiple=multiple)
    assert plan_of(small).layers[0].ranks == (expected,)


def test_under_a_ratio_of_costs_a_multiple_rounds_down() -> None:
    conv, example = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 8, 8)
    for rule in ("macs_ratio", "params_ratio"):
        plain = compress(conv, example, layers=1, **{rule: 0.5})
        small = compress(conv, example, layers=1, multiple=16, **{rule: 0.5})
        assert [plan_of(each).layers[0].ranks for each in (plain, small)] == [(28,), (16,)]
    least = compress(conv, example, layers=1, macs_ratio=0.1, multiple=16)
    assert plan_of(least).layers[0].ranks == (5,), "below the first multiple it stays"


@pytest.mark.parametrize(("rule", "what"), [("macs_ratio", "MACs"), ("params_ratio", "parameters")])
def test_a_ratio_out_of_reach_gives_the_least_and_the_reason(rule: str, what: str) -> None:
    table = number_convs(nn.Conv2d(16, 16, 3, bias=False), torch.zeros(1, 16, 9, 9))
    reason = f"{rule}=0.05 is out of reach: rank 1, the least, costs 0.0694 times its dense {what}"
    with pytest.warns(FxBasisWarning, match=rf"conv 1.*: {reason}; it is rewritten because it was asked"):
        named = select(table, [1], **{rule: 0.05}).layers[0]
    assert named == select(table, **{rule: 0.05}).layers[0], "under all without a warning"
    assert (named.ranks, named.reason) == ((1,), reason)
    assert select(table, [1], **{rule: 0.07}).layers[0].reason == ""


def test_rules_that_need_weights_or_matrices_say_so(net: Net) -> None:
    for form, rule in (("cp", {"energy": 0.9}), ("reduced", {"energy": 0.9}), ("reduced", {"evbmf": True})):
        with pytest.raises(SelectionError, match=rf"has no meaning for the {form} form.*use size="):
            compress(net, net.example, layers=1, form=form, **rule)
    with pytest.raises(SelectionError, match="energy needs the weights; use compress"):
        select(number_convs(net, net.example), 1, energy=0.9)
    with pytest.raises(SelectionError, match=r"multiple=0 is no whole number from 1; pass"):
        compress(net, net.example, layers=1, multiple=0)
    with pytest.raises(SelectionError, match="energy and evbmf both say the rank; pass one of them"):
        compress(net, net.example, layers=1, energy=0.5, evbmf=True)
    with torch.no_grad():
        net.get_submodule(number_convs(net)[0].name).weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(LayerError, match="1 of its weights are NaN or infinite; repair"):
        compress(net, net.example, layers=1, energy=0.9)


@pytest.mark.parametrize("form", ["output", "weight", "reduced", "input", "spatial", "cp", "cp4"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_form_is_cheaper_exactly_below_its_break_even_rank(form: str, stride: int) -> None:
    shape, before = ConvShape(6, 8, (3, 2), groups=2), (8, 6)
    after = (before[0] // stride, before[1] // stride)
    sums = (4,) if form == "reduced" else ()
    even = break_even_rank(form, shape, after, before, *sums)
    assert even is not None
    for rank in range(2, 80, 2):
        macs = form_macs(form, shape, (rank, *sums), after, before)
        cheaper = macs < dense_macs(shape, after)
        if form == "weight":
            cheaper = form_params(form, shape, (rank,)) < dense_params(shape)
        assert cheaper == (rank < even)


def test_the_profile_has_the_break_even_rank_of_the_form() -> None:
    conv, example = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 8, 8)
    found = {form: profile(compress(conv, example, layers=1, form=form, size=4), example) for form in FORMS}
    even = {form: each.layers[0].break_even_rank for form, each in found.items()}
    assert even["output"] == even["weight"] == even["input"] == 57.6
    assert even["reduced"] == pytest.approx(64 - (64 + 16) / 576)
    assert (even["gauge"], even["spatial"], even["tucker2"], even["tt"]) == (64.0, 96.0, None, None)


class TiedDepthwise(nn.Module):
    """Two depthwise convolutions with one weight, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.idle = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_the_weight_form_of_depthwise_layers_keeps_ties_and_leaves_what_never_runs() -> None:
    model, example = TiedDepthwise(), torch.randn(1, 4, 6, 6)
    assert [record.reason for record in number_convs(model, example)] == [
        "its parameter is also two.weight",
        "its parameter is also one.weight",
        "it is not called on these inputs",
    ]
    with pytest.warns(FxBasisWarning, match="nothing is compressed"):
        same = compress(model, example, layers="re:.*", form="weight", size=2)
    assert same.get_submodule("one").weight is same.get_submodule("two").weight
