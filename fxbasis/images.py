"""Calibration images from a folder, prepared as the model was trained to see them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import as_path
from .errors import UsageError
from .models import transform_of
from .progress import progress

__all__ = ["OwnTransform", "Preparation", "images_in", "preparation_of"]

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
BATCH = 50
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an input: the shorter side resized, the centre cut out, values normalised.

    Attributes:
        mean, std: of each channel, of values from 0 to 1.
        crop: the cut-out over the resized image.
        source: where these come from, for people.
    """

    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    crop: float = 0.875
    source: str = "the usual ones of ImageNet, as the model names none"

    def __str__(self) -> str:
        return f"by mean {self.mean} and deviation {self.std}: {self.source}"

    def __call__(self, image: Any, size: tuple[int, int, int]) -> Tensor:
        """A PIL image to (C, H, W) of the given size."""
        from torchvision.transforms import functional

        channels, height, width = size
        image = _of_8_bits(image).convert("L" if channels == 1 else "RGB")
        short = round(max(height, width) / (self.crop if min(height, width) >= 64 else 1.0))
        resized = functional.resize(image, [short], antialias=True)
        cut = functional.to_tensor(functional.center_crop(resized, [height, width]))
        mean, std = (torch.tensor(values).mean(0, keepdim=True) for values in (self.mean, self.std))
        if channels != 1:
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        made: Tensor = (cut - mean[:, None, None]) / std[:, None, None]
        return made


@dataclass(frozen=True)
class OwnTransform:
    """The transform that stands beside the user's model.

    Attributes:
        transform: a PIL image to a tensor (C, H, W).
        source: the module or file of both, for people.
    """

    transform: Callable[[Any], Any]
    source: str

    def __str__(self) -> str:
        return f"by the transform of {self.source}"

    def __call__(self, image: Any, size: tuple[int, int, int]) -> Tensor:
        """A PIL image to (C, H, W), which must be the given size."""
        mode = "L" if size[0] == 1 else "RGB"
        try:
            made = self.transform(_of_8_bits(image).convert(mode))
        except Exception as error:
            raise UsageError(
                f"transform of {self.source} raised {type(error).__name__}: {error}; it must take a PIL "
                f"image ({mode})"
            ) from error
        if not isinstance(made, Tensor) or tuple(made.shape) != size:
            found = f"{tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UsageError(
                f"transform of {self.source} gave {found} for an input of {size}; let it give such a tensor, "
                "or pass its size to --input"
            )
        return made


def _of_8_bits(image: Any) -> Any:
    """The same image; where it has 16 bits, which ``convert`` would cut off at 255, scaled to 8."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 257))


def preparation_of(spec: str) -> Preparation | OwnTransform:
    """What torchvision or timm states for a model, or the transform beside it; the usual one for others.

    >>> preparation_of("torchvision:resnet18").mean
    (0.485, 0.456, 0.406)
    """
    source, _, name = spec.partition(":")
    if source == "torchvision":
        from torchvision import models

        found = models.get_model_weights(name).DEFAULT.transforms()
        if hasattr(found, "crop_size"):
            crop = found.crop_size[0] / found.resize_size[0]
            return Preparation(tuple(found.mean), tuple(found.std), crop, "those of torchvision's weights")
    if source == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None:
            return Preparation(
                tuple(config.mean), tuple(config.std), config.crop_pct, "those of timm's weights"
            )
    own, place = transform_of(spec), spec.rpartition(":")[0]
    return Preparation() if own is None else OwnTransform(own, place)


def images_in(
    folder: str | Path, size: tuple[int, int, int], prepare: Preparation | OwnTransform, most: int = 1000
) -> list[Tensor]:
    """Batches (50, C, H, W) of the images in a folder and its subfolders, at random if there are too many.

    Raises:
        UsageError: for a folder without images, a damaged image, or inputs that are no images.
    """
    from PIL import Image

    if size[0] not in (1, 3):
        raise UsageError(f"images have 1 or 3 channels, and --input has {size[0]}; pass batches in Python")
    path = as_path(folder)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise UsageError(f"{folder} holds no images ({', '.join(ENDINGS)}); name a folder of images")
    random.Random(0).shuffle(files)
    found = []
    for file in progress(files[:most], "reading images"):
        try:
            with Image.open(file) as image:
                found.append(prepare(image, size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{file} is no image that can be read ({error}); take it out") from error
    return list(torch.stack(found).split(BATCH))  # type: ignore[no-untyped-call]
