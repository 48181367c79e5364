"""The reduced composition: the best code for given atoms by brute force, real copies, counts, extremes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import scipy.cluster.hierarchy
import scipy.linalg
import torch
from torch import Tensor

from fxbasis import coding
from fxbasis.clustering import agglomerate, pivoted_filters
from fxbasis.coding import BASES, Code, encode, encode_groups
from fxbasis.errors import InputError, SelectionError

bases = pytest.mark.parametrize("basis", BASES)
copies = pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])


def filters_of(filters: int, width: int = 40) -> Tensor:
    """Filters that are alike in part, as those of trained layers are."""
    common = torch.randn(filters, 4).double() @ torch.randn(4, width).double()
    return common + 0.7 * torch.randn(filters, width).double()


def gram_of(filters: int, width: int = 40) -> Tensor:
    weight = filters_of(filters, width)
    return weight @ weight.mT


def measured(gram: Tensor, code: Code) -> float:
    gap = torch.eye(len(gram)).double() - code.composition() @ code.atoms
    return float((gap @ gram @ gap.mT).trace() / gram.trace())


def check(code: Code, filters: int, rank: int, terms: int, scaled: bool) -> None:
    """Shapes, counts, two different atoms in a sum, and copies that are copies."""
    composition, copied = code.composition(), code.second < 0
    assert code.atoms.shape == (rank, filters)
    assert composition.shape == (filters, rank)
    assert int((~copied).sum()) == terms
    assert (code.first != code.second).all()
    assert ((code.first >= 0) & (code.first < rank) & (code.second < rank)).all()
    assert (code.v[copied] == 0).all()
    assert (composition != 0).sum(dim=1).max() <= 2
    assert composition.isfinite().all()
    assert code.atoms.isfinite().all()
    for atom in range(rank):
        alone = code.u[copied & (code.first == atom)]
        assert not len(alone) or (alone.abs().max() == 1 and (alone == 1).any())
        assert scaled or (alone == 1).all()


@copies
def test_coding_is_the_best_of_all_single_atoms_and_all_pairs(scaled: bool) -> None:
    filters, terms = 11, 4
    weight, atoms = filters_of(filters), torch.randn(5, filters).double()
    gram, basis = weight @ weight.mT, atoms @ weight
    single, pair = torch.full((filters,), torch.inf).double(), torch.full((filters,), torch.inf).double()
    for atom in basis:
        u = (weight @ atom / (atom @ atom) if scaled else torch.ones(filters))[:, None]
        single = single.minimum((weight - u * atom).square().sum(1))
    for two in combinations(range(5), 2):
        both = torch.linalg.lstsq(basis[list(two)].mT, weight.mT).solution.mT
        pair = pair.minimum((weight - both @ basis[list(two)]).square().sum(1))
    gains = (single - pair).sort(descending=True).values
    code, residual = coding._code(gram, atoms, terms, scaled, coding._best_pairs)
    rebuilt = (weight - code.composition() @ basis).square().sum(1)
    assert torch.allclose(residual, rebuilt)
    assert torch.allclose(rebuilt[code.second >= 0], pair[code.second >= 0])
    assert torch.allclose(rebuilt[code.second < 0], single[code.second < 0])
    assert float(rebuilt.sum()) == pytest.approx(float(single.sum() - gains[:terms].sum()))
    assert code.error == pytest.approx(measured(gram, code))


@bases
@copies
@pytest.mark.parametrize(("rank", "beta"), [(1, 0.5), (2, 1.0), (8, 0.0), (8, 0.25), (8, 1.0), (16, 0.5)])
def test_a_code_keeps_its_promises(basis: str, scaled: bool, rank: int, beta: float) -> None:
    gram = gram_of(16)
    code = encode(gram, rank, beta, basis, scaled)
    check(code, 16, rank, round(beta * 16) if rank > 1 else 0, scaled)
    assert code.error == pytest.approx(measured(gram, code), abs=1e-12)
    assert 0 <= code.error < 1 or not scaled
    assert len({tuple(row) for row in code.composition().tolist()}) == code.distinct_outputs
    if basis == "subset":
        assert ((code.atoms != 0).sum(dim=1) == 1).all()
        assert len(torch.unique(code.atoms != 0, dim=0)) == rank


@bases
@copies
def test_exact_at_full_rank(basis: str, scaled: bool) -> None:
    for beta in (0.0, 0.5, 1.0):
        code = encode(gram_of(9), 9, beta, basis, scaled)
        assert code.error < 1e-12
        assert beta or code.distinct_outputs == 9


@pytest.mark.parametrize("basis", BASES)
def test_parallel_filters_are_exact_at_full_rank_down_to_the_last_digit(basis: str) -> None:
    filters = torch.linspace(-1, 1, 3).double()[:, None] * torch.randn(6).double()
    for beta in (0.0, 0.25, 1.0):
        code = encode(filters @ filters.mT, 3, beta, basis)
        assert torch.equal(code.composition() @ (code.atoms @ filters), filters)
        assert int((code.second >= 0).sum()) == round(beta * 3)


@bases
@copies
def test_zero_filters_and_zero_gram(basis: str, scaled: bool) -> None:
    code = encode(torch.zeros(5, 5), 2, 0.4, basis, scaled)
    assert code.error == 0.0
    assert code.composition().isfinite().all()
    weight = filters_of(8)
    weight[[1, 4, 5]] = 0.0
    code = encode(weight @ weight.mT, 6, 0.25, basis, scaled)
    assert code.error < 1e-12
    assert encode(torch.ones(1, 1), 1, 1.0, basis, scaled).error < 1e-12


@bases
def test_more_terms_more_atoms_and_scaled_copies_lower_the_error(basis: str) -> None:
    gram = gram_of(24)
    errors = [encode(gram, 8, beta, basis).error for beta in (0.0, 0.5, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert encode(gram, 16, 0.25, basis).error < encode(gram, 8, 0.25, basis).error
    assert encode(gram, 8, 0.0, basis).error < encode(gram, 8, 0.0, basis, scaled=False).error


@copies
def test_learned_atoms_beat_the_subset_and_alternations_help(scaled: bool) -> None:
    gram = gram_of(32)
    learned, start, subset = (
        encode(gram, 12, 0.25, basis, scaled, steps).error
        for basis, steps in (("atoms", 15), ("atoms", 0), ("subset", 15))
    )
    assert learned < start
    assert learned < subset


@bases
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_planted_copies_are_found(basis: str, scaled: bool) -> None:
    owner = torch.arange(20) % 6
    scale = (1 + torch.rand(20, 1).double()) * torch.randn(20, 1).sign() if scaled else torch.ones(20, 1)
    weight = scale * torch.randn(6, 30).double()[owner]
    code = encode(weight @ weight.mT, 6, 0.0, basis, scaled)
    assert code.error < 1e-12
    assert all(len(set(code.first[owner == k].tolist())) == 1 for k in range(6))
    assert scaled or code.distinct_outputs == 6


@bases
def test_planted_sums_are_found(basis: str) -> None:
    atoms = torch.linalg.qr(torch.randn(30, 6).double())[0].mT
    sums = torch.stack([0.5 * atoms[k] - 0.6 * atoms[m] for k, m in ((0, 1), (2, 3), (1, 5))])
    weight = torch.cat([sums, atoms])
    code = encode(weight @ weight.mT, 6, 3 / 9, basis, scaled=False)
    assert code.error < 1e-12
    assert (code.second >= 0).nonzero()[:, 0].tolist() == [0, 1, 2]


@copies
def test_the_error_knows_no_scale_and_the_dtype_does_not_matter(scaled: bool) -> None:
    gram = gram_of(12)
    code = encode(gram, 5, 0.25, scaled=scaled)
    assert encode(gram * 1e-8, 5, 0.25, scaled=scaled).error == pytest.approx(code.error)
    assert encode(gram.float(), 5, 0.25, scaled=scaled).error == pytest.approx(code.error, rel=1e-3)


def test_nearly_parallel_atoms_have_no_huge_coefficients() -> None:
    weight = filters_of(6)
    weight[1] = weight[0] + 1e-7 * weight[1]
    code, _ = coding._code(weight @ weight.mT, torch.eye(6).double()[:3], 6, True)
    assert code.composition().abs().max() < 1e3
    code, _ = coding._code(weight @ weight.mT, torch.eye(6).double()[:2], 6, True)
    assert code.composition().isfinite().all()
    assert (code.first != code.second).all()


@copies
@pytest.mark.parametrize("faint", [1e-3, 1e-9, 1e-20])
def test_dead_filters_make_no_huge_coefficients(scaled: bool, faint: float) -> None:
    weight = filters_of(12)
    weight[::3] *= faint
    gram = weight @ weight.mT
    for beta in (0.25, 0.75):
        code = encode(gram, 4, beta, scaled=scaled)
        assert int((code.second >= 0).sum()) == beta * 12
        assert code.composition().abs().max() < 100
        assert code.atoms.isfinite().all()
        assert scaled or (code.u[code.second < 0] == 1).all()
        assert code.error == pytest.approx(measured(gram, code))


def test_an_atom_without_users_restarts_on_the_worst_filter() -> None:
    gram = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])).double()
    code, residual = coding._code(gram, torch.eye(4).double()[[0, 0]], 0, True)
    atoms = coding._least_squares(gram, code, residual, True)
    assert (atoms[1] != 0).tolist() == [False, True, False, False]


@bases
def test_errors_of_outputs_count_with_their_weights(basis: str) -> None:
    gram, weights = gram_of(24), torch.rand(24).double().square() + 0.01
    scale = weights.sqrt()
    weighed = gram * scale * scale[:, None]

    def error(code: Code) -> float:
        return measured(weighed, replace(code, atoms=code.atoms / scale, u=code.u * scale, v=code.v * scale))

    code = encode(gram, 8, 0.25, basis, weights=weights)
    check(code, 24, 8, 6, True)
    assert code.error == pytest.approx(error(code))
    assert error(code) < error(encode(gram, 8, 0.25, basis))
    assert measured(gram, code) > measured(gram, encode(gram, 8, 0.25, basis))


def test_the_pair_beside_the_best_atom_is_no_better_than_the_best_pair() -> None:
    weight, atoms = filters_of(30), torch.randn(9, 30).double()
    gram = weight @ weight.mT
    greedy, best = (
        coding._code(gram, atoms, 30, True, pairs)[0].error
        for pairs in (coding._greedy_pairs, coding._best_pairs)
    )
    assert best < greedy < coding._code(gram, atoms, 0, True)[0].error


def test_groups_are_coded_apart() -> None:
    grams = torch.stack([gram_of(8), gram_of(8)])
    codes = encode_groups(grams, 4, 0.25)
    assert [code.error for code in codes] == [encode(gram, 4, 0.25).error for gram in grams]


def test_pivoted_filters_are_those_of_pivoted_qr() -> None:
    weight = filters_of(15)
    order = scipy.linalg.qr(weight.mT.numpy(), mode="r", pivoting=True)[1]
    assert pivoted_filters(weight @ weight.mT, 9).tolist() == order[:9].tolist()
    assert sorted(pivoted_filters(torch.ones(4, 4).double(), 4).tolist()) == [0, 1, 2, 3]


def test_plain_agglomeration_is_that_of_ward() -> None:
    weight = filters_of(20)
    tree = scipy.cluster.hierarchy.linkage(weight.numpy(), "ward")
    expected = scipy.cluster.hierarchy.fcluster(tree, 7, "maxclust")
    atoms, owner = agglomerate(weight @ weight.mT, 7, scaled=False)
    assert torch.equal(owner[:, None] == owner, torch.tensor(expected[:, None] == expected))
    means = torch.stack([weight[owner == cluster].mean(dim=0) for cluster in range(7)])
    assert torch.allclose(atoms @ weight, means)


def test_refusals() -> None:
    gram = gram_of(4)
    with pytest.raises(InputError, match=r"gram of shape \(4, 3\) is not square; pass"):
        encode(gram[:, :3], 2)
    with pytest.raises(InputError, match="not finite; pass finite ones"):
        encode(gram * float("inf"), 2)
    with pytest.raises(InputError, match=r"grams of shape \(4, 4\) are not a batch; pass \(g, O, O\)"):
        encode_groups(gram, 2)
    for rank in (0, 5):
        with pytest.raises(SelectionError, match=rf"rank={rank} does not fit 4 filters; choose 1 to 4"):
            encode(gram, rank)
    with pytest.raises(SelectionError, match=r"beta=1.5 is no fraction of the outputs; choose 0 to 1"):
        encode(gram, 2, beta=1.5)
    with pytest.raises(SelectionError, match="basis='best' is not known; choose one of atoms, subset"):
        encode(gram, 2, basis="best")
    with pytest.raises(SelectionError, match="steps=-1 is negative; choose 0 or more"):
        encode(gram, 2, steps=-1)
