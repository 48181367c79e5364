"""The whole front of cost against change, exact, by merging one layer after another.

Nemhauser and Ullmann (1969), "Discrete dynamic programming and capital allocation", Management Science 15.
The choices of the first l layers that no other beats, being no dearer and no worse, are kept, sorted by
cost; each is extended by every candidate of layer l + 1, and what is beaten now goes. An extension of a
beaten choice is beaten by the same extension of the choice that beat it (also in floating point, as
rounding keeps order), so nothing of the front is ever lost. There is no grid and no rounding. The number of
points may double with each layer, and does where the numbers are made for it; measured costs and changes
give thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .candidates import (
    CHANGE,
    Choice,
    Columns,
    Layers,
    added,
    averaged,
    check_layers,
    check_names,
    cost_names,
)
from .errors import SelectionError

__all__ = ["Front", "front"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Keep = Callable[[int, Floats, Floats], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Table:
    """The candidates, and their numbers under a rule of combination.

    Attributes:
        given: the candidates of each layer.
        counted: the same, such that their sums are what a choice of them is predicted to be.
    """

    given: Layers
    counted: Layers

    def column(self, name: str) -> Columns:
        """For each layer, its candidates' change or cost of that name."""
        return [
            np.array([one.change if name == CHANGE else one.costs[name] for one in layer], dtype=np.float64)
            for layer in self.counted
        ]

    def choice(self, picks: Sequence[int], objective: str, bound: float | None, method: str) -> Choice:
        """The choice of the candidate ``picks[l]`` in layer l; proven to be the best without a bound."""
        counted = [layer[pick] for layer, pick in zip(self.counted, picks, strict=True)]
        choice = Choice(
            candidates=tuple(layer[pick] for layer, pick in zip(self.given, picks, strict=True)),
            costs={name: added(one.costs[name] for one in counted) for name in cost_names(counted)},
            change=added(one.change for one in counted),
            error=added(one.error**2 for one in counted) ** 0.5,
            objective=objective,
            bound=0.0,
            method=method,
        )
        lowest = choice.value if bound is None else min(bound, choice.value)
        return Choice(**{**vars(choice), "bound": lowest})


def table(layers: Layers, combine: str, names: Sequence[str]) -> Table:
    """The table of the layers, all checked; ``combine`` is "sum" or "paper", ``names`` are costs.

    Raises:
        InputError: for layers that no choice can be made of.
        SelectionError: for another ``combine`` or the name of a cost that the candidates do not have.
    """
    check_layers(layers)
    check_names(names, [one for layer in layers for one in layer])
    if combine not in ("sum", "paper"):
        raise SelectionError(f'combine={combine!r} is no rule; pass "sum", or "paper" for its averages')
    given = [tuple(layer) for layer in layers]
    return Table(given, given if combine == "sum" else averaged(given))


@dataclass(frozen=True)
class Merged:
    """The choices that no other beats, sorted by cost: cost and value of each, and the way back.

    ``steps`` holds for each layer the number of its choices before, n, and for each choice after it
    n * pick + the choice that it extends.
    """

    costs: Floats
    values: Floats
    steps: Sequence[tuple[int, Ints]]

    def picks(self, index: int) -> list[int]:
        """The candidate of each layer in the choice of that index."""
        found = []
        for width, pointers in reversed(self.steps):
            pick, index = divmod(int(pointers[index]), width)
            found.append(pick)
        return found[::-1]


def merge(costs: Columns, values: Columns, keep: Keep | None = None) -> Merged:
    """The choices that no other beats in the sums of costs and values.

    ``keep(l, costs, values)`` says which of those of the first l layers are worth extending.
    """
    cost, value = np.zeros(1), np.zeros(1)
    steps: list[tuple[int, Ints]] = []
    for number, (layer_costs, layer_values) in enumerate(zip(costs, values, strict=True), 1):
        width = len(cost)
        all_costs = (layer_costs[:, None] + cost).ravel()
        all_values = (layer_values[:, None] + value).ravel()
        kept = _unbeaten(all_costs, all_values)
        if keep is not None:
            kept = kept[keep(number, all_costs[kept], all_values[kept])]
        cost, value = all_costs[kept], all_values[kept]
        steps.append((width, kept))
    return Merged(cost, value, steps)


def _unbeaten(costs: Floats, values: Floats) -> Ints:
    """The indices of the points of the front, by rising cost; of equal points one.

    The points come in sorted runs, one a candidate, which the stable sort merges without sorting anew.
    """
    order = np.argsort(costs, kind="stable")
    lowest = np.minimum.accumulate(values[order])
    falls = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    order = order[falls]  # among equal costs the last is now the lowest
    rises = np.concatenate([costs[order[1:]] > costs[order[:-1]], [True]])
    unbeaten: Ints = order[rises]
    return unbeaten


@dataclass(frozen=True)
class Front:
    """The choices that no other beats, by rising cost; a choice is put together when it is asked for.

    Attributes:
        cost_name: of the cost.
        costs: (points,), rising.
        changes: (points,), falling.
    """

    cost_name: str
    merged: Merged = field(repr=False)
    table: Table = field(repr=False)

    @property
    def costs(self) -> Floats:
        """(points,), rising."""
        return self.merged.costs

    @property
    def changes(self) -> Floats:
        """(points,), falling."""
        return self.merged.values

    def __len__(self) -> int:
        return len(self.costs)

    def __getitem__(self, index: int) -> Choice:
        picks = self.merged.picks(range(len(self))[index])
        return self.table.choice(picks, CHANGE, None, "Nemhauser-Ullmann")

    def __iter__(self) -> Iterator[Choice]:
        return (self[index] for index in range(len(self)))


def front(layers: Layers, cost_name: str, combine: str = "sum") -> Front:
    """Every choice that no other beats, being no dearer in one cost and no worse in change; exact.

    Args:
        layers: the candidates of each layer, the dense one among them.
        cost_name: of the cost.
        combine: "sum", or "paper" for its averages; the choices are the same.

    >>> from fxbasis.candidates import Candidate
    >>> def layer(number):
    ...     dense = Candidate(number, "dense", (), {"macs": 9.0}, 0.0)
    ...     return [dense, Candidate(number, "output", (8,), {"macs": 4.0}, 0.1 * number)]
    >>> found = front([layer(1), layer(2)], "macs")
    >>> [(choice.costs["macs"], round(choice.change, 9)) for choice in found]
    [(8.0, 0.3), (13.0, 0.1), (18.0, 0.0)]
    >>> [candidate.form for candidate in found[1].candidates]
    ['output', 'dense']

    Raises:
        InputError: for layers that no choice can be made of.
        SelectionError: for a cost that the candidates do not have, and another ``combine``.
    """
    made = table(layers, combine, [cost_name])
    return Front(cost_name, merge(made.column(cost_name), made.column(CHANGE)), made)
