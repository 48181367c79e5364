"""The closed forms against counts of what runs, and the threshold against the formulas it comes from."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from fxbasis.costs import (
    ConvShape,
    dense_macs,
    dense_params,
    output_size,
)
from fxbasis.passes.numbering import number_convs
from fxbasis.structures import form_macs, form_params

IMAGE = (11, 9)
SHAPES = [
    ConvShape(c, C, kernel, g)
    for c, C, kernel, g in product((1, 4, 8), (1, 4, 12), ((1, 1), (3, 3), (1, 5), (2, 4)), (1, 2, 4))
    if c % g == 0 and C % g == 0
]


def output_form_macs(shape: ConvShape, rank: int, size: tuple[int, int], batch: int = 1) -> int:
    return form_macs("output", shape, (rank,), size, (99, 99), batch)  # the input's size does not matter


def output_form_params(shape: ConvShape, rank: int) -> int:
    return form_params("output", shape, (rank,))


def layer(shape: ConvShape, **options: object) -> nn.Conv2d:
    return nn.Conv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        groups=shape.groups,
        bias=shape.bias,
        **options,
    )


def form(shape: ConvShape, rank: int, **options: object) -> nn.Sequential:
    basis = ConvShape(shape.in_channels, rank, shape.kernel_size, shape.groups)
    composition = ConvShape(rank, shape.out_channels, (1, 1), shape.groups, shape.bias)
    return nn.Sequential(layer(basis, **options), layer(composition))


def torch_macs(module: nn.Module, batch: int, channels: int) -> int:
    """Half of PyTorch's own FLOP count."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(batch, channels, *IMAGE))
    return counter.get_total_flops() // 2


def brute_macs(conv: nn.Conv2d, image: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Multiply-adds one by one: of ones with ones, each adds 1 to the sum of the output."""
    options = (None, conv.stride, 0, conv.dilation, conv.groups)
    output = F.conv2d(
        torch.ones_like(image, dtype=torch.float64), torch.ones_like(conv.weight).double(), *options
    )
    return int(output.sum()), output


@pytest.mark.parametrize("padding", [(0, 0), (2, 1)], ids="pad{0[0]}{0[1]}".format)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)], ids="dil{0[0]}{0[1]}".format)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)], ids="str{0[0]}{0[1]}".format)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 5), (4, 2)], ids="k{0[0]}x{0[1]}".format)
def test_formulas_equal_the_flop_counter(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int]
) -> None:
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    size = output_size(IMAGE, kernel, **options)
    for bias, batch in product((False, True), (1, 3)):
        shape = ConvShape(4, 6, kernel, bias=bias)
        conv, factors = layer(shape, **options), form(shape, 3, **options)
        assert conv(torch.zeros(batch, 4, *IMAGE)).shape == (batch, 6, *size)
        assert dense_macs(shape, size, batch) == torch_macs(conv, batch, 4)
        assert output_form_macs(shape, 3, size, batch) == torch_macs(factors, batch, 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formulas_equal_a_count_one_by_one(shape: ConvShape) -> None:
    conv, rank = layer(shape, stride=(2, 1)), 2 * shape.groups
    size = output_size(IMAGE, shape.kernel_size, (2, 1))
    image = torch.ones(3, shape.in_channels, *IMAGE)
    assert dense_macs(shape, size, 3) == brute_macs(conv, image)[0]
    basis, composition = form(shape, rank, stride=(2, 1))
    first, middle = brute_macs(basis, image)
    assert output_form_macs(shape, rank, size, 3) == first + brute_macs(composition, middle)[0]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_params_equal_those_of_the_modules(bias: bool) -> None:
    for dense in SHAPES:
        shape = ConvShape(dense.in_channels, dense.out_channels, dense.kernel_size, dense.groups, bias)
        assert dense_params(shape) == sum(p.numel() for p in layer(shape).parameters())
        factors = form(shape, 3 * shape.groups)
        assert output_form_params(shape, 3 * shape.groups) == sum(p.numel() for p in factors.parameters())


def test_a_form_is_cheaper_exactly_below_the_break_even_rank() -> None:
    on_the_edge = 0
    for shape in SHAPES:
        for rank in range(shape.groups, 2 * shape.out_channels + 1, shape.groups):
            below = rank < shape.break_even_rank
            assert (output_form_macs(shape, rank, (7, 5)) < dense_macs(shape, (7, 5))) == below, (shape, rank)
            assert (output_form_params(shape, rank) < dense_params(shape)) == below, (shape, rank)
            on_the_edge += rank == shape.break_even_rank
    assert on_the_edge  # where both cost the same, the form is not called cheaper


def test_the_ratio_of_params_is_the_ratio_of_macs() -> None:
    for shape, batch in product(SHAPES, (1, 3)):
        for rank in range(shape.groups, shape.out_channels + 1, shape.groups):
            params = output_form_params(shape, rank) * dense_macs(shape, (7, 5), batch)
            assert params == output_form_macs(shape, rank, (7, 5), batch) * dense_params(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_rank_is_the_rank_of_a_random_weight(shape: ConvShape) -> None:
    blocks = layer(shape).weight.detach().double().reshape(shape.groups, -1, shape.fan_in)
    assert shape.largest_rank == int(torch.linalg.matrix_rank(blocks).sum())


def test_gains_says_whether_any_rank_is_cheaper() -> None:
    for shape in SHAPES:
        ranks = range(shape.groups, shape.out_channels + 1, shape.groups)
        cheaper = any(output_form_params(shape, rank) < dense_params(shape) for rank in ranks)
        assert shape.gains == cheaper, shape
    assert not ConvShape(8, 8, (3, 3), groups=8).gains


def test_resnet18_has_the_numbers_of_the_method() -> None:
    table = number_convs(resnet18(), torch.zeros(1, 3, 224, 224))
    assert [int(record.shape.break_even_rank) for record in table] == [
        44,
        *(57, 57, 57, 57),
        *(104, 115, 42, 115, 115),
        *(209, 230, 85, 230, 230),
        *(418, 460, 170, 460, 460),
    ]
    assert sum(record.macs for record in table) == 1_814_073_344 - 512 * 1000  # without the linear layer
    halves = {record.index: (record.shape, record.out_channels // 2) for record in table}
    ratio = {index: output_form_params(*half) / dense_params(half[0]) for index, half in halves.items()}
    assert [ratio[index] for index in (8, 13, 18)] == [1.5, 1.5, 1.5]
    assert round(ratio[1], 2) == 0.72


@pytest.mark.parametrize(("fraction", "ratio"), [(0.25, 0.287), (0.5, 0.573), (0.75, 0.860)])
def test_resnet18_has_the_whole_net_ratios_of_the_method(fraction: float, ratio: float) -> None:
    table = number_convs(resnet18(), torch.zeros(1, 3, 224, 224))
    after = sum(
        output_form_macs(record.shape, int(fraction * record.shape.largest_rank), record.output_size)
        for record in table
    )
    assert round(after / sum(record.macs for record in table), 3) == ratio
