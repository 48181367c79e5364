"""One candidate for each layer: the least change within budgets, the least cost within a change.

This is the multiple-choice knapsack problem. Under one limit it is solved exactly, without a grid, by
:func:`fxbasis.fronts.merge`, where a partial choice is dropped as soon as it cannot be completed within the
limit, or its Lagrangian bound says that no completion beats a choice at hand. For lambda >= 0,

    sum_l min_r (v_lr + lambda c_lr) - lambda limit

is at most the value of every choice within the limit; the largest over lambda, found among the slopes
(v_r - v_s) / (c_s - c_r), is the bound that stands beside each answer. It is off by one layer's step at most
(Kellerer, Pferschy, Pisinger 2004, "Knapsack Problems", chapter 11). Several budgets make an integer
program, :mod:`fxbasis.programs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .candidates import CHANGE, LARGEST, Choice, Columns, Layers, added
from .errors import PlanError, SelectionError
from .fronts import Floats, merge, table
from .programs import least_factor, solve_program
from .promises import EXACT

__all__ = ["choose", "minimax", "minimise"]

_ROUNDING = 1e-9  # of the sum of magnitudes: below, two sums are not told apart when choices are dropped
_PROGRAM = "integer program"


def choose(layers: Layers, budgets: Mapping[str, float], combine: str = "sum") -> Choice:
    """The choice of least change whose costs are within the budgets; exact.

    Args:
        layers: the candidates of each layer, the dense one among them.
        budgets: the most that the costs of all layers may add up to, by name.
        combine: "sum", or "paper" for its averages: then the budgets are of averages too.

    >>> from fxbasis.candidates import Candidate
    >>> def layer(number):
    ...     dense = Candidate(number, "dense", (), {"macs": 9.0, "params": 4.0}, 0.0)
    ...     return [dense, Candidate(number, "output", (8,), {"macs": 4.0, "params": 2.0}, 0.1 * number)]
    >>> choice = choose([layer(1), layer(2)], {"macs": 14.0})
    >>> [candidate.form for candidate in choice.candidates], choice.change, choice.costs["macs"]
    (['output', 'dense'], 0.1, 13.0)
    >>> round(choice.bound, 6), round(choice.gap, 6)
    (0.08, 0.02)
    >>> choose([layer(1), layer(2)], {"macs": 14.0, "params": 5.0}).method
    'integer program'

    Raises:
        InputError: for layers that no choice can be made of.
        SelectionError: for no budget, one that is not positive, and the name of a cost that does not exist.
        PlanError: for budgets that no choice meets, with the least that can be reached.
    """
    made = table(layers, combine, list(budgets))
    costs = [made.column(name) for name in budgets]
    _check_budgets(budgets, costs)
    values = made.column(CHANGE)
    if len(costs) == 1:
        found = _knapsack(values, costs[0], *budgets.values())
        return made.choice(found[0], CHANGE, found[1], EXACT)
    solved = solve_program(values, costs, list(budgets.values()))
    if solved is None:
        raise _unreachable(budgets, costs)
    return made.choice(solved[0], CHANGE, solved[1], _PROGRAM)


def minimise(layers: Layers, cost_name: str, max_change: float, combine: str = "sum") -> Choice:
    """The choice of least cost whose predicted change is at most ``max_change``; exact.

    Args:
        layers: the candidates of each layer, the dense one among them.
        cost_name: of the cost to minimise.
        max_change: in the unit of the candidates' changes.
        combine: "sum", or "paper" for its averages: then the change is an average too.

    >>> from fxbasis.candidates import Candidate
    >>> dense = Candidate(1, "dense", (), {"macs": 9.0}, 0.0)
    >>> layer = [dense, Candidate(1, "output", (8,), {"macs": 4.0}, 0.1)]
    >>> minimise([layer], "macs", max_change=0.05).costs, minimise([layer], "macs", max_change=0.1).costs
    ({'macs': 9.0}, {'macs': 4.0})

    Raises:
        InputError: for layers that no choice can be made of.
        SelectionError: for a cost that the candidates do not have, and a ``max_change`` that is no number.
        PlanError: for a change that no choice keeps, with the least that can be reached.
    """
    made = table(layers, combine, [cost_name])
    if not math.isfinite(max_change):
        raise SelectionError(f"max_change={max_change} is no limit; give a finite number")
    changes = made.column(CHANGE)
    least = _least(changes)
    if least > max_change:
        raise PlanError(f"no choice changes less than {least}, and max_change is {max_change}; raise it")
    picks, bound = _knapsack(made.column(cost_name), changes, max_change)
    return made.choice(picks, cost_name, bound, EXACT)


def minimax(layers: Layers, budgets: Mapping[str, float]) -> Choice:
    """The water level: the choice within the budgets whose largest change of one layer is least.

    Each layer takes its cheapest candidate that changes no more than the level, the lowest at which the
    budgets are met; several costs are added as shares of their budgets. This is the rule of AIMET and of
    BasisConv, for comparison: what it leaves of the budget it does not use, and layers do not add up in it.

    >>> from fxbasis.candidates import Candidate
    >>> def layer(number):
    ...     dense = Candidate(number, "dense", (), {"macs": 9.0}, 0.0)
    ...     return [dense, Candidate(number, "output", (8,), {"macs": 4.0}, 0.1 * number)]
    >>> choice = minimax([layer(1), layer(2), layer(3)], {"macs": 20.0})
    >>> [candidate.form for candidate in choice.candidates], choice.value
    (['output', 'output', 'dense'], 0.2)

    Raises:
        InputError, SelectionError, PlanError: as :func:`choose`.
    """
    made = table(layers, "sum", list(budgets))
    costs, limits = [made.column(name) for name in budgets], list(budgets.values())
    _check_budgets(budgets, costs)
    changes = made.column(CHANGE)
    levels = np.unique(np.concatenate(changes))
    low, high = int(np.searchsorted(levels, max(layer.min() for layer in changes))), len(levels) - 1
    picks = _cheapest(changes, costs, limits, levels[high])
    if picks is None:
        raise _unreachable(budgets, costs)
    while low < high:
        middle = (low + high) // 2
        found = _cheapest(changes, costs, limits, levels[middle])
        low, high, picks = (low, middle, found) if found is not None else (middle + 1, high, picks)
    return made.choice(picks, LARGEST, None, "water level")


def _cheapest(
    changes: Columns, costs: Sequence[Columns], limits: Sequence[float], level: float
) -> list[int] | None:
    """The cheapest candidates that change no more than the level; None where they exceed a limit."""
    allowed = [np.flatnonzero(layer <= level) for layer in changes]
    kinds = [[layer[kept] for layer, kept in zip(kind, allowed, strict=True)] for kind in costs]
    shares = [
        np.sum(
            [np.minimum(cost, 2 * limit) / limit for cost, limit in zip(kind, limits, strict=True)], axis=0
        )
        for kind in zip(*kinds, strict=True)
    ]
    if len(costs) == 1:
        picks = [int(layer.argmin()) for layer in shares]
        met = added(layer[pick] for layer, pick in zip(kinds[0], picks, strict=True)) <= limits[0]
        solved = picks if met else None
    else:
        program = solve_program(shares, kinds, limits)
        solved = None if program is None else program[0]
    return None if solved is None else [int(kept[pick]) for kept, pick in zip(allowed, solved, strict=True)]


def _knapsack(values: Columns, costs: Columns, limit: float) -> tuple[list[int], float]:
    """The candidates of least value whose costs are within the limit, which some are; and a lower bound."""
    slope, bound, ceiling = _lagrangian(values, costs, limit)
    reduced = [value + slope * cost for value, cost in zip(values, costs, strict=True)]
    cost_left, reduced_left = _left(costs), _left(reduced)
    spare_cost, spare = _rounding(costs, limit), _rounding(reduced, slope * limit)

    def keep(done: int, cost: Floats, value: Floats) -> npt.NDArray[np.bool_]:
        """Whether a choice of the first layers fits, and may be completed to the best."""
        fits = cost + cost_left[done] <= limit + spare_cost
        promises = value + slope * cost + reduced_left[done] - slope * limit <= ceiling + spare
        kept: npt.NDArray[np.bool_] = fits & promises
        return kept

    merged = merge(costs, values, keep)
    best = int(np.searchsorted(merged.costs, limit, side="right")) - 1
    return merged.picks(best), bound


def _lagrangian(values: Columns, costs: Columns, limit: float) -> tuple[float, float, float]:
    """The multiplier, the lower bound that it gives, and the value of a choice within the limit.

    The cost of the choice for lambda falls as lambda rises; the best is where it first meets the limit.
    """
    slopes = [0.0, *np.unique(np.concatenate([_slopes(*pair) for pair in zip(values, costs, strict=True)]))]
    slopes.append(2 * slopes[-1] + 1.0)
    low, high = 0, len(slopes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if _priced(values, costs, slopes[middle])[1] <= limit else (middle + 1, high)
        )
    value, cost, reduced = _priced(values, costs, slopes[low])
    slope = float(slopes[low])
    return slope, reduced - slope * limit, value if cost <= limit else math.inf


def _slopes(values: Floats, costs: Floats) -> Floats:
    """What a layer's value falls by for each unit of cost, between any two candidates that trade them."""
    falls, rises = values[:, None] - values, costs - costs[:, None]
    trade = (falls > 0) & (rises > 0)
    slopes: Floats = falls[trade] / rises[trade]
    return slopes[np.isfinite(slopes)]


