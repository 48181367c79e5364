"""The demo's data: scikit-learn's 1797 handwritten digits of 8x8 pixels, and the accuracy on them.

The split never changes: ``train_test_split(test_size=0.25, stratify=labels, random_state=0)``, so 1347
images to train on and 450 held out. The shipped network's training was chosen without the held-out ones.
Pixels (0 to 16) are divided by 16, then normalised with the mean and the deviation of the training images.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (its test part).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..errors import MissingExtraError
from ..running import in_mode

PIXEL_MAX = 16.0
MEAN = 0.3052
STD = 0.3760
BATCH = 256


class DigitsSplit(NamedTuple):
    """Normalised images (N, 1, 8, 8) float32 and labels (N,) int64: 1347 to train on, 450 held out."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits_split() -> DigitsSplit:
    """The fixed split of scikit-learn's digits; it is read from the installed package, with no download.

    Raises:
        MissingExtraError: when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError(
            'the digits need scikit-learn, which is not installed; run: pip install "fxbasis[demo]"'
        ) from error
    digits = load_digits()
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    return DigitsSplit(
        _normalised(torch.from_numpy(train_pixels)),
        torch.from_numpy(train_labels).long(),
        _normalised(torch.from_numpy(test_pixels)),
        torch.from_numpy(test_labels).long(),
    )


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (N, 8, 8) from 0 to 16 as the network's input (N, 1, 8, 8)."""
    return ((pixels.float() / PIXEL_MAX - MEAN) / STD).unsqueeze(1)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of ``images`` (N, ...) whose largest logit is their label (N,); modes are restored afterwards.

    >>> accuracy(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    75.0
    """
    hits = 0
    with torch.no_grad(), in_mode(model, training=False):
        for start in range(0, len(images), BATCH):
            guesses = model(images[start : start + BATCH]).argmax(1)
            hits += int((guesses == labels[start : start + BATCH]).sum())
    return 100.0 * hits / len(labels)
