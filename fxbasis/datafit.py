"""Fits of a form to data: the weights of its steps that change a layer's outputs least.

The error of a weight V in place of W is tr[G (W - V) M (W - V)^T], with M the second moment of the patches
and G a metric of the outputs (``statistics``). For the forms with a whole kernel first it has a closed
solution, whatever the patches: with T = G^1/2 and P the projector on the leading eigenvectors of
T W M W^T T, V = T^-1 P T W (output PCA; method of Zhang et al. 2016 in the Fisher metric).

For the others the folded weight is linear in each step. So from a fit to the weight alone the steps are
renewed in turn, each by conjugate gradients on its own least squares; the composition, whose normal equations
are small, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cp import cp, largest_cp
from .cp_starts import principal
from .factors import folded
from .fitting import decomposed, fit, gauge_factors, named, sliced
from .gauge import regauge
from .least_squares import ridge_solve
from .recipe import LayerPlan

__all__ = [
    "DIRECT",
    "SHORT",
    "Kept",
    "error_of",
    "features",
    "fit_to_data",
    "refit",
    "renewed",
    "short_fits",
    "squared",
]

WORK, SHORT_WORK, SWEEPS_WORK = 60e9, 4e9, 20e9
"""Multiply-adds that renewing a layer may take, thoroughly and in a short fit, and sweeps of the latter."""
ROUNDS, SHORT, STEPS, SWEEPS = 8, 1, 6, 15
"""Rounds of a thorough fit and of a short one, steps of conjugate gradients, sweeps before a short fit."""
DAMPING = 1e-3
DIRECT = ("output", "gauge", "reduced")
"""Forms whose fit to data needs no start."""
Weights = dict[str, Tensor]
Kept = dict[str, Any]


def fit_to_data(
    weight: Tensor,
    plan: LayerPlan,
    moment: Tensor,
    metric: Tensor,
    start: Weights | None = None,
    rounds: int = ROUNDS,
    kept: Kept | None = None,
) -> Weights:
    """The weights of the steps by name, in float64.

    Args:
        weight: (C, c / g, K_h, K_w), real and finite.
        plan: form and ranks.
        moment: (g, q, q), second moment of the patches, or their covariance where a constant is free.
        metric: (C, C), of the outputs.
        start: a fit to the weight, by default the best one.
        rounds: in which the steps are renewed, of forms that have no closed solution.
        kept: decompositions that serve all ranks, of one layer; filled here.
    """
    weight = weight.detach().to("cpu", torch.float64)
    powers = moment.diagonal(dim1=-2, dim2=-1)  # of second moments they bound all others
    if not powers.any() or not powers.isfinite().all() or plan.steps[-1].groups != plan.groups:
        return start or fit(weight, plan)  # no input was seen, or filters of several groups share a basis
    if plan.form in ("output", "gauge"):
        kept = {} if kept is None else kept
        if "projection" not in kept:
            kept["projection"] = _leading(weight, moment, _damped(metric))
        return _projected(weight, plan, *kept["projection"])
    metric = _damped(metric)
    if plan.form == "reduced":
        return fit(weight, plan, moment, metric)
    return renewed(weight, plan, start or fit(weight, plan), moment, metric, rounds)


def _damped(metric: Tensor) -> Tensor:
    """Invertible; the identity where no gradient was seen."""
    one, mean = torch.eye(len(metric), dtype=torch.float64), metric.diagonal().mean()
    return metric + DAMPING * mean * one if metric.isfinite().all() and mean > 0 else one


def blocks_of(metric: Tensor, groups: int) -> Tensor:
    """(g, C / g, C / g): the metric inside each group. Moments across groups are not known, nor needed."""
    size = len(metric) // groups
    parts = [slice(group * size, (group + 1) * size) for group in range(groups)]
    return torch.stack([metric[part, part] for part in parts])


def short_fits(weight: Tensor, plans: Sequence[LayerPlan], kept: Kept | None = None) -> list[Weights]:
    """Fits to the weight, all of one layer, to compare ranks by: of cp a few sweeps, of tucker2 and tt none.

    One decomposition serves all ranks of a form; ``kept`` keeps it for other ranks of the layer.
    """
    kept = {} if kept is None else kept
    found = []
    for plan in plans:
        if plan.form in ("cp", "cp4"):
            found.append(_short_cp(weight, plan, kept))
        elif plan.form in ("tucker2", "tt"):
            found.append(fit(weight, replace(plan, method="svd")))
        elif plan.form == "reduced":
            found.append(fit(weight, plan))
        else:
            if plan.form not in kept:
                kept[plan.form] = decomposed(weight, plan)
            found.append(sliced(kept[plan.form], weight, plan))
    return found


def _short_cp(weight: Tensor, plan: LayerPlan, kept: Kept) -> Weights:
    blocks = weight.detach().double().reshape(plan.groups, -1, *weight.shape[1:])
    factors = 3 if plan.form == "cp" else 4
    if plan.form not in kept:
        kept[plan.form] = principal(blocks, largest_cp(blocks.shape[1:], factors), factors)
    rank = plan.rank // plan.groups
    sweeps = int(min(SWEEPS, max(2, SWEEPS_WORK // (2 * blocks[0].numel() * rank))))
    return named(cp(blocks, rank, factors, sweeps=sweeps, starts=1, first=kept[plan.form]), plan)


def _leading(weight: Tensor, moment: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Output PCA in the metric, group by group: composition and basis of every rank, best first."""
    groups = len(moment)
    rows = weight.reshape(groups, -1, moment.shape[1])
    values, vectors = torch.linalg.eigh(blocks_of(metric, groups))
    roots = values.clamp(min=1e-6 * float(values.max())).sqrt()
    root, back = (vectors * roots[:, None] @ vectors.mT, vectors / roots[:, None] @ vectors.mT)
    leading = torch.linalg.eigh(root @ rows @ moment @ rows.mT @ root)[1].flip(2)
    return back @ leading, leading.mT @ root @ rows


