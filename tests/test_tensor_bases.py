"""CP, Tucker-2 and tensor train: exact at full rank, near their best elsewhere, sound on odd weights.

Every fit is put together again by an einsum written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fxbasis.cp import cp, largest_cp
from fxbasis.cp_effort import default_starts, default_sweeps
from fxbasis.errors import InputError, SelectionError
from fxbasis.input_moments import RECTIFIED, weighed
from fxbasis.tensor_bases import largest_tt, largest_tucker2, tt, tucker2

# (g, O, I, K_h, K_w)
SHAPES = {
    "square": (1, 6, 6, 3, 3),
    "wide": (1, 4, 11, 3, 3),
    "tall": (1, 11, 4, 3, 3),
    "groups": (3, 4, 5, 3, 2),
    "depthwise": (5, 1, 1, 3, 3),
    "one-in": (2, 6, 1, 3, 3),
    "one-out": (2, 1, 7, 3, 3),
    "1x1": (2, 5, 6, 1, 1),
    "1xK": (1, 5, 6, 1, 4),
    "Kx1": (1, 5, 6, 4, 1),
    "even": (1, 5, 4, 2, 4),
    "few-channels": (2, 2, 3, 5, 5),
    "more-out-than-fan-in": (1, 40, 2, 2, 2),
    "more-in-than-fan-out": (1, 2, 40, 2, 2),
}
shapes = pytest.mark.parametrize("kind", SHAPES)
splits = pytest.mark.parametrize("factors", [3, 4])


def weight_of(kind: str, seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def from_cp(blocks: tuple[Tensor, ...]) -> Tensor:
    first, *taps, last = blocks
    if len(taps) == 1:
        return torch.einsum("gor,gryx,gri->goiyx", last[..., 0, 0], taps[0][:, :, 0], first[..., 0, 0])
    down, across = taps[0][:, :, 0, :, 0], taps[1][:, :, 0, 0]
    return torch.einsum("gor,gry,grx,gri->goiyx", last[..., 0, 0], down, across, first[..., 0, 0])


def from_tucker2(blocks: tuple[Tensor, ...]) -> Tensor:
    first, core, last = blocks
    return torch.einsum("gos,gsryx,gri->goiyx", last[..., 0, 0], core, first[..., 0, 0])


def from_tt(blocks: tuple[Tensor, ...]) -> Tensor:
    first, down, across, last = blocks
    pieces = last[..., 0, 0], across[..., 0, :], down[..., 0], first[..., 0, 0]
    return torch.einsum("got,gtsx,gsry,gri->goiyx", *pieces)


def gap(weight: Tensor, found: Tensor) -> float:
    """The relative error; the absolute one for a zero weight."""
    return float((found - weight).norm() / (weight.norm() if weight.norm() > 0 else 1.0))


def output_error(weight: Tensor, found: Tensor) -> float:
    """The error that the iterated fits go by."""
    error = found - weight
    return float((weighed(error).square().sum() + RECTIFIED * error.flatten(2).sum(2).square().sum()).sqrt())


Fit = tuple[Callable[..., tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], Tensor]]
FITS: dict[str, Fit] = {
    "cp": (
        lambda weight, share: cp(weight, _part(share, largest_cp(weight.shape[1:]))[0], sweeps=40, starts=2),
        from_cp,
    ),
    "cp4": (
        lambda weight, share: cp(
            weight, _part(share, largest_cp(weight.shape[1:], 4))[0], 4, sweeps=40, starts=2
        ),
        from_cp,
    ),
    "tucker2": (
        lambda weight, share: tucker2(weight, _part(share, *largest_tucker2(weight.shape[1:]))),
        from_tucker2,
    ),
    "hosvd": (
        lambda weight, share: tucker2(weight, _part(share, *largest_tucker2(weight.shape[1:])), "svd"),
        from_tucker2,
    ),
    "tt-svd": (lambda weight, share: tt(weight, _part(share, *largest_tt(weight.shape[1:])), "svd"), from_tt),
    "tt": (lambda weight, share: tt(weight, _part(share, *largest_tt(weight.shape[1:]))), from_tt),
}
fits = pytest.mark.parametrize("name", FITS)


def _part(share: float, *ranks: int) -> tuple[int, ...]:
    return tuple(max(1, round(share * rank)) for rank in ranks)


@fits
@shapes
def test_exact_at_the_largest_rank_and_above(kind: str, name: str) -> None:
    weight, (fit, together) = weight_of(kind), FITS[name]
    full, beyond = fit(weight, 1.0), fit(weight, 3.0)
    assert gap(weight, together(full)) < 1e-12
    assert [block.shape for block in full] == [block.shape for block in beyond]
    assert all(torch.equal(one, other) for one, other in zip(full, beyond, strict=True))


@fits
@shapes
def test_error_falls_with_the_rank_and_never_passes_the_weight(kind: str, name: str) -> None:
    weight, (fit, together) = weight_of(kind), FITS[name]
    errors = [gap(weight, together(fit(weight, share))) for share in (0.01, 0.5, 1.0)]
    assert all(before >= after - 1e-6 for before, after in pairwise(errors))
    assert errors[0] <= 1.0


@fits
@shapes
def test_blocks_chain_and_are_float64(kind: str, name: str) -> None:
    weight = weight_of(kind)
    blocks = FITS[name][0](weight.float(), 0.5)
    groups, out, into, height, width = weight.shape
    assert {block.dtype for block in blocks} == {torch.float64}
    assert {len(block) for block in blocks} == {groups}
    assert all(block.is_contiguous() for block in blocks)
    assert blocks[0].shape[2:] == (into, 1, 1)
    assert blocks[-1].shape[1] == out
    for before, after in pairwise(blocks):
        depthwise = name.startswith("cp") and after is not blocks[-1]
        assert after.shape[2] == (1 if depthwise else before.shape[1])
        assert not depthwise or after.shape[1] == before.shape[1]
    sizes = torch.tensor([block.shape[3:] for block in blocks]).prod(0)
    assert tuple(sizes) == (height, width)


@fits
def test_groups_are_decomposed_apart(name: str) -> None:
    weight, (fit, together) = weight_of("groups"), FITS[name]
    errors = [gap(one[None], together(fit(one[None], 0.4))) for one in weight]
    found = together(fit(weight, 0.4))
    assert [gap(one, other) for one, other in zip(weight, found, strict=True)] == pytest.approx(
        errors, rel=0.02
    )


@fits
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_zero_weights_give_zeros(name: str, share: float) -> None:
    fit, together = FITS[name]
    mixed = weight_of("groups")
    mixed[1] = 0.0
    for weight in (torch.zeros(SHAPES["groups"]), mixed):
        blocks = fit(weight, share)
        assert all(bool(block.isfinite().all()) for block in blocks)
        assert float(together(blocks)[1].abs().max()) == 0.0


@fits
def test_the_same_weight_gives_the_same_fit_and_the_global_generator_stays(name: str) -> None:
    weight, before = weight_of("square"), torch.get_rng_state()
    first, second = FITS[name][0](weight, 0.4), FITS[name][0](weight, 0.4)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@fits
def test_scale_of_the_weight_does_not_matter(name: str) -> None:
    weight, (fit, together) = weight_of("tall"), FITS[name]
    plain = gap(weight, together(fit(weight, 0.4)))
    for scale in (1e-12, 1e12):
        assert gap(weight * scale, together(fit(weight * scale, 0.4))) == pytest.approx(plain, rel=1e-3)


def low_rank_cp(rank: int, factors: int, groups: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sizes = [(rank, 7, 1, 1), (rank, 1, 3, 3), (9, rank, 1, 1)]
    if factors == 4:
        sizes[1:2] = [(rank, 1, 3, 1), (rank, 1, 1, 3)]
    return from_cp(
        tuple(torch.randn(groups, *size, generator=generator, dtype=torch.float64) for size in sizes)
    )


@splits
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_cp_finds_a_weight_of_its_rank(rank: int, factors: int) -> None:
    weight = low_rank_cp(rank, factors)
    assert gap(weight, from_cp(cp(weight, rank, factors, starts=4))) < 1e-6
    assert gap(weight, from_cp(cp(weight, rank + 1, factors, starts=4))) < 1e-6


def test_tucker2_and_tt_find_a_weight_of_their_ranks() -> None:
    small = torch.randn(2, 4, 3, 3, 3).double()
    weight = torch.einsum(
        "gos,gsryx,gri->goiyx", torch.randn(2, 9, 4).double(), small, torch.randn(2, 3, 8).double()
    )
    for method in ("als", "svd"):
        assert gap(weight, from_tucker2(tucker2(weight, (3, 4), method))) < 1e-12
    blocks = [
        torch.randn(2, *size).double() for size in [(2, 8, 1, 1), (4, 2, 3, 1), (3, 4, 1, 3), (9, 3, 1, 1)]
    ]
    weight = from_tt(tuple(blocks))
    assert gap(weight, from_tt(tt(weight, (2, 4, 3)))) < 1e-12


@splits
def test_cp_of_a_matrix_is_its_singular_value_decomposition(factors: int) -> None:
    for kind in ("1x1", "one-in", "one-out"):
        weight = weight_of(kind)
        matrices = weight.flatten(2) if kind == "1x1" else weight.flatten(1, 2).flatten(2)
        if factors == 4 and kind != "1x1":
            continue  # three modes are longer than 1
        squares = torch.linalg.svdvals(matrices.flatten(2)) ** 2
        bound = float((squares[:, 2:].sum() / squares.sum()).sqrt())
        assert gap(weight, from_cp(cp(weight, 2, factors))) == pytest.approx(bound, rel=1e-9)


@splits
@shapes
def test_cp_is_balanced(kind: str, factors: int) -> None:
    first, *taps, last = cp(weight_of(kind), 3, factors)
    norms = [first.flatten(2).norm(dim=2), last.flatten(2).norm(dim=1)]
    norms += [tap.flatten(2).norm(dim=2) for tap in taps]
    assert all(torch.allclose(norm, norms[0], rtol=1e-9) for norm in norms)


@splits
def test_cp_goes_below_its_start_and_holds_its_norms(factors: int) -> None:
    weight = weight_of("square")
    errors = [gap(weight, from_cp(cp(weight, 14, factors, sweeps=sweeps))) for sweeps in (1, 5, 25, 125)]
    assert all(before > after for before, after in pairwise(errors))
    assert float(cp(weight, 14, factors)[0].norm(dim=2).max()) ** (factors) < 5 * float(weight.norm())


def test_more_starts_are_never_worse() -> None:
    weight = weight_of("square", seed=1)
    one, many = (gap(weight, from_cp(cp(weight, 10, starts=starts))) for starts in (1, 4))
    assert many <= one * 1.05  # the last step gives up some of it for the sums


def test_the_end_of_a_wide_fit_in_float32_is_as_good_as_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1, 24, 24, 3, 3, generator=torch.Generator().manual_seed(2))
    coarse = gap(weight.double(), from_cp(cp(weight, 45, sweeps=40)))
    monkeypatch.setattr("fxbasis.cp.COARSE", math.inf)
    fine = gap(weight.double(), from_cp(cp(weight, 45, sweeps=40)))
    assert coarse == pytest.approx(fine, rel=0.02)


@splits
def test_cp_keeps_the_sums_of_the_filters(factors: int) -> None:
    """Their error is far below that of random ones, which sums over 108 weights would have."""
    weight = torch.randn(2, 12, 12, 3, 3, generator=torch.Generator().manual_seed(4)).double() + 0.1
    error = (from_cp(cp(weight, 20, factors)) - weight).flatten(2)
    assert float(error.sum(2).norm()) < 0.3 * float(error.norm())
    assert float(error.norm()) < 0.75 * float(weight.norm())


def test_a_start_that_overflows_is_dropped() -> None:
    weight = torch.randn(2, 1, 7, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    one, many = (gap(weight, from_cp(cp(weight, 3, 4, starts=starts))) for starts in (1, 16))
    assert many <= one * 1.05


def test_a_bounded_effort() -> None:
    assert [default_starts(1, (size, size, 3, 3), size * 2) for size in (16, 32, 64, 512)] == [4, 4, 2, 1]
    assert [default_starts(groups, (4, 4, 3, 3), 8) for groups in (1, 64)] == [4, 2]
    assert default_starts(10**6, (4, 4, 3, 3), 8) == 1


def test_als_is_never_worse_than_the_higher_order_svd() -> None:
    gains = []
    for seed in range(5):
        weight = weight_of("square", seed)
        for ranks in ((2, 2), (1, 5), (4, 3)):
            plain, better = (
                output_error(weight, from_tucker2(tucker2(weight, ranks, how))) for how in ("svd", "als")
            )
            gains.append(plain - better)
    assert min(gains) > -1e-12
    assert max(gains) > 1e-3


def test_als_of_a_train_is_never_worse_than_its_svd() -> None:
    gains = []
    for kind in ("square", "groups", "even", "more-in-than-fan-out"):
        weight = weight_of(kind)
        for ranks in ((2, 2, 2), (2, 5, 3), (1, 3, 2), (2, 1, 1)):
            plain, better = (output_error(weight, from_tt(tt(weight, ranks, how))) for how in ("svd", "als"))
            gains.append(plain - better)
    assert min(gains) > -1e-12
    assert max(gains) > 1e-3


def test_ranks_that_a_core_cannot_have_are_lowered() -> None:
    weight = weight_of("square")
    assert [tuple(block.shape[1:3]) for block in tucker2(weight[..., :1, :2], (6, 1))] == [
        (2, 6),
        (1, 2),
        (6, 1),
    ]
    assert [tuple(block.shape[1:3]) for block in tt(weight, (1, 9, 9))] == [(1, 6), (3, 1), (6, 3), (6, 6)]


def test_largest_ranks() -> None:
    assert largest_cp((16, 8, 3, 3)) == 72
    assert largest_cp((2, 3, 3, 3)) == 6
    assert largest_cp((2, 3, 3, 5), factors=4) == 18
    assert largest_tucker2((100, 2, 3, 3)) == (2, 18)
    assert largest_tt((100, 2, 3, 3)) == (2, 6, 18)
    assert default_sweeps((512, 512, 3, 3), 1141) < default_sweeps((256, 256, 3, 3), 566)


def test_refusals() -> None:
    weight = torch.randn(1, 4, 4, 3, 3)
    for rank in (0, -1, 2.0, True, "3"):
        with pytest.raises(
            SelectionError, match=r"rank=.* is not a rank; pass a whole number from 1 upwards"
        ):
            cp(weight, rank)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match=r"R2=0 is not a rank"):
        tucker2(weight, (1, 0))
    with pytest.raises(SelectionError, match=r"r3=0 is not a rank"):
        tt(weight, (1, 1, 0))
    with pytest.raises(SelectionError, match=r"method='hooi' is not known; choose one of als, svd"):
        tucker2(weight, (1, 1), "hooi")
    with pytest.raises(SelectionError, match=r"method='dmrg' is not known; choose one of als, svd"):
        tt(weight, (1, 1, 1), "dmrg")
    with pytest.raises(SelectionError, match=r"factors=5 is not known; choose 3, or 4 to split the taps"):
        cp(weight, 3, 5)
    with pytest.raises(
        InputError, match=r"shape \(4, 4, 3, 3\) has no blocks; pass one of \(g, O, I, K_h, K_w\)"
    ):
        tt(weight[0], (1, 1, 1))
    with pytest.raises(InputError, match=r"not finite; repair or leave out"):
        cp(weight * float("nan"), 3)
