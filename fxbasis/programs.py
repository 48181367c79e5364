"""One candidate a layer under several limits, as an integer program, solved by HiGHS through scipy.

With x_lr in {0, 1} for the candidate r of layer l, v its value and c_k its cost of kind k:

    minimise sum_lr v_lr x_lr    with    sum_r x_lr = 1 for each l,    sum_lr c_klr x_lr <= limit_k for each k

Branch and bound ends with a lower bound, which is the certificate. HiGHS takes limits with a tolerance: a
choice that exceeds one by less is excluded by name, and the program solved again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from .candidates import Columns, added
from .errors import PlanError

__all__ = ["least_factor", "solve_program"]

_SCALE = 1e3  # of values and limits: HiGHS's absolute tolerances, 1e-6, are then 1e-9 of them
_INFEASIBLE = 2
_LARGE = 1e6  # times a limit; HiGHS takes 1e20 for infinite


def solve_program(
    values: Columns, costs: Sequence[Columns], limits: Sequence[float]
) -> tuple[list[int], float] | None:
    """The candidate of each layer and a lower bound of the sum of values; None where no choice will do.

    Args:
        values: for each layer (candidates,).
        costs: for each kind, for each layer (candidates,), at least 0.
        limits: of the sum of each kind, more than 0.

    >>> values, macs = [np.array([0.0, 0.3]), np.array([0.0, 0.1])], [np.array([9.0, 4.0])] * 2
    >>> solve_program(values, [macs], [13.0])
    ([0, 1], 0.1)
    >>> solve_program(values, [macs], [7.0])

    Raises:
        PlanError: when the solver gives up.
    """
    floors = [float(layer.min()) for layer in values]
    objective = np.concatenate([layer - floor for layer, floor in zip(values, floors, strict=True)])
    scale = float(objective.max()) / _SCALE or 1.0
    constraints = [_one_each(values), LinearConstraint(_rows(costs, limits, 2.0), -np.inf, _SCALE)]
    while True:
        found = _solve(objective / scale, constraints, np.ones_like(objective))
        if found.status == _INFEASIBLE:
            return None
        picks = _picks(found.x, values)
        if all(_total(kind, picks) <= limit for kind, limit in zip(costs, limits, strict=True)):
            return picks, added([*floors, found.mip_dual_bound * scale])
        constraints.append(LinearConstraint(_marks(picks, values), -np.inf, len(values) - 1))


def least_factor(costs: Sequence[Columns], limits: Sequence[float]) -> float:
    """The least number by which all the limits must be multiplied for a choice to meet them, up to a million.

    >>> least_factor([[np.array([9.0, 4.0])] * 2, [np.array([2.0, 6.0])] * 2], [8.0, 8.0])
    1.5
    """
    rows, ones = _rows(costs, limits, _LARGE), _one_each(costs[0])
    column = np.full((len(rows), 1), -_SCALE)
    under = LinearConstraint(np.hstack([rows, column]), -np.inf, 0.0)
    padded = LinearConstraint(scipy.sparse.hstack([ones.A, np.zeros((len(costs[0]), 1))]), 1.0, 1.0)
    objective = np.append(np.zeros(rows.shape[1]), 1.0)
    integrality = np.append(np.ones(rows.shape[1]), 0.0)
    picks = _picks(_solve(objective, [padded, under], integrality).x, costs[0])
    return max(_total(kind, picks) / limit for kind, limit in zip(costs, limits, strict=True))


def _solve(objective: Any, constraints: list[LinearConstraint], integrality: Any) -> OptimizeResult:
    upper = np.where(integrality == 1, 1.0, np.inf)
    options = {"mip_rel_gap": 0.0}
    found = milp(
        objective, integrality=integrality, bounds=Bounds(0, upper), constraints=constraints, options=options
    )
    if found.status not in (0, _INFEASIBLE):
        raise PlanError(f"the integer program was not solved: {found.message}; pass a single budget")
    return found


def _one_each(values: Columns) -> LinearConstraint:
    owners = np.repeat(np.arange(len(values)), [len(layer) for layer in values])
    shape = (len(values), len(owners))
    matrix = scipy.sparse.csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))), shape=shape)
    return LinearConstraint(matrix, 1.0, 1.0)


def _rows(costs: Sequence[Columns], limits: Sequence[float], most: float) -> npt.NDArray[np.float64]:
    """(kinds, candidates): costs as shares of their limits, none above ``most``."""
    pairs = zip(costs, limits, strict=True)
    return (
        np.stack([np.minimum(np.concatenate(kind), most * limit) / limit for kind, limit in pairs]) * _SCALE
    )


def _picks(x: npt.NDArray[np.float64], values: Columns) -> list[int]:
    starts = np.cumsum([0] + [len(layer) for layer in values])
    return [int(x[start : start + len(layer)].argmax()) for start, layer in zip(starts, values, strict=False)]


def _marks(picks: Sequence[int], values: Columns) -> npt.NDArray[np.float64]:
    marks = [np.arange(len(layer)) == pick for pick, layer in zip(picks, values, strict=True)]
    return np.concatenate(marks).astype(np.float64)


def _total(kind: Columns, picks: Sequence[int]) -> float:
    return added(layer[pick] for layer, pick in zip(kind, picks, strict=True))
