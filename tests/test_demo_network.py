"""The demo's shipped network, its fixed split, and the accuracy on it."""

from __future__ import annotations

import sys
from importlib import resources

import pytest
import torch
from torch import fx, nn

from fxbasis.demo.digits import MEAN, STD, DigitsSplit, accuracy, load_digits_split
from fxbasis.demo.network import WEIGHTS, DigitsResNet, digits_resnet
from fxbasis.errors import MissingExtraError

HELD_OUT = 450


@pytest.fixture(scope="module")
def split() -> DigitsSplit:
    return load_digits_split()


def test_shipped_weights_are_small_float32_and_complete() -> None:
    assert len(resources.files("fxbasis.demo").joinpath(WEIGHTS).read_bytes()) < 1_000_000
    model = digits_resnet()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_architecture_has_ten_convolutions_with_torchvision_names() -> None:
    convs = {name: m.weight.shape for name, m in DigitsResNet().named_modules() if isinstance(m, nn.Conv2d)}
    assert convs == {
        "conv1": (32, 1, 3, 3),
        "layer1.0.conv1": (32, 32, 3, 3),
        "layer1.0.conv2": (32, 32, 3, 3),
        "layer1.1.conv1": (32, 32, 3, 3),
        "layer1.1.conv2": (32, 32, 3, 3),
        "layer2.0.conv1": (64, 32, 3, 3),
        "layer2.0.conv2": (64, 64, 3, 3),
        "layer2.0.downsample.0": (64, 32, 1, 1),
        "layer2.1.conv1": (64, 64, 3, 3),
        "layer2.1.conv2": (64, 64, 3, 3),
    }


def test_held_out_accuracy(split: DigitsSplit) -> None:
    assert len(split.test_images) == HELD_OUT
    assert accuracy(digits_resnet(), split.test_images, split.test_labels) >= 97.0


def test_loading_twice_gives_equal_independent_models_and_leaves_the_rng_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = digits_resnet(), digits_resnet()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in first.modules())
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        first.fc.bias.add_(1.0)
    assert not torch.equal(first.fc.bias, second.fc.bias)


def test_split_is_fixed(split: DigitsSplit) -> None:
    assert split.train_images.shape == (1347, 1, 8, 8)
    assert split.test_images.shape == (HELD_OUT, 1, 8, 8)
    assert split.train_labels.bincount().tolist() == [133, 136, 133, 137, 136, 136, 136, 134, 131, 135]
    assert split.test_labels.bincount().tolist() == [45, 46, 44, 46, 45, 46, 45, 45, 43, 45]
    assert split.test_labels[:10].tolist() == [2, 0, 4, 9, 4, 1, 2, 4, 6, 7]
    assert split.train_images.dtype == split.test_images.dtype == torch.float32
    assert split.train_labels.dtype == split.test_labels.dtype == torch.int64
    torch.testing.assert_close(load_digits_split(), split, rtol=0, atol=0)


def test_split_is_disjoint(split: DigitsSplit) -> None:
    train = {tuple(image.flatten().tolist()) for image in split.train_images}
    test = {tuple(image.flatten().tolist()) for image in split.test_images}
    assert len(train) + len(test) == 1797
    assert not train & test


def test_pixels_are_normalised_by_the_training_images(split: DigitsSplit) -> None:
    pixels = split.train_images * STD + MEAN
    assert pixels.min().item() == pytest.approx(0.0, abs=1e-6)
    assert pixels.max().item() == pytest.approx(1.0, abs=1e-6)
    assert split.train_images.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert split.train_images.std().item() == pytest.approx(1.0, abs=1e-3)


def test_network_is_symbolically_traceable(split: DigitsSplit) -> None:
    model = digits_resnet()
    images = split.test_images[:8]
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(images), model(images))


def test_accuracy_counts_over_several_batches_and_restores_modes() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    model[1].eval()
    logits = torch.eye(10).repeat(60, 1)
    labels = torch.arange(10).repeat(60)
    labels[::4] = (labels[::4] + 1) % 10
    assert accuracy(model, logits, labels) == 75.0
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize("missing", ["sklearn.datasets", "sklearn.model_selection"])
def test_missing_scikit_learn_names_the_cure(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r'scikit-learn.*run: pip install "fxbasis\[demo\]"$'):
        load_digits_split()
