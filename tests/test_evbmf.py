"""The variational Bayes rank: planted ranks, pure noise, invariances, and the free energy minimised anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from fxbasis import evbmf
from fxbasis.errors import InputError, SelectionError
from fxbasis.evbmf import evbmf_rank

SHAPES = [(40, 40), (40, 100), (100, 40), (64, 576), (16, 144), (30, 33)]
shapes = pytest.mark.parametrize(("rows", "columns"), SHAPES)


def planted(rows: int, columns: int, rank: int, noise: float) -> Tensor:
    left = torch.linalg.qr(torch.randn(rows, rows).double())[0][:, :rank]
    right = torch.linalg.qr(torch.randn(columns, columns).double())[0][:, :rank]
    strength = torch.linspace(1.0, 2.0, rank).double() * math.sqrt(rows * columns)
    signal: Tensor = (left * strength) @ right.mT
    return signal + noise * torch.randn(rows, columns).double()


def rank_of(matrix: Tensor, noise: float | None = None) -> int:
    return evbmf_rank(torch.linalg.svdvals(matrix), matrix.shape[0], matrix.shape[1], noise)


@shapes
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_a_planted_rank_is_found(rows: int, columns: int, rank: int) -> None:
    matrix = planted(rows, columns, rank, 0.5)
    assert rank_of(matrix) == rank
    assert rank_of(matrix, noise=0.25) == rank


@shapes
def test_pure_noise_has_rank_zero(rows: int, columns: int) -> None:
    assert [rank_of(torch.randn(rows, columns).double()) for _ in range(5)] == [0] * 5


@shapes
def test_scale_order_and_transposition_do_not_matter(rows: int, columns: int) -> None:
    singular = torch.linalg.svdvals(planted(rows, columns, 5, 1.5))
    rank = evbmf_rank(singular, rows, columns)
    assert rank > 0
    assert evbmf_rank(singular, columns, rows) == rank
    assert evbmf_rank(singular.flip(0), rows, columns) == rank
    for scale in (1e-9, 1e-3, 1e6):
        assert evbmf_rank(singular * scale, rows, columns) == rank
        assert evbmf_rank(singular * scale, rows, columns, noise=2.25 * scale**2) == evbmf_rank(
            singular, rows, columns, noise=2.25
        )


def test_the_noise_is_estimated_and_more_noise_never_raises_the_rank() -> None:
    matrix = planted(60, 200, 4, 0.7)
    singular = torch.linalg.svdvals(matrix)
    squares, ratio = singular.square().numpy() / 200, 0.3
    assert evbmf._noise(squares, ratio, evbmf._threshold(ratio)) == pytest.approx(0.49, rel=0.05)
    ranks = [evbmf_rank(singular, 60, 200, noise) for noise in (0.0, 0.01, 0.3, 0.49, 5.0, 1e9)]
    assert ranks == sorted(ranks, reverse=True)
    assert (ranks[0], ranks[-1]) == (60, 0)


def test_matrices_without_noise_and_the_smallest() -> None:
    assert rank_of(planted(20, 50, 4, 0.0)) == 4
    assert rank_of(torch.zeros(3, 5).double()) == 0
    assert evbmf_rank(torch.tensor([3.0]), 1, 9) == 0  # one value tells nothing of the noise
    assert evbmf_rank(torch.tensor([3.0]), 9, 1, noise=0.01) == 1


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5, 1.0])
def test_the_threshold_is_where_a_component_begins_to_pay(ratio: float) -> None:
    threshold = evbmf._threshold(ratio)
    guess = 2.5129 * math.sqrt(ratio)
    assert threshold == pytest.approx((1 + guess) * (1 + ratio / guess), rel=0.025)
    assert threshold > (1 + math.sqrt(ratio)) ** 2  # the edge of the spectrum of noise
    below, at, above = evbmf._component(threshold * np.array([0.99, 1.0, 1.01]), ratio)
    assert below > 0 > above
    assert at == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("x", [2.6, 3.5, 8.0])
def test_the_free_energy_of_a_component_is_the_minimum_over_its_posterior(x: float) -> None:
    """Posteriors of one component (a, b), the priors' variances at their optimum; the null has energy 0."""
    small, large = 6, 24
    gamma = math.sqrt(x * large)

    def energy(logs: list[float]) -> float:
        mean_a, mean_b, var_a, var_b = (math.exp(value) for value in logs)
        spread_a, spread_b = mean_a**2 + large * var_a, mean_b**2 + small * var_b
        priors = large * math.log(spread_a / large / var_a) + small * math.log(spread_b / small / var_b)
        return priors - 2 * gamma * mean_a * mean_b + spread_a * spread_b

    start = [0.5 * math.log(gamma)] * 2 + [-math.log(gamma)] * 2
    found = scipy.optimize.minimize(energy, start, method="BFGS", options={"gtol": 1e-7})
    expected = large * float(evbmf._component(np.array([x]), small / large)[0])
    assert found.fun == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"of shape \(3,\) are not those of a 4 x 9 matrix; pass all 4"):
        evbmf_rank(torch.ones(3), 4, 9)
    with pytest.raises(InputError, match=r"finite and at least 0; pass those of torch.linalg.svdvals"):
        evbmf_rank(torch.tensor([1.0, float("nan")]), 2, 2)
    with pytest.raises(SelectionError, match=r"noise=-1.0 is no variance; pass 0 or more, or None"):
        evbmf_rank(torch.ones(2), 2, 2, noise=-1.0)
