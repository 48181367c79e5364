"""The change of outputs, and the probe whose squared gradients are its Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import close
from torch import nn
from torch.nn import functional as F

from fxbasis.divergence import divergence, probe
from fxbasis.errors import InputError

REMEDY = r"pass evaluate=, .*, or a plan of fxbasis.plan\(\.\.\., estimator=.output.\)$"


def test_divergence_is_that_of_torch() -> None:
    expected, actual = torch.randn(5, 7), torch.randn(5, 7)
    parts = F.kl_div(actual.double().log_softmax(1), expected.double().softmax(1), reduction="none")
    assert close(divergence(expected, actual), parts.sum(1))
    maps, others = torch.randn(5, 3, 4, 4).double(), torch.randn(5, 3, 4, 4).double()
    squares = 0.5 * (maps - others).square().mean((1, 2, 3)) / maps.square().mean()
    assert close(divergence(maps, others), squares)
    both = divergence({"a": expected, "b": [maps]}, {"a": actual, "b": [others]})
    assert close(both, parts.sum(1) + squares)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identical_outputs_have_not_changed(dtype: torch.dtype) -> None:
    hard = torch.tensor([[300.0, -300.0, 0.0], [float("-inf"), 1.0, 2.0]], dtype=dtype)
    for output in (hard, torch.randn(2, 1).to(dtype), torch.zeros(2, 3, 4, dtype=dtype), (hard, {"x": hard})):
        assert divergence(output, output).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("images", [1, 2])
def test_lists_of_dicts_are_refused(images: int) -> None:
    found = [{"boxes": torch.rand(6, 4), "scores": torch.rand(6)} for _ in range(images)]
    for output in (found, (torch.rand(images, 3), found), torch.zeros(3, dtype=torch.long), "text"):
        with pytest.raises(InputError, match=REMEDY):
            divergence(output, output)


def test_outputs_of_other_shapes_are_refused() -> None:
    for other in (torch.zeros(2, 4), (torch.zeros(2, 3), torch.zeros(2, 3))):
        with pytest.raises(InputError, match=REMEDY):
            divergence(torch.zeros(2, 3), other)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (2, 1)])
def test_the_squared_probe_is_the_hessian_of_the_change(shape: tuple[int, ...]) -> None:
    """In a linear model: half the mean square of <gradient, d> is the change of d, to its standard error."""
    torch.manual_seed(0)
    layer = nn.Linear(6, math.prod(shape[1:]), dtype=torch.float64)
    x, d = torch.randn(2, 6).double(), 1e-3 * torch.randn(2, 6).double()
    exact, found = divergence(layer(x).reshape(shape), layer(x + d).reshape(shape)), []
    for seed in range(4000):
        leaf = x.clone().requires_grad_()
        scalar = probe(layer(leaf).reshape(shape), torch.Generator().manual_seed(seed))
        found.append(0.5 * (torch.autograd.grad(scalar, leaf)[0] * d).sum(1).square())
    values = torch.stack(found)
    error = values.std(0) / len(values) ** 0.5
    assert bool(((values.mean(0) - exact).abs() <= 4 * error + 1e-2 * exact).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_probe_of_extreme_outputs_is_finite(dtype: torch.dtype) -> None:
    for value in (0.0, 1e-4, 3e4):
        leaf = torch.full((2, 3, 4), value, dtype=dtype, requires_grad=True)
        gradient = torch.autograd.grad(probe(leaf, torch.Generator()), leaf)[0]
        assert gradient.dtype == dtype
        assert bool(gradient.isfinite().all())
