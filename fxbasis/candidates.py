"""What may stand in the place of each layer, and what a choice of one candidate a layer adds up to.

A candidate is a form with its ranks. Its costs are those of its layer alone, in absolute values (macs,
params, latency in ms); its change is what it alone does to the model (nats of KL divergence, or points of
accuracy lost), with a standard error where it was sampled. Each layer has the dense candidate, the
convolution as it is, of change 0: with it a choice is never predicted worse or slower than the model.

Costs and changes of several layers add up. The founding paper (arXiv 2408.06024, section 3.2) averages
them instead: with m_0 the model's value and m_l its value with layer l alone replaced,

    sum:   m_s = m_0 + sum_(l in s) (m_l - m_0)
    paper: m_s = m_0 + (1 / L) sum_(l in s) (m_l - m_0)

Both are affine in the choice and so rank choices alike; the savings of the second are L times too small.
Sums run from the first layer to the last, one addition at a time, so that equal choices have equal sums.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import numpy.typing as npt

from .errors import InputError, SelectionError

__all__ = ["DENSE", "Candidate", "Choice", "Layers", "added", "averaged", "envelope", "undominated"]

DENSE = "dense"
CHANGE = "change"
LARGEST = "largest change"
Columns = list[npt.NDArray[np.float64]]
Layers = Sequence[Sequence["Candidate"]]


@dataclass(frozen=True)
class Candidate:
    """One way to write one layer.

    Args:
        layer: its number.
        form: of the layer, or "dense" for the convolution as it is.
        ranks: of the form; none for "dense".
        costs: of this layer, absolute, by name: "macs", "params", "latency" (ms).
        change: predicted change of the model when this layer alone takes the form; 0 for "dense".
        error: standard error of the change.

    >>> Candidate(4, "output", (16,), {"macs": 2e6}, change=0.03)
    Candidate(layer=4, form='output', ranks=(16,), costs={'macs': 2000000.0}, change=0.03, error=0.0)

    Raises:
        InputError: for a cost or error that is negative or not finite, a change that is not finite, and a
            dense candidate with ranks or a change.
    """

    layer: int
    form: str
    ranks: tuple[int, ...]
    costs: Mapping[str, float] = field(hash=False)
    change: float
    error: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {**self.costs, "error": self.error}.items():
            if not (math.isfinite(value) and value >= 0):
                raise InputError(
                    f"{self.named()}: {name}={value} is none; give a finite number of at least 0"
                )
        if not math.isfinite(self.change):
            raise InputError(f"{self.named()}: change={self.change} ranks nowhere; give a finite number")
        if self.form == DENSE and (self.ranks or self.change or self.error):
            raise InputError(f"{self.named()} is the layer as it is; give it no ranks, change 0 and error 0")

    def named(self) -> str:
        """Layer, form and ranks, for messages."""
        return f"layer {self.layer}, {self.form}{list(self.ranks) if self.ranks else ''}"


@dataclass(frozen=True)
class Choice:
    """One candidate for each layer, what they sum to, and how good the choice is proven to be.

    Attributes:
        candidates: in the order of the layers.
        costs: of all layers, by name.
        change: of all layers.
        error: standard error of the change, the layers' errors taken as independent.
        objective: what was minimised: "change", "largest change" or the name of a cost.
        bound: no choice within the limits has a lower objective than this.
        method: that found it.
    """

    candidates: tuple[Candidate, ...]
    costs: Mapping[str, float] = field(hash=False)
    change: float
    error: float
    objective: str
    bound: float
    method: str

    @property
    def value(self) -> float:
        """The objective of this choice."""
        if self.objective == LARGEST:
            return max(candidate.change for candidate in self.candidates)
        return self.change if self.objective == CHANGE else self.costs[self.objective]

    @property
    def gap(self) -> float:
        """At most how far the objective is from the best; a proof of at least that, not an estimate."""
        return self.value - self.bound


def envelope(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates, in order, with changes that never fall where every cost falls too.

    A rank less can only harm, and what measures otherwise is noise. Within a layer and form, a candidate
    takes the largest change (and its error) among itself and those that cost more: at least as much in
    each cost and more in one. That is the least such function on or above the measured changes, so that
    no prediction gets better. Candidates of equal costs are left as they are to each other.

    >>> rows = [(8, 1.0, 0.5), (16, 2.0, 0.1), (24, 3.0, 0.2)]
    >>> noisy = [Candidate(1, "output", (rank,), {"macs": macs}, change) for rank, macs, change in rows]
    >>> [candidate.change for candidate in envelope(noisy)]
    [0.5, 0.2, 0.2]

    Raises:
        InputError: for candidates that do not have the same costs.
    """
    listed = list(candidates)
    names = cost_names(listed)
    return [_lifted(candidate, listed, names) for candidate in listed]