def _projected(weight: Tensor, plan: LayerPlan, composition: Tensor, basis: Tensor) -> Weights:
    rank = plan.rank // plan.groups
    composition, basis = composition[:, :, :rank], basis[:, :rank]
    if plan.form == "gauge":
        return gauge_factors(regauge(composition, basis))
    shape = (-1, *weight.shape[1:])
    return {"basis.weight": basis.reshape(shape), "composition.weight": composition.reshape(-1, rank, 1, 1)}


def features(plan: LayerPlan, weights: Mapping[str, Tensor]) -> Tensor:
    """(g, n, q): what each weight of a filter of the composition multiplies, in terms of the patch."""
    last = plan.steps[-1]
    inner, taps = last.in_channels // last.groups, last.kernel_size[0] * last.kernel_size[1]
    unit = torch.eye(inner * taps, dtype=torch.float64)
    stacked = unit.reshape(-1, inner, *last.kernel_size).repeat(last.groups, 1, 1, 1)
    made = folded(plan, {**weights, "composition.weight": stacked})
    return made.reshape(last.groups, inner * taps, -1)


def refit(weight: Tensor, plan: LayerPlan, weights: Mapping[str, Tensor], moment: Tensor) -> Weights:
    """The same steps with the composition that is best for the patches, in any metric of the outputs."""
    basis, start = features(plan, weights), weights["composition.weight"]
    target = weight.reshape(plan.groups, -1, basis.shape[2])
    rows = start.reshape(plan.groups, -1, basis.shape[1])
    height, width = plan.steps[-1].kernel_size
    image, gram = _products(basis, moment, height * width)
    solved = ridge_solve(gram, target @ image, rows)
    return {**weights, "composition.weight": solved.reshape(start.shape)}


def _products(basis: Tensor, moment: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """(M F^T, F M F^T) of features F: those of one tap of the last step see only that tap of the patch."""
    image = basis.new_empty(basis.mT.shape)
    gram = basis.new_empty(len(basis), basis.shape[1], basis.shape[1])
    for tap in range(taps):
        image[:, :, tap::taps] = (basis[:, tap::taps, tap::taps] @ moment[:, tap::taps]).mT
    for tap in range(taps):
        gram[:, tap::taps] = basis[:, tap::taps, tap::taps] @ image[:, tap::taps]
    return image, gram


def error_of(weight: Tensor, other: Tensor, moment: Tensor, metric: Tensor | None = None) -> float:
    """tr[G (W - V) M (W - V)^T] over tr[G W M W^T]; G is the identity by default."""
    whole = squared(weight, moment, metric)
    return squared(weight - other, moment, metric) / whole if whole > 0 else 0.0


def squared(shift: Tensor, moment: Tensor, metric: Tensor | None = None) -> float:
    """tr[G S M S^T], group by group."""
    return float((_image_in(moment, metric)(shift) * shift).sum())


def _image_in(moment: Tensor, metric: Tensor | None) -> Callable[[Tensor], Tensor]:
    """W to G W M, group by group."""
    blocks = None if metric is None else blocks_of(metric, len(moment))

    def image(weight: Tensor) -> Tensor:
        rows = weight.reshape(len(moment), -1, moment.shape[1]) @ moment
        return (rows if blocks is None else blocks @ rows).reshape(weight.shape)

    return image


def renewed(
    weight: Tensor,
    plan: LayerPlan,
    weights: Mapping[str, Tensor],
    moment: Tensor,
    metric: Tensor,
    rounds: int,
) -> Weights:
    """The steps after so many rounds of renewing each of them in turn, or as many as the work allows."""
    image, found = _image_in(moment, metric), refit(weight, plan, weights, moment)
    one = weight.numel() * moment.shape[1] * STEPS * (len(plan.steps) - 1)
    for _ in range(min(rounds, int((WORK if rounds > SHORT else SHORT_WORK) // one))):
        for step in plan.steps[:-1]:
            name = f"{step.name}.weight"
            found[name] = _descend(_with(plan, found, name), found[name], weight, image)
        found = refit(weight, plan, found, moment)
    return found


def _with(plan: LayerPlan, weights: Weights, name: str) -> Callable[[Tensor], Tensor]:
    """The folded weight as a linear function of one step."""
    rest = dict(weights)
    return lambda value: folded(plan, {**rest, name: value})


def _descend(
    made: Callable[[Tensor], Tensor], start: Tensor, weight: Tensor, image: Callable[[Tensor], Tensor]
) -> Tensor:
    """Conjugate gradients on the least squares of one step, from where it stands."""
    reached, pull, *_ = torch.func.vjp(made, start)
    value, residual = start, pull(image(weight - reached))[0]
    direction, size = residual, residual.square().sum()
    enough = 1e-12 * float(size)
    for _ in range(STEPS):
        ahead = made(direction)
        curved = image(ahead)
        bend = float((curved * ahead).sum())
        if not (float(size) > enough and bend > 0):
            break
        value = value + size / bend * direction
        residual = residual - size / bend * pull(curved)[0]
        size, old = residual.square().sum(), size
        direction = residual + size / old * direction
    return value
