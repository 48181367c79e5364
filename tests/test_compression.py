"""The whole way on torchvision models: identities of rewrite, fold, save and load."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxbasis
from fxbasis import InputError, VerificationError, compress, number_convs, profile, trace
from fxbasis.comparing import difference
from fxbasis.running import run

Maker = Callable[[str], nn.Module]
MODELS = [
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "googlenet",
]


def fresh(name: str) -> nn.Module:
    """A seeded model as torchvision initialises it, in eval mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None).eval()
    if name == "vgg11_bn":
        model.classifier = nn.Linear(25088, 10)  # its own has half a gigabyte, and no convolution
    return model


def settled(name: str) -> nn.Module:
    """In double precision, with BatchNorm statistics of noise images, so that every activation has a scale.

    Double, because a random network behind such statistics multiplies a rounding by a few hundred.
    """
    model = fresh(name).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64).double())
    return model.eval()


def example_of(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=next(model.parameters()).dtype)


pytestmark = pytest.mark.filterwarnings("ignore:.*(stays Python|its dense MACs)")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("make", "allowed"), [(fresh, 1e-5), (settled, 1e-12)], ids=["float32", "float64"])
def test_full_rank_equals_the_original_and_its_fold(name: str, make: Maker, allowed: float) -> None:
    model = make(name)
    example, before = example_of(model), copy.deepcopy(model.state_dict())
    full = fxbasis.compress(model, example, layers="re:.*", size=1.0)
    assert isinstance(full, torch.fx.GraphModule)
    left = [record for record in fxbasis.number_convs(full, example) if record.status != "compressed"]
    assert all("depthwise" in record.reason or "not called" in record.reason for record in left)
    folded = fxbasis.fold(full)
    assert difference(run(model, example), run(full, example)).relative < allowed
    assert difference(run(full, example), run(folded, example)).relative < allowed
    assert list(folded.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_equals_the_original_in_train_mode(name: str) -> None:
    model = settled(name)
    example = example_of(model)
    full = fxbasis.compress(model, example, layers="re:.*", size=1.0)
    expected, actual = (run(copy.deepcopy(net), example, training=True) for net in (model, full))
    assert difference(expected, actual).relative < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_half_rank_is_cheaper_loads_bit_equal_and_folds(name: str, tmp_path: Path) -> None:
    model = settled(name)
    example = example_of(model)
    small = fxbasis.compress(model, example)
    work = fxbasis.profile(small, example)
    assert work.macs < work.macs_before
    assert not work.disagreements
    loaded = fxbasis.load(model, fxbasis.save(small, tmp_path))
    assert torch.equal(run(loaded, example), run(small, example))
    model.load_state_dict(fxbasis.fold(small).state_dict())
    assert difference(run(small, example), run(model, example)).relative < 1e-12


def test_resnet18_at_half_size_costs_what_the_closed_form_says() -> None:
    model, example = fresh("resnet18"), torch.randn(1, 3, 224, 224)
    small = fxbasis.compress(model, example, layers=lambda conv: conv.index > 1 and max(conv.kernel_size) > 1)
    work = fxbasis.profile(small, example)
    assert round(work.conv_ratio, 3) == 0.595
    assert work.counted == work.macs


def test_downsample_layers_are_left_alone_unless_asked_for() -> None:
    model, example = fresh("resnet18"), torch.randn(1, 3, 64, 64)
    table = fxbasis.number_convs(fxbasis.compress(model, example), example)
    for number in (8, 13, 18):
        assert table[number - 1].status == "ok"
        assert "costs 1.50 times its dense MACs" in table[number - 1].reason
    with pytest.warns(fxbasis.FxBasisWarning, match=r"conv 8 \(layer2.0.downsample.0\).* 1.50 times"):
        asked = fxbasis.compress(model, example, layers="8")
    assert fxbasis.number_convs(asked)[7].status == "compressed"


def test_nothing_selected_equals_the_original_and_says_so() -> None:
    model, example = fresh("resnet18"), torch.randn(1, 3, 64, 64)
    with pytest.warns(fxbasis.FxBasisWarning, match="nothing is compressed: not selected"):
        same = fxbasis.compress(model, example, layers={"all": None})
    assert torch.equal(run(same, example), run(model, example))


def test_a_model_without_convolutions_is_copied_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(fxbasis.FxBasisWarning, match="the model has no Conv2d"):
        same = fxbasis.compress(model, torch.randn(2, 4))
    assert torch.equal(same(torch.ones(1, 4)), model(torch.ones(1, 4)))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            torch.zeros(1, 1, 64, 64),
            r"the model failed on the example inputs \(\(1, 1, 64, 64\) float32 cpu\)",
        ),
        ([torch.zeros(1, 3, 64, 64)], "example_inputs is a list; pass a tensor"),
        (None, "compress needs example_inputs"),
    ],
    ids=["wrong shape", "list", "none"],
)
def test_inputs_that_the_model_cannot_use(example, message: str) -> None:
    with pytest.raises(fxbasis.InputError, match=message):
        fxbasis.compress(fresh("resnet18"), example)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_before_anything_changes(bad: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = bad
    with pytest.raises(fxbasis.LayerError, match=r"conv 2 \(1\), weight \(16, 16, 3, 3\): 1 of its weights"):
        fxbasis.compress(model, torch.randn(1, 3, 8, 8))


def test_a_layer_whose_terms_cancel_is_proven_by_their_size() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 1, 1, bias=False)
    aligned = conv.weight.detach()
    cancelling = aligned.flip(1) * torch.tensor([1.0, -0.9999])[:, None, None]
    small = fxbasis.compress(conv, cancelling, layers=1, size=1.0, form="input")
    assert difference(conv(cancelling), small(cancelling)).relative > 1e-5, "the terms are far larger"
    assert difference(conv(aligned), small(aligned)).relative < 1e-6


class Doubles(nn.Conv2d):
    """Convolves twice its input where it has a bias: its basis, without one, would not."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.bias is None else 2 * input)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_an_example_that_tells_nothing_proves_nothing(value: float) -> None:
    model = nn.Sequential(Doubles(3, 8, 3), nn.ReLU()).eval()
    with pytest.raises(VerificationError, match=r"conv 1 \(0\).*against its fold: outputs differ"):
        compress(model, torch.full((2, 3, 8, 8), value), layers=[1], size=1.0)


def test_features_that_are_zero_prove_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Doubles(4, 8, 3)).eval()
    nn.init.constant_(model[0].bias, -100.0)
    with pytest.raises(VerificationError, match=r"conv 2 \(2\).*against its fold: outputs differ"):
        compress(model, torch.rand(2, 3, 8, 8), layers=[2], size=1.0)


@pytest.mark.parametrize("verb", [compress, trace, number_convs, profile])
def test_an_empty_batch_is_refused(verb: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    with pytest.raises(InputError, match=r"\(0, 3, 8, 8\) float32 cpu.*batch of at least one sample"):
        verb(model, torch.zeros(0, 3, 8, 8))
