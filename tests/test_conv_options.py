"""The heart of the promise: every option of Conv2d, by every method, from compress to save and back.

Each case is one convolution between two elementwise operations. ``full`` is compressed at the largest
useful rank and must equal the original, which catches an option that rewrite and fold lose alike;
``small`` has a lower rank and must equal its own fold.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Net, close
from torch import Tensor, nn

from fxbasis import compress, export_onnx, fold, load, number_convs, profile, save, trace
from fxbasis.bases import decompose
from fxbasis.errors import FxBasisWarning, LayerError, VerificationError
from fxbasis.forms import BasisConv2d
from fxbasis.recipe import LayerPlan
from fxbasis.structures import FORMS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*it is rewritten because it was asked for"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),
]


class OneConv(nn.Module):
    """One convolution, whose channel counts and options are the case."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Any, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * 2).tanh()


@dataclass(frozen=True)
class Case:
    """Arguments of Conv2d, its largest useful rank and a lower one, and what is done to the net."""

    conv: tuple[int, int, Any]
    full: int
    small: int
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], Any] = nn.Module.eval
    dtype: torch.dtype = torch.float32
    image: tuple[int, ...] = (2, -1, 9, 8)
    channels_last: bool = False

    def net(self) -> OneConv:
        torch.manual_seed(0)
        net = OneConv(*self.conv, **self.options).to(self.dtype).eval()
        if self.channels_last:
            net = net.to(memory_format=torch.channels_last)
        self.prepare(net)
        return net

    def example(self, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = [self.conv[0] if size == -1 else size for size in self.image]
        example = torch.randn(shape, generator=generator).to(self.dtype)
        return example.to(memory_format=torch.channels_last) if self.channels_last else example


def freeze(net: nn.Module) -> None:
    net.requires_grad_(False)


def freeze_weight(net: nn.Module) -> None:
    net.get_submodule("conv").weight.requires_grad_(False)


def freeze_bias(net: nn.Module) -> None:
    net.get_submodule("conv").bias.requires_grad_(False)


def train_net_eval_conv(net: nn.Module) -> None:
    net.train().get_submodule("conv").eval()


def eval_net_train_conv(net: nn.Module) -> None:
    net.get_submodule("conv").train()


PAD = {"padding": (2, 1)}
CASES = {
    "plain": Case((4, 8, 3), 8, 3),
    "no-bias": Case((4, 8, 3), 8, 3, {"bias": False}),
    "groups": Case((8, 12, 3), 12, 4, {"groups": 4, "padding": 1}),
    "groups-no-bias": Case((8, 12, 3), 12, 8, {"groups": 4, "bias": False}),
    "groups-small-fan-in": Case((4, 12, 1), 4, 2, {"groups": 2}),
    "groups-reflect": Case((8, 12, 3), 12, 4, {"groups": 4, **PAD, "padding_mode": "reflect"}),
    "depthwise-multiplier": Case((3, 12, 3), 12, 6, {"groups": 3}),
    "stride-2-1": Case((4, 8, 3), 8, 3, {"stride": (2, 1)}),
    "stride-1-3-groups": Case((4, 8, 3), 8, 4, {"stride": (1, 3), "groups": 2, "padding": 1}),
    "dilation": Case((4, 8, 3), 8, 3, {"dilation": 2}),
    "dilation-1-3": Case((4, 8, 3), 8, 3, {"dilation": (1, 3), "padding": (0, 3)}),
    "padding-2-1": Case((4, 8, 3), 8, 3, PAD),
    "same": Case((4, 8, 3), 8, 3, {"padding": "same"}),
    "same-even": Case((4, 8, (2, 4)), 8, 3, {"padding": "same"}),
    "same-even-dilated": Case((4, 8, (2, 4)), 8, 3, {"padding": "same", "dilation": (3, 1)}),
    "same-even-circular": Case((4, 8, (2, 4)), 8, 3, {"padding": "same", "padding_mode": "circular"}),
    "valid": Case((4, 8, 3), 8, 3, {"padding": "valid"}),
    "valid-reflect": Case((4, 8, 3), 8, 3, {"padding": "valid", "padding_mode": "reflect"}),
    "reflect": Case((4, 8, 3), 8, 3, {**PAD, "padding_mode": "reflect"}),
    "replicate": Case((4, 8, 3), 8, 3, {**PAD, "padding_mode": "replicate"}),
    "circular": Case((4, 8, 3), 8, 3, {**PAD, "padding_mode": "circular"}),
    "circular-strided": Case((4, 8, 3), 8, 3, {**PAD, "padding_mode": "circular", "stride": (2, 1)}),
    "1x1": Case((6, 8, 1), 6, 3),
    "1x1-strided": Case((6, 8, 1), 6, 3, {"stride": 2}),
    "1x1-padded": Case((6, 8, 1), 6, 3, {"padding": 1}),
    "1x5": Case((2, 8, (1, 5)), 8, 3, {"padding": (0, 2)}),
    "5x1": Case((2, 8, (5, 1)), 8, 3),
    "even": Case((4, 8, (4, 2)), 8, 3),
    "whole-image": Case((2, 8, (9, 8)), 8, 3),
    "one-input-channel": Case((1, 8, 2), 4, 2),
    "one-output-channel": Case((4, 1, 3), 1, 1),
    "one-channel-each": Case((1, 1, 1), 1, 1),
    "float64": Case((4, 8, 3), 8, 3, dtype=torch.float64),
    "float64-groups": Case((8, 12, 3), 12, 4, {"groups": 4}, dtype=torch.float64),
    "half": Case((4, 8, 3), 8, 3, dtype=torch.half),
    "half-groups": Case((8, 12, 3), 12, 4, {"groups": 4}, dtype=torch.half),
    "bfloat16": Case((4, 8, 3), 8, 3, dtype=torch.bfloat16),
    "channels-last": Case((4, 8, 3), 8, 3, channels_last=True),
    "channels-last-1x1": Case((4, 8, 1), 4, 3, channels_last=True),
    "channels-last-one-input-channel": Case((1, 8, 3), 8, 3, channels_last=True),
    "channels-last-groups": Case((8, 12, 3), 12, 4, {"groups": 4}, channels_last=True),
    "unbatched": Case((4, 8, 3), 8, 3, image=(-1, 9, 8)),
    "batch-of-one": Case((4, 8, 3), 8, 3, image=(1, -1, 9, 8)),
    "frozen": Case((4, 8, 3), 8, 3, prepare=freeze),
    "frozen-weight": Case((4, 8, 3), 8, 3, prepare=freeze_weight),
    "frozen-bias": Case((4, 8, 3), 8, 3, prepare=freeze_bias),
    "train": Case((4, 8, 3), 8, 3, prepare=nn.Module.train),
    "train-net-eval-conv": Case((4, 8, 3), 8, 3, prepare=train_net_eval_conv),
    "eval-net-train-conv": Case((4, 8, 3), 8, 3, prepare=eval_net_train_conv),
}

cases = pytest.mark.parametrize("key", CASES)
methods = pytest.mark.parametrize("method", FORMS["gauge"].methods)


@cache
def compressed(key: str, method: str, rank: int) -> nn.Module:
    """Compressed once, by number or by name, for all tests; these leave it as it is."""
    case = CASES[key]
    layers = 1 if rank == case.full else "conv"
    return compress(case.net(), case.example(), layers=layers, size=rank, method=method)


def small(key: str, method: str = "svd") -> nn.Module:
    return compressed(key, method, CASES[key].small)


def output(model: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        return model(example)


def layout(tensors: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """Names, shapes, strides, dtypes and gradient flags, in order."""
    return [(name, t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in tensors.items()]


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@methods
@cases
def test_equals_the_original_at_full_rank(key: str, method: str) -> None:
    case = CASES[key]
    full = compressed(key, method, case.full)
    assert (
        full.get_submodule("conv.basis").out_channels
        == case.full
        == number_convs(case.net())[0].shape.largest_rank
    )
    for seed in (1, 2):
        assert close(output(case.net(), case.example(seed)), output(full, case.example(seed)))


@methods
@cases
def test_fold_equals_what_it_folds(key: str, method: str) -> None:
    case, model = CASES[key], small(key, method)
    folded = fold(model)
    assert type(folded.get_submodule("conv")) is nn.Conv2d
    for seed in (1, 2):
        assert close(output(model, case.example(seed)), output(folded, case.example(seed)))


@methods
@pytest.mark.parametrize("key", ["plain", "groups", "groups-small-fan-in"])
def test_the_basis_is_that_of_the_method(key: str, method: str) -> None:
    conv, rank = CASES[key].net().conv, CASES[key].small
    form = small(key, method).get_submodule("conv")
    factors = decompose(conv.weight, conv.groups, method).factors(rank // conv.groups)
    assert torch.equal(form.basis.weight.flatten(), factors.basis.float().flatten())
    assert torch.equal(form.composition.weight.flatten(), factors.composition.float().flatten())
    assert form.plan.method == method
    assert form.plan.rank == form.basis.out_channels == rank


@methods
@cases
def test_folding_twice_changes_nothing_more(key: str, method: str) -> None:
    folded = fold(small(key, method))
    again = fold(folded)
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), again.parameters(), strict=True))


@cases
def test_fold_has_the_parameters_of_the_original(key: str) -> None:
    net, folded = CASES[key].net(), fold(small(key))
    assert layout(dict(folded.named_parameters())) == layout(dict(net.named_parameters()))
    assert layout(folded.state_dict()) == layout(net.state_dict())
    net.load_state_dict(folded.state_dict())
    example = CASES[key].example()
    assert torch.equal(output(net, example), output(folded, example))


@cases
def test_fold_has_the_options_of_the_original(key: str) -> None:
    conv, folded = CASES[key].net().conv, fold(small(key)).get_submodule("conv")
    for name in (*nn.Conv2d.__constants__, "transposed"):
        assert getattr(folded, name) == getattr(conv, name), name


@cases
def test_options_stay_on_the_basis_and_the_bias_on_the_composition(key: str) -> None:
    conv, model = CASES[key].net().conv, small(key)
    basis, composition = model.get_submodule("conv.basis"), model.get_submodule("conv.composition")
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "in_channels"):
        assert getattr(basis, name) == getattr(conv, name), name
    assert basis.bias is None
    assert (composition.kernel_size, composition.stride, composition.padding) == ((1, 1), (1, 1), (0, 0))
    assert (composition.groups, composition.padding_mode) == (conv.groups, "zeros")
    assert composition.out_channels == conv.out_channels
    assert (composition.bias is None) == (conv.bias is None)
    assert conv.bias is None or torch.equal(composition.bias, conv.bias)


@cases
def test_dtype_layout_gradients_and_modes_are_kept(key: str) -> None:
    net, model = CASES[key].net(), small(key)
    weights = [model.get_parameter(f"conv.{part}.weight") for part in ("basis", "composition")]
    for weight in weights:
        assert weight.dtype == net.conv.weight.dtype
        assert weight.requires_grad == net.conv.weight.requires_grad
    if net.conv.bias is not None:
        assert model.get_parameter("conv.composition.bias").requires_grad == net.conv.bias.requires_grad
    assert modes(fold(model)) == modes(net)
    assert {name: mode for name, mode in modes(model).items() if name in modes(net)} == modes(net)
    assert modes(model)["conv.basis"] == modes(model)["conv.composition"] == net.conv.training


@pytest.mark.parametrize("key", [key for key in CASES if CASES[key].channels_last])
def test_channels_last_is_kept(key: str) -> None:
    case = CASES[key]
    net, model = case.net(), small(key)
    for example in (case.example(), case.example().contiguous()):
        stride = output(net, example).stride()
        assert output(model, example).stride() == stride
        assert output(fold(model), example).stride() == stride
    weight = fold(model).get_parameter("conv.weight")
    assert weight.stride() == net.conv.weight.stride()
    assert model.get_parameter("conv.basis.weight").is_contiguous(memory_format=torch.channels_last)


@methods
@cases
def test_save_and_load_are_bit_equal(key: str, method: str, tmp_path: Path) -> None:
    case, model = CASES[key], small(key, method)
    loaded = load(case.net(), save(model, tmp_path / "saved"))
    assert torch.equal(output(loaded, case.example()), output(model, case.example()))
    assert layout(dict(loaded.named_parameters())) == layout(dict(model.named_parameters()))
    assert modes(loaded) == modes(model)


@cases
def test_formula_of_the_work_equals_the_count(key: str) -> None:
    case = CASES[key]
    dense, found = profile(case.net(), case.example()), profile(small(key), case.example())
    assert not dense.disagreements
    assert not found.disagreements
    assert found.macs_before == dense.macs == dense.counted > 0
    assert found.params_before == dense.params
    fan_in, groups = case.net().conv.weight[0].numel(), case.net().conv.groups
    ratio = case.small / case.conv[1] * (1 + case.conv[1] / (groups * fan_in))
    assert found.macs / found.macs_before == pytest.approx(ratio, rel=1e-12)


class SideBySide(nn.Module):
    """Every case of one dtype in one file, which costs a fraction of a file for each; 2 x 8 x 9 x 8 in."""

    def __init__(self, keys: list[str], way: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.widths = {key: CASES[key].conv[0] for key in keys}
        self.nets = nn.ModuleList(way(small(key)) for key in keys)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pairs = zip(self.nets, self.widths.items(), strict=True)
        return {key: net(x[:, :width]) for net, (key, width) in pairs}


def keep(model: nn.Module) -> nn.Module:
    return model


def options(dtype: torch.dtype) -> list[str]:
    """The cases that differ in what is computed, not in modes, frozen parameters or memory format."""
    alike = ("train", "frozen", "channels-last", "unbatched", "batch")
    return [key for key, case in CASES.items() if case.dtype == dtype and not any(a in key for a in alike)]


FOLDED = ["groups-reflect", "circular-strided", "same-even-dilated", "stride-1-3-groups"]
FILES = {
    "float32": (options(torch.float32), keep),
    "half": (options(torch.half), keep),
    "folded": (FOLDED, fold),
}


@pytest.mark.parametrize("name", FILES)
def test_the_onnx_file_equals_the_model(name: str, tmp_path: Path) -> None:
    keys, way = FILES[name]
    model, example = SideBySide(keys, way), torch.randn(2, 8, 9, 8).to(CASES[keys[0]].dtype)
    file = export_onnx(model, example, tmp_path / "m.onnx")
    assert (file.exporter, file.dynamic_batch) == ("dynamo", True)
    assert [output.name for output in onnx.load(file.path).graph.output] == keys


@pytest.mark.parametrize("key", ["unbatched", "channels-last-groups"])
def test_the_onnx_file_of_one_case_equals_the_model(key: str, tmp_path: Path) -> None:
    batched = len(CASES[key].image) == 4
    file = export_onnx(small(key), CASES[key].example(), tmp_path / "m.onnx", dynamic_batch=batched)
    assert file.exporter == "dynamo"


def state(model: nn.Module) -> list[Any]:
    """Everything of a model that a caller could see change, and the random states."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, id(t), t.tolist(), t.stride(), t.dtype, t.requires_grad, t.grad) for name, t in tensors],
        [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)],
        modes(model),
        [dict(module._forward_hooks) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    ]


def whole_way(model: nn.Module, example: Tensor, folder: Path) -> None:
    traced = trace(model, example)
    number_convs(model, example)
    profile(model, example)
    compressed = compress(traced, example, layers="re:.*", size=1.0)
    compressed = compress(model, example, layers="re:.*", size=0.5)
    before = state(compressed)
    profile(compressed, example)
    fold(compressed)
    load(model, save(compressed, folder))
    assert state(compressed) == before


@pytest.mark.parametrize("key", ["channels-last-1x1", "half", "frozen-weight", "eval-net-train-conv"])
def test_the_original_is_untouched(key: str, tmp_path: Path) -> None:
    case = CASES[key]
    net, calls = case.net(), []
    net.conv.register_forward_hook(lambda *_: calls.append(1) and None)
    before = state(net)
    whole_way(net, case.example(), tmp_path / "saved")
    assert state(net) == before


def test_the_original_net_is_untouched(net: Net, tmp_path: Path) -> None:
    net.train()
    next(module for module in net.modules() if isinstance(module, nn.Conv2d)).eval()
    before = state(net)
    whole_way(net, net.example, tmp_path / "saved")
    assert state(net) == before


def test_a_refusal_leaves_the_original_untouched(depthwise_net: Net) -> None:
    before = state(depthwise_net)
    with pytest.raises(LayerError):
        compress(depthwise_net, depthwise_net.example, layers=["expand", "depthwise"])
    assert state(depthwise_net) == before


@methods
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_all_layers_at_full_rank_equal_the_original(net: Net, training: bool, method: str) -> None:
    full = compress(net, net.example, layers="re:.*", size=1.0, method=method)
    left = [record.name for record in number_convs(full) if record.status != "compressed"]
    assert left == [name for name in net.macs if name == "depthwise"]
    for model in (full, fold(full)):
        assert close(
            output(copy.deepcopy(net).train(training), net.example),
            output(copy.deepcopy(model).train(training), net.example),
        )


def test_fold_has_the_state_dict_of_the_net(net: Net) -> None:
    small = compress(net, net.example, layers="re:.*")
    assert layout(fold(small).state_dict()) == layout(net.state_dict())
    assert close(output(small, net.example), output(fold(small), net.example))
    net.load_state_dict(fold(small).state_dict())
    assert close(output(small, net.example), output(net, net.example))


def test_fold_leaves_no_mark_behind(net: Net) -> None:
    folded = fold(compress(net, net.example, layers=1, size=2))
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    for name in convs:
        assert sorted(vars(folded.get_submodule(name))) == sorted(vars(net.get_submodule(name)))


DEPTHWISE = "depthwise: a group of one filter has no smaller basis"


@pytest.mark.parametrize("layers", ["all", "re:.*", lambda record: True], ids=["all", "pattern", "function"])
def test_depthwise_is_left_alone_with_a_reason(depthwise_net: Net, layers: Any) -> None:
    small = compress(depthwise_net, depthwise_net.example, layers=layers, size=2)
    record = number_convs(small, depthwise_net.example)[1]
    assert (record.name, record.status, record.reason) == ("depthwise", "unsupported", DEPTHWISE)
    assert [record.status for record in number_convs(small)] == ["compressed", "unsupported", "compressed"]
    assert torch.equal(
        small.get_parameter("depthwise.weight"), depthwise_net.get_parameter("depthwise.weight")
    )


@pytest.mark.parametrize("layers", [2, "depthwise", "1-3", ["project", "depthwise"]], ids=str)
def test_depthwise_asked_for_is_refused(depthwise_net: Net, layers: Any) -> None:
    message = rf"conv 2 \(depthwise\), weight \(12, 1, 3, 3\) cannot be rewritten: {DEPTHWISE}; leave it out"
    with pytest.raises(LayerError, match=message):
        compress(depthwise_net, depthwise_net.example, layers=layers)


def complex_case() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, dtype=torch.complex64))
    return net.eval(), torch.randn(2, 2, 6, 6, dtype=torch.complex64)


def test_complex_is_left_alone_with_a_reason() -> None:
    net, example = complex_case()
    with pytest.warns(FxBasisWarning, match="nothing is compressed: unsupported.*its weight is complex64"):
        small = compress(net, example)
    assert torch.equal(output(small, example), output(net, example))


def test_complex_asked_for_is_refused() -> None:
    net, example = complex_case()
    with pytest.raises(
        LayerError, match=r"conv 1 \(0\).* cannot be rewritten: its weight is complex64; leave"
    ):
        compress(net, example, layers=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_is_kept() -> None:
    case = CASES["groups-reflect"]
    net, example = case.net().cuda(), case.example().cuda()
    small = compress(net, example, layers=1, size=case.small)
    assert {parameter.device.type for parameter in [*small.parameters(), *fold(small).parameters()]} == {
        "cuda"
    }
    assert close(output(small, example).cpu(), output(fold(small), example).cpu())


def test_a_shared_conv_stays_one_layer_at_both_calls(shared_net: Net) -> None:
    small = compress(shared_net, shared_net.example, layers="shared", size=4)
    targets = [str(node.target) for node in small.graph.nodes if node.op == "call_module"]
    assert targets.count("shared.basis") == targets.count("shared.composition") == 2
    assert [record.calls for record in number_convs(small, shared_net.example)] == [1, 2]


def test_aliases_stay_one_object(aliased_net: Net) -> None:
    small = compress(aliased_net, aliased_net.example, layers="first", size=4)
    assert small.get_submodule("first") is small.get_submodule("second")
    assert isinstance(small.get_submodule("first"), BasisConv2d)
    folded = fold(small)
    assert folded.get_submodule("first") is folded.get_submodule("second")
    assert type(folded.get_submodule("first")) is nn.Conv2d


@pytest.mark.parametrize(
    ("key", "option", "value"),
    [
        ("groups-reflect", "padding_mode", "zeros"),
        ("stride-2-1", "stride", (2, 2)),
        ("dilation", "dilation", (1, 1)),
        ("padding-2-1", "padding", (1, 2)),
        ("plain", "bias", None),
    ],
)
def test_compress_itself_names_the_layer_that_lost_an_option(
    key: str, option: str, value: Any, monkeypatch: Any
) -> None:
    def careless(conv: nn.Conv2d, plan: LayerPlan) -> BasisConv2d:
        other = copy.deepcopy(conv)
        setattr(other, option, value)
        return make(other, plan)

    case, make = CASES[key], BasisConv2d.empty_like
    monkeypatch.setattr(BasisConv2d, "empty_like", careless)
    with pytest.raises(VerificationError, match=r"conv 1 \(conv\), weight .* against its fold: "):
        compress(case.net(), case.example(), layers=1, size=case.small)
