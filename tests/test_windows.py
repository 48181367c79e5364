"""Patches times the weight are the convolution, for every option; sampled ones are those of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import close
from torch import Tensor, nn

from fxbasis.windows import all_patches, output_size, sampled_patches, sampled_values

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": (1, 2)},
    "same": {"padding": "same", "dilation": (2, 1)},
    "same-even": {"padding": "same", "kernel_size": (2, 4)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "groups": 2},
    "strided": {"stride": (2, 3), "padding": 1, "dilation": (1, 2)},
    "grouped": {"groups": 4, "kernel_size": (1, 3)},
    "depthwise": {"groups": 8, "stride": 2, "padding": 1},
    "1x1": {"kernel_size": 1, "stride": 2},
}
options = pytest.mark.parametrize("kind", OPTIONS)


def conv_of(kind: str) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, bias=False, dtype=torch.float64, **({"kernel_size": 3} | OPTIONS[kind]))


def made(conv: nn.Conv2d, patches: Tensor) -> Tensor:
    """(..., g, N, q) times the weight: (..., C, N)."""
    return (conv.weight.reshape(conv.groups, -1, patches.shape[-1]) @ patches.mT).flatten(-3, -2)


@options
def test_patches_times_weight_are_the_convolution(kind: str) -> None:
    conv, x = conv_of(kind), torch.randn(3, 8, 9, 11, dtype=torch.float64)
    expected = conv(x).detach()
    assert output_size(conv, x) == expected.shape[2:]
    for input in (x, x.to(memory_format=torch.channels_last), torch.cat([x, x])[1:4].roll(1, 0)):
        found = made(conv, all_patches(conv, input).mT.detach()).unflatten(2, expected.shape[2:])
        assert close(found.detach(), conv(input).detach())
    found = made(conv, all_patches(conv, x[0]).mT)
    assert close(found.detach().unflatten(2, expected.shape[2:]), expected[:1])


@options
def test_sampled_patches_are_those_of_all(kind: str) -> None:
    conv, x = conv_of(kind), torch.randn(3, 8, 9, 11, dtype=torch.float64)
    output = conv(x).detach()
    positions = torch.randint(output[0, 0].numel(), (3, 5))
    found = sampled_patches(conv, x, positions)
    every = all_patches(conv, x).permute(1, 0, 3, 2)  # (g, B, S, q)
    picked = torch.stack([every[:, image, at] for image, at in enumerate(positions)], 1).flatten(1, 2)
    assert torch.equal(found, picked)
    values = sampled_values(output, positions)
    assert close(made(conv, found).mT.detach(), values)
    assert torch.equal(sampled_values(output[0], positions[:1]), values[:5])


def test_padding_that_was_set_afterwards_counts() -> None:
    conv, x = conv_of("plain"), torch.randn(2, 8, 9, 11, dtype=torch.float64)
    conv.padding, conv.dilation = (2, 2), (2, 2)  # as segmentation models do to their encoders
    assert output_size(conv, x) == conv(x).shape[2:]
    assert close(made(conv, all_patches(conv, x).mT).flatten(2).detach(), conv(x).flatten(2).detach())
