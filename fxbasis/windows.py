"""What a convolution sees: the patches of its input, as views and as samples.

A patch is what one output position multiplies with the weight: q = in_channels / groups K_h K_w numbers for
each of g groups, padding included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

__all__ = ["all_patches", "output_size", "padded", "sampled_patches", "sampled_values"]


def padded(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """The input (B, c, H, W) with the convolution's padding around it."""
    if input.ndim == 3:
        input = input[None]
    zeros = conv.padding_mode == "zeros"
    around = tuple(conv._reversed_padding_repeated_twice)
    if zeros and not isinstance(conv.padding, str):  # which may have been set after construction
        rows, columns = _pair(conv.padding)
        around = (columns, columns, rows, rows)
    mode = "constant" if zeros else conv.padding_mode
    return nn.functional.pad(input, around, mode) if any(around) else input


def output_size(conv: nn.Conv2d, input: Tensor) -> tuple[int, int]:
    """(H, W) of the output for an input (B, c, H, W)."""
    return _count(conv, padded(conv, input))


def _count(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    height, width = (
        (length - reach * (kernel - 1) - 1) // step + 1
        for length, reach, kernel, step in zip(
            x.shape[2:], _pair(conv.dilation), conv.kernel_size, _pair(conv.stride), strict=True
        )
    )
    return height, width


def _windows(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """A view (B, c, H_out, W_out, K_h, K_w) of the padded input."""
    x = padded(conv, input)
    row, column = x.stride()[2:]
    (down, right), (apart, beside) = _pair(conv.stride), _pair(conv.dilation)
    steps, taps = (down * row, right * column), (apart * row, beside * column)
    shape = (*x.shape[:2], *_count(conv, x), *conv.kernel_size)
    return x.as_strided(shape, (*x.stride()[:2], *steps, *taps), x.storage_offset())


def all_patches(conv: nn.Conv2d, input: Tensor) -> Tensor:
    """Every patch, (B, g, q, H_out W_out).

    >>> all_patches(nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.zeros(5, 4, 8, 8)).shape
    torch.Size([5, 2, 18, 64])
    """
    view = _windows(conv, input).permute(0, 1, 4, 5, 2, 3)
    return view.reshape(len(view), conv.groups, -1, view.shape[-2] * view.shape[-1])


def sampled_patches(conv: nn.Conv2d, input: Tensor, positions: Tensor, groups: int | None = None) -> Tensor:
    """The patches at ``positions`` of each image, (g, B P, q).

    Args:
        conv: whose options say what a patch is.
        input: (B, c, H, W).
        positions: (B, P) long, positions of the output counted row by row.
        groups: by default those of ``conv``.
    """
    view = _windows(conv, input)
    images, width = torch.arange(len(view), device=view.device)[:, None], view.shape[3]
    found = view[images, :, positions // width, positions % width]  # (B, P, c, K_h, K_w)
    return found.reshape(positions.numel(), groups or conv.groups, -1).transpose(0, 1)


def sampled_values(output: Tensor, positions: Tensor) -> Tensor:
    """The values of an output (B, C, H, W) at ``positions`` (B, P) of each image, (B P, C)."""
    flat = (output if output.ndim == 4 else output[None]).flatten(2).transpose(1, 2)
    return flat.gather(1, positions[..., None].expand(-1, -1, flat.shape[2])).flatten(0, 1)