def _lifted(candidate: Candidate, others: Sequence[Candidate], names: Sequence[str]) -> Candidate:
    kind = (candidate.layer, candidate.form)
    above = [
        other
        for other in others
        if (other.layer, other.form) == kind
        and _below(candidate, other, names)
        and other.change > candidate.change
    ]
    if not above:
        return candidate
    worst = max(above, key=lambda other: other.change)
    return replace(candidate, change=worst.change, error=worst.error)


def _below(low: Candidate, high: Candidate, names: Sequence[str]) -> bool:
    """Whether ``low`` costs no more in any and less in one."""
    pairs = [(low.costs[name], high.costs[name]) for name in names]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def undominated(candidates: Iterable[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The candidates, in order, without those that another of the same layer makes pointless.

    That other costs no more, in each of the costs ``names``, and changes no more; of equals the first
    stays. The dense candidate always stays, as every layer must have it.

    >>> rows = [("dense", (), 9.0, 0.0), ("output", (8,), 4.0, 0.2), ("gauge", (6,), 4.0, 0.3)]
    >>> layer = [Candidate(1, form, ranks, {"macs": macs}, change) for form, ranks, macs, change in rows]
    >>> [candidate.form for candidate in undominated(layer, ["macs"])]
    ['dense', 'output']

    Raises:
        SelectionError: for a name that is not among the costs.
    """
    listed = list(candidates)
    check_names(names, listed)
    points = [(*(candidate.costs[name] for name in names), candidate.change) for candidate in listed]

    def beaten(index: int) -> bool:
        for other, point in enumerate(points):
            same_layer = listed[other].layer == listed[index].layer
            no_worse = all(a <= b for a, b in zip(point, points[index], strict=True))
            if same_layer and no_worse and (point != points[index] or other < index):
                return True
        return False

    return [one for index, one in enumerate(listed) if one.form == DENSE or not beaten(index)]


def averaged(layers: Layers) -> list[list[Candidate]]:
    """The candidates whose sums are the paper's averages of ``layers``, which they follow in order.

    Costs become c_0 + (c - c_0) / L, with c_0 of the dense candidate; change and error are divided by L.

    >>> def layer(number):
    ...     dense = Candidate(number, "dense", (), {"macs": 8.0}, 0.0)
    ...     return [dense, Candidate(number, "output", (8,), {"macs": 4.0}, 0.2)]
    >>> averaged([layer(1), layer(2)])[0][1]
    Candidate(layer=1, form='output', ranks=(8,), costs={'macs': 6.0}, change=0.1, error=0.0)

    Raises:
        InputError: as in :func:`check_layers`.
    """
    check_layers(layers)
    return [[_averaged(candidate, dense_of(layer), len(layers)) for candidate in layer] for layer in layers]


def _averaged(candidate: Candidate, dense: Candidate, count: int) -> Candidate:
    costs = {name: base + (candidate.costs[name] - base) / count for name, base in dense.costs.items()}
    return replace(candidate, costs=costs, change=candidate.change / count, error=candidate.error / count)


def dense_of(layer: Sequence[Candidate]) -> Candidate:
    """The dense candidate of a layer.

    Raises:
        InputError: where it has none.
    """
    for candidate in layer:
        if candidate.form == DENSE:
            return candidate
    where = f"layer {layer[0].layer} has" if layer else "a layer has no candidates, so"
    raise InputError(f'{where} no dense candidate; add Candidate(layer, "dense", (), costs, change=0.0)')


def cost_names(candidates: Iterable[Candidate]) -> list[str]:
    """The names of the costs that all the candidates have.

    Raises:
        InputError: where one has others than the first.
    """
    listed = list(candidates)
    names = list(listed[0].costs) if listed else []
    for candidate in listed:
        if set(candidate.costs) != set(names):
            raise InputError(
                f"{candidate.named()} has the costs {sorted(candidate.costs)} and {listed[0].named()} has "
                f"{sorted(names)}; give all candidates the same costs"
            )
    return names


def check_names(names: Iterable[str], candidates: Iterable[Candidate]) -> None:
    """Refuse, by a SelectionError, the name of a cost that the candidates do not have."""
    known = cost_names(candidates)
    for name in names:
        if name not in known:
            raise SelectionError(f"no candidate has the cost {name!r}; the costs are {', '.join(known)}")


def check_layers(layers: Layers) -> None:
    """Refuse, by an InputError, candidates that no choice can be made of.

    A choice needs a layer; each layer has a number of its own, which its candidates share, and the dense
    candidate; all candidates have the same costs.
    """
    if not layers:
        raise InputError("there are no layers to choose for; pass the candidates of at least one")
    cost_names(candidate for layer in layers for candidate in layer)
    numbers = [dense_of(layer).layer for layer in layers]
    for number, layer in zip(numbers, layers, strict=True):
        if numbers.count(number) > 1 or any(candidate.layer != number for candidate in layer):
            raise InputError(f"the candidates of layer {number} are mixed up; pass one list for each layer")


def added(values: Iterable[float]) -> float:
    """The sum from left to right, one rounding each, as numpy adds layer to layer; ``sum`` rounds less."""
    return float(reduce(operator.add, values, 0.0))
