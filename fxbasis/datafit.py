"""Fits of a form to data: the weights of its steps that change a layer's outputs least.

The error of a weight V in place of W is tr[G (W - V) M (W - V)^T], with M the second moment of the patches
and G a metric of the outputs (the identity, or the Fisher metric). The weight that the steps make is linear in
each of them. So from the fit to the weight alone the steps are renewed in turn, each by conjugate gradients on
its own least squares, and the composition, whose normal equations are small, exactly at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .factors import folded
from .least_squares import ridge_solve
from .recipe import LayerPlan

__all__ = ["error_of", "features", "refit", "renewed"]

WORK = 40e9  # multiply-adds that the rounds of one layer may take


def features(plan: LayerPlan, weights: Mapping[str, Tensor]) -> Tensor:
    """(g, n, q): what each weight of one filter of the composition multiplies with, in terms of the patch."""
    last = plan.steps[-1]
    inner, taps = last.in_channels // last.groups, last.kernel_size[0] * last.kernel_size[1]
    unit = torch.eye(inner * taps, dtype=torch.float64)
    stacked = unit.reshape(-1, inner, *last.kernel_size).repeat(last.groups, 1, 1, 1)
    made = folded(plan, {**weights, f"{last.name}.weight": stacked})
    return made.reshape(last.groups, inner * taps, -1)


def refit(weight: Tensor, plan: LayerPlan, weights: Mapping[str, Tensor], moment: Tensor) -> dict[str, Tensor]:
    """The same steps with the composition that is best for the patches.

    Args:
        weight: (C, c / g, K_h, K_w) float64, the target.
        weights: of the steps by name, float64.
        moment: (g, q, q).
    """
    basis = features(plan, weights)
    target = weight.reshape(plan.groups, -1, basis.shape[2])
    gram = basis @ moment @ basis.mT
    solved = ridge_solve(gram, target @ moment @ basis.mT)
    return {**weights, "composition.weight": solved.reshape(weights["composition.weight"].shape)}


def error_of(weight: Tensor, other: Tensor, moment: Tensor, metric: Tensor | None = None) -> float:
    """tr[G (W - V) M (W - V)^T] over tr[G W M W^T]."""
    groups = len(moment)
    return float(_energy(weight - other, moment, metric, groups) / _energy(weight, moment, metric, groups))


def _energy(gap: Tensor, moment: Tensor, metric: Tensor | None, groups: int) -> Tensor:
    rows = gap.reshape(groups, -1, moment.shape[1])
    image = (rows @ moment).flatten(0, 1)
    if metric is not None:
        image = metric @ image
    return (image * rows.flatten(0, 1)).sum()


def renewed(
    weight: Tensor,
    plan: LayerPlan,
    weights: Mapping[str, Tensor],
    moment: Tensor,
    metric: Tensor | None = None,
    rounds: int = 8,
    steps: int = 8,
) -> dict[str, Tensor]:
    """The steps after some rounds of renewing each of them in turn, the composition exactly."""
    groups, found = plan.groups, refit(weight, plan, weights, moment)

    def image(gap: Tensor) -> Tensor:
        rows = gap.reshape(groups, -1, moment.shape[1]) @ moment
        rows = rows if metric is None else metric @ rows.flatten(0, 1)
        return rows.reshape(weight.shape)

    for _ in range(rounds):
        for step in plan.steps[:-1]:
            name = f"{step.name}.weight"
            rest = {key: value for key, value in found.items() if key != name}
            made = lambda value, name=name, rest=rest: folded(plan, {**rest, name: value})
            found[name] = _descend(made, found[name], weight, image, steps)
        found = refit(weight, plan, found, moment)
    return found


def _descend(
    made: Callable[[Tensor], Tensor],
    start: Tensor,
    weight: Tensor,
    image: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """Conjugate gradients on the least squares of one step, from where it stands."""
    value = start.clone()
    _, pull = torch.func.vjp(made, value)
    residual = pull(image(weight - made(value)))[0]
    direction, size = residual, residual.square().sum()
    first = size
    for _ in range(steps):
        if not float(size) > 1e-12 * float(first):
            break
        ahead = made(direction)
        curved = image(ahead)
        length = size / (curved * ahead).sum().clamp(min=torch.finfo(torch.float64).tiny)
        value = value + length * direction
        residual = residual - length * pull(curved)[0]
        size, old = residual.square().sum(), size
        direction = residual + (size / old) * direction
    return value
