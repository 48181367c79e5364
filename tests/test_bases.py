"""Every method on every kind of weight: exact at full rank, its error known, its own promise kept."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fxbasis.bases import Decomposition, decompose
from fxbasis.errors import SelectionError
from fxbasis.structures import FORMS

# name: (C, c / g, K_h, K_w), groups. "wide" matrices have fewer filters than weights in one filter.
WEIGHTS = {
    "wide": ((6, 3, 3, 3), 1),
    "tall": ((20, 5, 1, 1), 1),
    "square": ((9, 1, 3, 3), 1),
    "groups-wide": ((12, 2, 3, 3), 4),
    "groups-tall": ((12, 2, 1, 2), 2),
    "one-filter": ((1, 3, 2, 2), 1),
    "one-weight": ((5, 1, 1, 1), 1),
    "depthwise": ((4, 1, 3, 3), 4),
}

methods = pytest.mark.parametrize("method", FORMS["gauge"].methods)
weights = pytest.mark.parametrize("kind", WEIGHTS)


def weight_of(kind: str) -> tuple[Tensor, int]:
    shape, groups = WEIGHTS[kind]
    return torch.randn(shape, dtype=torch.float64), groups


def blocks_of(weight: Tensor, groups: int) -> Tensor:
    return weight.double().reshape(groups, weight.shape[0] // groups, -1)


def error(found: Decomposition, rank: int, weight: Tensor) -> float:
    """The Frobenius norm of W - A V over that of W, measured."""
    factors, blocks = found.factors(rank), blocks_of(weight, found.basis.shape[0])
    assert factors.composition.shape == (*blocks.shape[:2], rank)
    assert factors.basis.shape == (blocks.shape[0], rank, blocks.shape[2])
    gap = (blocks - factors.composition @ factors.basis).norm()
    return float(gap / blocks.norm()) if blocks.norm() > 0 else float(gap)


def full_rank(found: Decomposition) -> int:
    return found.basis.shape[1]


def low_rank(rank: int, groups: int = 2) -> Tensor:
    """A weight of 8 filters and fan-in 18 in each group, whose matrix has the given rank."""
    left, right = torch.randn(groups, 8, rank), torch.randn(groups, rank, 18)
    return (left.double() @ right.double()).reshape(groups * 8, 2, 3, 3)


@methods
@weights
def test_exact_at_full_rank(kind: str, method: str) -> None:
    weight, groups = weight_of(kind)
    found = decompose(weight, groups, method)
    assert full_rank(found) == min(weight.shape[0] // groups, weight[0].numel())
    assert error(found, full_rank(found), weight) < 1e-12
    assert found.relative_error(full_rank(found)) == 0.0


@methods
@weights
def test_stated_error_is_the_measured_error_and_falls_with_the_rank(kind: str, method: str) -> None:
    weight, groups = weight_of(kind)
    found = decompose(weight, groups, method)
    stated = [found.relative_error(rank) for rank in range(1, full_rank(found) + 1)]
    measured = [error(found, rank, weight) for rank in range(1, full_rank(found) + 1)]
    assert stated == pytest.approx(measured, abs=1e-12)
    assert all(before > after for before, after in pairwise(stated))


@pytest.mark.parametrize("method", ["svd", "eigen"])
@weights
def test_svd_and_eigen_reach_the_bound_of_eckart_and_young(kind: str, method: str) -> None:
    weight, groups = weight_of(kind)
    found, squares = decompose(weight, groups, method), torch.linalg.svdvals(blocks_of(weight, groups)) ** 2
    for rank in range(1, full_rank(found)):
        bound = float((squares[:, rank:].sum() / squares.sum()).sqrt())
        assert error(found, rank, weight) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("method", ["qr", "qr-unpivoted"])
@weights
def test_qr_is_never_better_than_svd(kind: str, method: str) -> None:
    weight, groups = weight_of(kind)
    found, best = decompose(weight, groups, method), decompose(weight, groups, "svd")
    for rank in range(1, full_rank(found)):
        assert found.relative_error(rank) >= best.relative_error(rank) * (1 - 1e-12)


@weights
def test_svd_is_balanced(kind: str) -> None:
    weight, groups = weight_of(kind)
    found = decompose(weight, groups, "svd")
    singular = torch.diag_embed(torch.linalg.svdvals(blocks_of(weight, groups)))
    assert torch.allclose(found.composition.mT @ found.composition, singular, rtol=0, atol=1e-12)
    assert torch.allclose(found.basis @ found.basis.mT, singular, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["eigen", "qr-unpivoted"])
@weights
def test_eigen_and_unpivoted_qr_have_orthonormal_basis_filters(kind: str, method: str) -> None:
    weight, groups = weight_of(kind)
    basis = decompose(weight, groups, method).basis
    assert torch.allclose(basis @ basis.mT, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-12)


@weights
def test_qr_takes_filters_of_the_weight_as_they_are(kind: str) -> None:
    weight, groups = weight_of(kind)
    found, blocks = decompose(weight, groups, "qr"), blocks_of(weight, groups)
    for rank in range(1, full_rank(found) + 1):
        factors = found.factors(rank)
        for block, basis, composition in zip(blocks, factors.basis, factors.composition, strict=True):
            rows = [next(i for i, row in enumerate(block) if torch.equal(row, kept)) for kept in basis]
            assert len(set(rows)) == rank
            assert torch.equal(composition[rows], torch.eye(rank).double())


def test_qr_chooses_the_filter_with_most_left_first() -> None:
    weight = torch.diag(torch.tensor([1.0, 5.0, 3.0])).reshape(3, 3, 1, 1)
    assert decompose(weight, method="qr").factors(2).basis.tolist() == [[[0, 5, 0], [0, 0, 3]]]


def test_unpivoted_qr_spans_the_first_filters_in_storage_order() -> None:
    weight, groups = weight_of("groups-wide")
    found, blocks = decompose(weight, groups, "qr-unpivoted"), blocks_of(weight, groups)
    for rank in range(1, full_rank(found)):
        factors = found.factors(rank)
        gaps = (blocks - factors.composition @ factors.basis).norm(dim=2)
        assert bool((gaps[:, :rank] < 1e-12).all())
        assert bool((gaps[:, rank:] > 1e-3).all())


@methods
def test_a_larger_rank_keeps_the_basis_filters_of_a_smaller_one(method: str) -> None:
    weight, groups = weight_of("groups-wide")
    found = decompose(weight, groups, method)
    assert torch.equal(found.factors(3).basis[:, :2], found.factors(2).basis)


@methods
def test_groups_are_decomposed_apart(method: str) -> None:
    weight, groups = weight_of("groups-wide")
    whole = decompose(weight, groups, method).factors(2)
    for group, block in enumerate(weight.chunk(groups)):
        alone = decompose(block, 1, method).factors(2)
        product = whole.composition[group] @ whole.basis[group]
        assert torch.allclose(product, alone.composition[0] @ alone.basis[0], rtol=0, atol=1e-12)


@methods
@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (6, 2, 1, 1)], ids=["wide", "tall"])
def test_zero_weight_is_finite_and_exact_at_rank_one(shape: tuple[int, ...], method: str) -> None:
    found = decompose(torch.zeros(shape), 1, method)
    for rank in range(1, full_rank(found) + 1):
        factors = found.factors(rank)
        assert bool(factors.composition.isfinite().all())
        assert bool(factors.basis.isfinite().all())
        assert float((factors.composition @ factors.basis).abs().max()) == 0.0
        assert found.relative_error(rank) == 0.0


@methods
@pytest.mark.parametrize("true_rank", [1, 3])
def test_rank_deficient_weight_is_exact_from_its_rank_on(true_rank: int, method: str) -> None:
    weight = low_rank(true_rank)
    found = decompose(weight, 2, method)
    for rank in range(true_rank, full_rank(found) + 1):
        assert error(found, rank, weight) < 1e-12
        assert found.relative_error(rank) < 1e-7
        assert float(found.factors(rank).composition.abs().max()) < 1e3
        assert float(found.factors(rank).basis.abs().max()) < 1e3


@methods
@pytest.mark.parametrize("spoil", ["zero", "repeated"])
def test_filters_that_are_zero_or_repeated(spoil: str, method: str) -> None:
    weight = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    weight[2:6] = 0 if spoil == "zero" else weight[1]
    found, true_rank = decompose(weight, 1, method), 4
    for rank in range(full_rank(found) if method == "qr-unpivoted" else true_rank, full_rank(found) + 1):
        assert error(found, rank, weight) < 1e-12
        assert float(found.factors(rank).composition.abs().max()) < 1e3


@methods
def test_a_zero_group_beside_a_full_one(method: str) -> None:
    weight, groups = weight_of("groups-wide")
    weight[:3] = 0
    found = decompose(weight, groups, method)
    assert error(found, full_rank(found), weight) < 1e-12
    assert found.relative_error(1) == pytest.approx(error(found, 1, weight), abs=1e-12)


@methods
@pytest.mark.parametrize("shape", [(8, 2, 3, 3), (12, 8, 1, 1)], ids=["wide", "tall"])
def test_singular_values_over_twelve_decades(shape: tuple[int, ...], method: str) -> None:
    left, _, right = torch.linalg.svd(torch.randn(shape).double().reshape(shape[0], -1), full_matrices=False)
    weight = (left * torch.logspace(0, -12, left.shape[1]).double() @ right).reshape(shape)
    found = decompose(weight, 1, method)
    assert error(found, full_rank(found), weight) < 1e-12
    for rank in range(1, full_rank(found) + 1):
        assert found.relative_error(rank) == pytest.approx(error(found, rank, weight), rel=1e-6, abs=1e-7)


@methods
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30], ids="{:.0e}".format)
def test_the_scale_of_the_weight_does_not_matter(scale: float, method: str) -> None:
    weight = torch.randn(6, 3, 3, 3)
    found, scaled = decompose(weight, 1, method), decompose(weight * scale, 1, method)
    for rank in range(1, 7):
        assert scaled.relative_error(rank) == pytest.approx(found.relative_error(rank), abs=1e-6)
    assert error(scaled, 6, weight * scale) < 1e-12


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.half, torch.bfloat16], ids=str)
def test_every_dtype_is_decomposed_in_float64(dtype: torch.dtype, method: str) -> None:
    weight = torch.randn(6, 3, 3, 3).to(dtype)
    found = decompose(weight, 1, method)
    assert {found.composition.dtype, found.basis.dtype, found.energies.dtype} == {torch.float64}
    assert error(found, 6, weight) < 1e-12


@methods
def test_layout_and_gradients_of_the_weight_do_not_matter(method: str) -> None:
    weight = torch.randn(6, 3, 3, 3)
    expected = decompose(weight, 1, method).factors(3)
    last = weight.to(memory_format=torch.channels_last).requires_grad_()
    before = last.detach().clone()
    factors = decompose(last, 1, method).factors(3)
    assert torch.equal(factors.basis, expected.basis)
    assert torch.equal(factors.composition, expected.composition)
    assert not factors.basis.requires_grad
    assert torch.equal(last, before)


def test_unknown_method_is_refused() -> None:
    message = r"method='cur' is not known; choose one of svd, qr, qr-unpivoted, eigen"
    with pytest.raises(SelectionError, match=message):
        decompose(torch.randn(2, 2, 1, 1), method="cur")
