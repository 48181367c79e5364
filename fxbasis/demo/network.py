"""The demo's network: a residual CNN for 8x8 handwritten digits, and its weights inside the package.

Ten convolutions, named as in torchvision's ResNet: ``conv1``, two blocks of 32 channels at 8x8 pixels
(``layer1``), two of 64 channels at 4x4 (``layer2``, whose first block has a 1x1 ``downsample``). The weights
come from ``examples/train_digits.py``.
"""

from __future__ import annotations

from importlib import resources

import torch
from safetensors.torch import load
from torch import nn

from ..running import seeded

WEIGHTS = "digits_resnet.safetensors"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (N, in_channels, H, W) to features (N, out_channels, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class DigitsResNet(nn.Module):
    """Images (N, 1, 8, 8) to ten logits (N, 10).

    >>> DigitsResNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(ResidualBlock(32, 32), ResidualBlock(32, 32))
        self.layer2 = nn.Sequential(ResidualBlock(32, 64, stride=2), ResidualBlock(64, 64))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 1, 8, 8), normalised as ``load_digits_split`` does, to logits (N, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def digits_resnet() -> DigitsResNet:
    """The trained network in eval mode, from the weights inside the package; the caller's RNG is untouched.

    >>> digits_resnet().training
    False
    """
    weights = load(resources.files("fxbasis.demo").joinpath(WEIGHTS).read_bytes())
    with seeded():
        model = DigitsResNet()
    model.load_state_dict(weights)
    return model.eval()
