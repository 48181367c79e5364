"""Fits to data: at their bound where there is one, exact at full rank, never worse than where they began."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fxbasis import datafit
from fxbasis.compositions import GaugeComposition, ReducedComposition
from fxbasis.costs import ConvShape
from fxbasis.datafit import DAMPING, error_of, features, fit_to_data, refit, renewed, short_fits, squared
from fxbasis.factors import folded
from fxbasis.fitting import fit
from fxbasis.least_squares import RIDGE, Sums, ridge_solve
from fxbasis.recipe import LayerPlan
from fxbasis.structures import FORMS, settled

SHAPES = {
    "3x3": ConvShape(4, 6, (3, 3)),
    "groups": ConvShape(4, 6, (3, 2), 2),
    "1x1": ConvShape(4, 6, (1, 1)),
}
shapes = pytest.mark.parametrize("kind", SHAPES)
STEPPED = [form for form in FORMS if form not in ("output", "gauge", "reduced")]
DEFECTS = ["few samples", "dead", "all dead", "no gradient", "overflow", "zero weight"]
Case = tuple[Tensor, Tensor, Tensor]


def case(kind: str, seed: int = 0, samples: int = 200) -> Case:
    """A weight, a second moment of correlated patches with a mean, and a metric of some few directions."""
    shape, generator = SHAPES[kind], torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    q, g = shape.fan_in, shape.groups
    patches = draw(g, samples, q) @ draw(g, q, q) * torch.logspace(0, -2, q).double() + 0.1
    gradients = draw(500, 3) @ draw(3, 6) + 0.3 * draw(500, 6)
    weight = draw(6, shape.in_channels // g, *shape.kernel_size)
    return weight, patches.mT @ patches / samples, gradients.mT @ gradients / 500


def plan_of(kind: str, form: str, ranks: tuple[int, ...], method: str = "") -> LayerPlan:
    shape = SHAPES[kind]
    rest: dict[str, Any] = {"form": form, "method": method or FORMS[form].methods[0], "ranks": ranks}
    channels = {"in_channels": shape.in_channels, "out_channels": shape.out_channels, "groups": shape.groups}
    return LayerPlan(number=1, name="conv", kernel_size=shape.kernel_size, **channels, **rest)


def at(kind: str, form: str, part: float) -> LayerPlan:
    """The plan with this part of the ranks at which the form is exact."""
    shape = SHAPES[kind]
    largest = FORMS[form].largest_ranks(shape)
    ranks = tuple(shape.groups * max(1, round(part * rank / shape.groups)) for rank in largest)
    return plan_of(kind, form, settled(form, shape, ranks))


@shapes
@pytest.mark.parametrize("form", STEPPED)
def test_products_of_features_are_those_of_whole_patches(form: str, kind: str) -> None:
    weight, moment, _ = case(kind)
    plan = at(kind, form, 0.6)
    found, (height, width) = features(plan, fit(weight, plan)), plan.steps[-1].kernel_size
    image, gram = datafit._products(found, moment, height * width)
    assert torch.allclose(image, moment @ found.mT, rtol=1e-10, atol=1e-10)
    assert torch.allclose(gram, found @ moment @ found.mT, rtol=1e-10, atol=1e-10)


def made(plan: LayerPlan, weights: dict[str, Tensor]) -> Tensor:
    """The folded weight, with what the composition is as a matrix."""
    composition = {"gauge": GaugeComposition, "reduced": ReducedComposition}.get(plan.form)
    if composition is None:
        return folded(plan, weights)
    module = composition(plan.steps[-1], torch.zeros(1).double(), bias=False)
    state = {name.partition(".")[2]: value for name, value in weights.items() if name != "basis.weight"}
    state["weight"] = state["weight"].reshape(module.weight.shape)
    module.load_state_dict(state)
    return folded(plan, {**weights, "composition.weight": module.dense_weight().detach()})


def damped(metric: Tensor) -> Tensor:
    return metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric)).double()


def tail(weight: Tensor, moment: Tensor, metric: Tensor, rank: int) -> float:
    """The least error of any weight of this rank in each group, over the whole, by eigenvalues."""
    groups, size = len(moment), len(weight) // len(moment)
    rows = weight.reshape(groups, size, -1)
    least = whole = 0.0
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        root = torch.linalg.cholesky(metric[part, part])  # any T with T T^T = G
        values = torch.linalg.eigvalsh(root.mT @ rows[group] @ moment[group] @ rows[group].mT @ root)
        least += float(values[: size - rank // groups].clamp(min=0).sum())
        whole += float(values.sum())
    return least / whole


@shapes
@pytest.mark.parametrize("form", ["output", "gauge"])
@pytest.mark.parametrize("rank", [2, 4])
def test_output_pca_reaches_the_tail_of_the_eigenvalues(kind: str, form: str, rank: int) -> None:
    weight, moment, metric = case(kind)
    plan = plan_of(kind, form, (rank,))
    for given in (torch.eye(6).double(), metric):
        found = made(plan, fit_to_data(weight, plan, moment, given))
        bound = tail(weight, moment, damped(given), rank)
        assert error_of(weight, found, moment, damped(given)) == pytest.approx(bound, rel=1e-6)
    plain = made(plan, fit_to_data(weight, plan, moment, torch.eye(6).double()))
    assert error_of(weight, plain, moment) == pytest.approx(tail(weight, moment, torch.eye(6).double(), rank))


@shapes
def test_no_other_weight_of_the_rank_is_better(kind: str) -> None:
    weight, moment, metric = case(kind)
    plan, metric = plan_of(kind, "output", (4,)), damped(metric)
    best = fit_to_data(weight, plan, moment, metric)
    least = error_of(weight, made(plan, best), moment, damped(metric))
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(200):
            other = {name: value + size * torch.randn_like(value) for name, value in best.items()}
            assert error_of(weight, made(plan, other), moment, damped(metric)) >= least * (1 - 1e-9)


@shapes
def test_the_error_is_what_all_patches_give(kind: str) -> None:
    """Of each group by itself: the moments hold nothing across groups."""
    weight, _, metric = case(kind)
    other, groups = torch.randn_like(weight), SHAPES[kind].groups
    patches = torch.randn(groups, 50, weight[0].numel(), dtype=torch.float64)
    moment, shift = patches.mT @ patches / 50, (weight - other).reshape(groups, -1, weight[0].numel())
    total = 0.0
    for group, outputs in enumerate(patches @ shift.mT):
        part = slice(group * 6 // groups, (group + 1) * 6 // groups)
        total += float(torch.einsum("no,op,np->", outputs, metric[part, part], outputs)) / 50
    assert squared(weight - other, moment, metric) == pytest.approx(total)
    assert error_of(weight, weight, moment, metric) == 0.0
    assert error_of(weight, torch.zeros_like(weight), moment, metric) == pytest.approx(1.0)
    assert error_of(torch.zeros_like(weight), weight, moment) == 0.0


@shapes
@pytest.mark.parametrize("form", FORMS)
def test_full_rank_is_exact(kind: str, form: str) -> None:
    weight, moment, metric = case(kind)
    plan = at(kind, form, 1.0)
    if form == "reduced":
        plan = plan_of(kind, form, (6, 0))
    start = made(plan, fit(weight, plan))
    found = made(plan, fit_to_data(weight, plan, moment, metric))
    allowed = 1e-9 + 2 * float((start - weight).norm() / weight.norm())  # cp converges, and is not closed
    assert float((found - weight).norm() / weight.norm()) <= allowed


@shapes
@pytest.mark.parametrize("form", STEPPED)
@pytest.mark.parametrize("part", [0.3, 0.6])
def test_renewing_never_increases_the_error(kind: str, form: str, part: float) -> None:
    weight, moment, metric = case(kind)
    plan = at(kind, form, part)
    start = fit(weight, plan)
    errors = [error_of(weight, folded(plan, start), moment, metric)]
    for rounds in range(4):
        found = renewed(weight, plan, start, moment, metric, rounds)
        errors.append(error_of(weight, folded(plan, found), moment, metric))
    assert all(later <= earlier * (1 + 1e-9) + 1e-15 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


@shapes
@pytest.mark.parametrize("form", FORMS)
def test_the_error_falls_with_the_rank_and_below_that_of_the_weight_fit(kind: str, form: str) -> None:
    weight, moment, metric = case(kind)
    metric, errors = damped(metric) if form != "reduced" else torch.eye(6).double(), []
    for part in (0.3, 0.6, 1.0):
        plan = at(kind, form, part)
        found = error_of(weight, made(plan, fit_to_data(weight, plan, moment, metric)), moment, metric)
        assert found <= error_of(weight, made(plan, fit(weight, plan)), moment, metric) * (1 + 1e-9) + 1e-12
        errors.append(found)
    assert all(later <= earlier * 1.001 + 1e-9 for earlier, later in pairwise(errors))


@shapes
@pytest.mark.parametrize("form", STEPPED)
def test_refit_is_the_least_squares_solution(kind: str, form: str) -> None:
    """The normal equations hold to the ridge; against any metric, since every row is free."""
    weight, moment, _ = case(kind)
    plan = at(kind, form, 0.5)
    found = refit(weight, plan, fit(weight, plan), moment)
    basis = features(plan, found)
    rest = (weight - folded(plan, found)).reshape(len(moment), -1, basis.shape[2]) @ moment @ basis.mT
    gram = (basis @ moment @ basis.mT).diagonal(dim1=1, dim2=2).sqrt()
    scale = float(squared(weight, moment)) ** 0.5
    assert float((rest / gram[:, None]).abs().max()) <= 100 * RIDGE * scale


@shapes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("defect", DEFECTS)
def test_singular_data_give_finite_weights(kind: str, form: str, defect: str) -> None:
    weight, moment, metric = case(kind, samples=2 if defect == "few samples" else 200)
    if defect == "dead":
        moment[:, :3], moment[:, :, :3] = 0.0, 0.0
    if defect in ("all dead", "no gradient", "overflow"):
        (metric if defect == "no gradient" else moment).mul_(float("inf") if defect == "overflow" else 0.0)
    if defect == "zero weight":
        weight.zero_()
    plan = at(kind, form, 0.5)
    start = short_fits(weight, [plan])[0] if form in ("cp", "cp4") else None
    found = fit_to_data(weight, plan, moment, metric, start)
    assert all(bool(value.isfinite().all()) for value in found.values())
    if defect != "few samples":  # nothing flies off where nothing is seen
        assert float(made(plan, found).norm()) <= 3 * float(weight.norm())
    if defect in ("all dead", "overflow"):
        assert torch.equal(made(plan, found), made(plan, start or fit(weight, plan)))


def test_what_was_not_seen_stays_as_the_fit_to_the_weight_has_it() -> None:
    weight, moment, metric = case("3x3", samples=3)
    plan = at("3x3", "spatial", 1.0)
    found = made(plan, fit_to_data(weight, plan, moment, metric))
    assert float((found - weight).norm()) <= 1e-6 * float(weight.norm())


def regression(samples: int, features: int) -> tuple[Sums, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, samples, features, generator=generator, dtype=torch.float64) + 3.0
    y = torch.randn(2, samples, 4, generator=generator, dtype=torch.float64)
    sums = Sums(2, features, 4)
    for part in (slice(0, samples // 2), slice(samples // 2, None)):
        sums.add(x[:, part], y[:, part])
    return sums, x, y


def test_sums_solve_as_lstsq_does() -> None:
    sums, x, y = regression(50, 5)
    start = torch.randn(2, 4, 5, dtype=torch.float64)
    weight, constant = sums.solve(start, with_mean=False)
    assert torch.allclose(weight, torch.linalg.lstsq(x, y).solution.mT, atol=1e-4)
    assert not constant.any()
    weight, constant = sums.solve(start, with_mean=True)
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :, :1])], 2), y).solution.mT
    assert torch.allclose(torch.cat([weight, constant[:, :, None]], 2), exact, atol=1e-4)


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("samples", [3, 50])
def test_dead_and_constant_features_keep_their_weights(samples: int, with_mean: bool) -> None:
    _, x, y = regression(samples, 5)
    x[:, :, 0], x[:, :, 1] = 0.0, 5.1
    x[:, :, 2] = x[:, :, 3]
    sums, start = Sums(2, 5, 4), torch.randn(2, 4, 5, dtype=torch.float64)
    sums.add(x, y)
    weight, constant = sums.solve(start, with_mean=with_mean)
    assert torch.equal(weight[:, :, 0], start[:, :, 0])
    assert not with_mean or torch.equal(weight[:, :, 1], start[:, :, 1])
    assert float(weight.abs().max()) < 100
    before = (y - x @ start.mT).square().sum()
    assert float((y - x @ weight.mT - constant[:, None]).square().sum()) <= float(before)


def test_a_solution_that_is_there_already_stays() -> None:
    gram = torch.ones(1, 3, 3, dtype=torch.float64)  # of rank one
    start = torch.tensor([[[1.0, -2.0, 4.0]]], dtype=torch.float64)
    assert torch.equal(ridge_solve(gram, start @ gram, start), start)
