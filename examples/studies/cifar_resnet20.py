"""ResNet-20 on CIFAR-10: accuracy of one form in layers 2 to 19, fitted to the weights, without any training.

    python examples/studies/cifar_resnet20.py --data cifar10-jpeg.zip --weights resnet20-cifar10-jpeg.pt
    python examples/studies/cifar_resnet20.py --data ... --weights ... --form cp --macs-ratios 0.5

``--data`` is a zip file with ``test/<class>/*.jpg`` (or the folder it unpacks to), ``--weights`` a state_dict
of the CIFAR ResNet-20 with parameter-free shortcuts (option A of He et al. 2016). Every figure is the top-1
accuracy on all test images found, in eval mode; ``--recalibrate`` adds the one with new BatchNorm statistics,
from ``train/<class>/*.jpg``. MACs are for one image.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fxbasis
from fxbasis.demo.digits import accuracy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels, and has no parameters."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pad = 0 if in_planes == planes else planes // 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_planes, H, W) -> (N, planes, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """3x3 stem to 16 channels, then three layers of three blocks with 16, 32, 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, 32, 32) to logits (N, 10)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def image_names(data: Path, part: str) -> list[str]:
    """Every ``part/<class>/*.jpg`` of a zip file or folder, sorted."""
    if data.is_dir():
        return sorted(path.relative_to(data).as_posix() for path in data.glob(f"{part}/*/*.jpg"))
    with zipfile.ZipFile(data) as archive:
        return sorted(n for n in archive.namelist() if n.startswith(f"{part}/") and n.endswith(".jpg"))


def read_images(data: Path, names: list[str]) -> torch.Tensor:
    """The images of those names, normalised (N, 3, 32, 32)."""
    if data.is_dir():
        files = [(data / name).read_bytes() for name in names]
    else:
        with zipfile.ZipFile(data) as archive:
            files = [archive.read(name) for name in names]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load_images(data: Path, part: str = "test", step: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Every step-th ``part/<class>/*.jpg``: normalised images (N, 3, 32, 32), labels by class name (N,)."""
    names = image_names(data, part)
    classes = sorted({name.split("/")[1] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names[::step]])
    return read_images(data, names[::step]), labels


def load_model(weights: Path) -> ResNet20:
    """The trained network in eval mode."""
    model = ResNet20().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def calibration_batches(data: Path) -> list[torch.Tensor]:
    """Every 25th training image (2,000 of 50,000) in a fixed random order, eight batches of 250."""
    images = load_images(data, "train", 25)[0]
    return list(images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))].split(250))


def main() -> None:
    """Print accuracy and MACs for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--layers", default="2-19")
    parser.add_argument("--form", default="output")
    parser.add_argument("--method")
    parser.add_argument("--macs-ratios", type=float, nargs="+", help="instead of sizes: of each layer's MACs")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument(
        "--recalibrate", action="store_true", help="measure after BatchNorm recalibration too"
    )
    options = parser.parse_args()
    model = load_model(options.weights)
    images, labels = load_images(options.data)
    example = images[:2]
    macs = fxbasis.profile(model, example).macs // 2
    print(f"original: {accuracy(model, images, labels):.2f} % of {len(labels)} images, {macs:,} MACs")
    name = "macs_ratio" if options.macs_ratios else "size"
    how = {"layers": options.layers, "form": options.form, "method": options.method}
    for value in options.macs_ratios or options.sizes:
        small = fxbasis.compress(model, example, **how, **{name: value})
        work, done = fxbasis.profile(small, example), fxbasis.plan_of(small).compressed
        print(
            f"{options.form}, {done[0].method}, layers {options.layers}, {name} {value}: "
            f"{accuracy(small, images, labels):.2f} % of {len(labels)} images, "
            f"{work.macs / work.macs_before:.3f} of the MACs, counted = formula: {not work.disagreements}"
        )
        if options.recalibrate:
            fxbasis.recalibrate_batchnorm_(small, calibration_batches(options.data))
            print(f"    after BatchNorm recalibration: {accuracy(small, images, labels):.2f} %")


if __name__ == "__main__":
    main()
