"""The gauge form: the same product exactly, its basis rows of the product, its coefficients bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxbasis.bases import decompose
from fxbasis.errors import InputError, SelectionError
from fxbasis.gauge import Gauge, regauge
from fxbasis.structures import FORMS


def factors(seed: int, groups: int, filters: int, rank: int, width: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    composition = torch.randn(groups, filters, rank, generator=random, dtype=torch.float64)
    return composition, torch.randn(groups, rank, width, generator=random, dtype=torch.float64)


def check(found: Gauge, composition: Tensor, basis: Tensor) -> None:
    """Exact, finite, of the right shapes; every filter named once; the basis rows of the product."""
    (groups, filters, rank), product = composition.shape, composition @ basis
    assert found.rows.shape == (groups, rank)
    assert found.rest.shape == (groups, filters - rank)
    assert found.mixing.shape == (groups, filters - rank, rank)
    assert found.basis.shape == basis.shape
    named = torch.cat([found.rows, found.rest], dim=1).sort(dim=1).values
    assert torch.equal(named, torch.arange(filters).expand(groups, -1))
    assert torch.equal(found.rest, found.rest.sort(dim=1).values)
    assert found.mixing.isfinite().all()
    assert (found.composition() @ found.basis - product).norm() <= 1e-10 * product.norm()
    chosen = torch.stack([part[rows] for part, rows in zip(product, found.rows, strict=True)])
    assert torch.allclose(found.basis, chosen, rtol=1e-12, atol=1e-12 * float(product.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 3),
    filters=st.integers(1, 24),
    rank=st.integers(1, 24),
    width=st.integers(1, 30),
)
def test_the_product_is_kept_and_the_coefficients_bounded(
    seed: int, groups: int, filters: int, rank: int, width: int
) -> None:
    composition, basis = factors(seed, groups, filters, min(rank, filters), width)
    found = regauge(composition, basis)
    check(found, composition, basis)
    assert found.mixing.numel() == 0 or found.mixing.abs().max() <= 1.05 + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    filters=st.integers(2, 12),
    sound=st.integers(0, 4),
    data=st.data(),
)
def test_dependent_columns_and_repeated_rows_are_exact(
    seed: int, filters: int, sound: int, data: st.DataObject
) -> None:
    composition, basis = factors(seed, 1, filters, min(sound, filters), 7)
    columns = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=filters))
    spread = torch.zeros(composition.shape[2], len(columns), dtype=torch.float64)
    for column, source in enumerate(columns):
        if source < len(spread):
            spread[source, column] = 1.0
    composition = composition @ spread
    composition[0, 1] = composition[0, 0]
    basis = factors(seed + 1, 1, filters, len(columns), 7)[1]
    check(regauge(composition, basis), composition, basis)


@pytest.mark.parametrize("method", FORMS["gauge"].methods)
@pytest.mark.parametrize("shape", [(12, 3, 3, 3), (12, 2, 1, 1)], ids=["wide", "tall"])
def test_every_method_of_bases_can_be_put_into_gauge_form(shape: tuple[int, ...], method: str) -> None:
    found = decompose(torch.randn(shape), 2, method)
    for rank in range(1, found.basis.shape[1] + 1):
        fit = found.factors(rank)
        check(regauge(fit.composition, fit.basis), fit.composition, fit.basis)


def test_columns_of_very_different_sizes_are_exact() -> None:
    composition, basis = factors(0, 1, 30, 10, 50)
    scale = 10.0 ** -torch.arange(0, 20, 2).double()
    check(regauge(composition * scale, basis), composition * scale, basis)
    swept = (composition * scale, basis / scale[:, None])
    check(regauge(*swept), *swept)
    assert torch.equal(regauge(*swept).rows, regauge(composition, basis).rows)


def test_zero_factors_and_full_rank() -> None:
    composition, basis = factors(0, 2, 6, 3, 9)
    check(regauge(composition * 0, basis), composition * 0, basis)
    square, wide = factors(0, 2, 6, 6, 9)
    assert regauge(square, wide).rest.shape == (2, 0)
    check(regauge(square, wide), square, wide)


def test_a_tighter_limit_bounds_the_coefficients_of_a_bad_start() -> None:
    """Kahan's matrix, on which pivoted QR alone leaves coefficients that grow as 2^R."""
    size, cosine = 20, 0.285
    scale = (1 - cosine**2) ** (torch.arange(size).double() / 2)
    kahan = scale[:, None] * (torch.eye(size).double() - cosine * torch.ones(size, size).double().triu(1))
    kahan *= 1 + 1e-6 * torch.arange(size, 0, -1).double()  # the pivots keep their order
    composition, basis = kahan.T[:, : size - 1].contiguous(), torch.eye(size - 1).double()
    loose, tight = (regauge(composition[None], basis[None], limit) for limit in (1e9, 1.05))
    assert loose.mixing.abs().max() > 2
    assert tight.mixing.abs().max() <= 1.05
    check(tight, composition[None], basis[None])


def test_refusals() -> None:
    composition, basis = factors(0, 2, 6, 3, 9)
    with pytest.raises(InputError, match=r"\(2, 6, 3\) and basis \(2, 2, 9\) do not fit; pass"):
        regauge(composition, basis[:, :2])
    with pytest.raises(InputError, match="R at most O"):
        regauge(composition[:, :2], basis)
    with pytest.raises(InputError, match="not finite; pass finite factors"):
        regauge(composition * float("nan"), basis)
    with pytest.raises(SelectionError, match=r"limit=1.0 lets the exchanges run on; pass a number above 1"):
        regauge(composition, basis, limit=1.0)