def _priced(values: Columns, costs: Columns, slope: float) -> tuple[float, float, float]:
    """Value, cost and value + slope cost of the choice that minimises the last, of equals the cheapest."""
    sums = np.zeros(3)
    for value, cost in zip(values, costs, strict=True):
        reduced = value + slope * cost
        pick = np.lexsort((cost, reduced))[0]
        sums += value[pick], cost[pick], reduced[pick]
    return float(sums[0]), float(sums[1]), float(sums[2])


def _left(columns: Columns) -> list[float]:
    """For each number of layers done, the least that the others can add."""
    least = [float(layer.min()) for layer in columns]
    return [added(least[done:]) for done in range(len(least) + 1)]


def _rounding(columns: Columns, limit: float) -> float:
    return _ROUNDING * (sum(float(np.abs(layer).max()) for layer in columns) + abs(limit))


def _least(columns: Columns) -> float:
    return added(layer.min() for layer in columns)


def _check_budgets(budgets: Mapping[str, float], costs: Sequence[Columns]) -> None:
    """Refuse no budget, one that is no positive number, and one that no choice meets."""
    if not budgets:
        raise SelectionError('there is no budget to choose within; pass one, such as {"macs": 1e9}')
    for (name, budget), kind in zip(budgets.items(), costs, strict=True):
        if not (math.isfinite(budget) and budget > 0):
            raise SelectionError(f"the budget {name}={budget} is none; give a positive number")
        if _least(kind) > budget:
            raise PlanError(
                f"no choice has less {name} than {_least(kind)}, and the budget is {budget}; raise it, or "
                "add smaller candidates"
            )


def _unreachable(budgets: Mapping[str, float], costs: Sequence[Columns]) -> PlanError:
    factor = least_factor(costs, list(budgets.values()))
    limits = ", ".join(f"{name} {budget}" for name, budget in budgets.items())
    return PlanError(
        f"no choice meets the budgets {limits} together; all of them times {factor:.6g} can be met: raise "
        "them so far, or add smaller candidates"
    )
