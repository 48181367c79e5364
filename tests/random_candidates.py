"""Random candidates for the solvers, and all choices of them, one sum after another."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from fxbasis.candidates import DENSE, Candidate

Layers = list[list[Candidate]]
COSTS = ("macs", "params", "latency")


def layers_of(count: int, kinds: int, seed: int, whole: bool = False) -> Layers:
    """Layers as real ones are: cheaper candidates change more, but for noise; whole numbers repeat sums."""
    generator = np.random.default_rng(seed)
    layers = []
    for number in range(1, count + 1):
        sizes = generator.integers(2, 30, 3) if whole else generator.lognormal(15, 1, 3)
        layer = [Candidate(number, DENSE, (), dict(zip(COSTS, sizes.tolist(), strict=True)), 0.0)]
        weight = generator.integers(1, 9) if whole else generator.lognormal(-4, 1)
        for rank, share in enumerate(np.linspace(0.8, 0.2, kinds - 1), 1):
            costs = sizes * share * generator.uniform(0.8, 1.2, 3)
            change = weight * (1 - share) ** 2 * generator.normal(1, 0.4) * (9 if whole else 1)
            costs, change = (np.ceil(costs), np.round(change)) if whole else (costs, change)
            named = dict(zip(COSTS, costs.tolist(), strict=True))
            layer.append(Candidate(number, "output", (rank,), named, float(change), error=0.1))
        layers.append(layer)
    return layers


@st.composite
def layers(draw: st.DrawFn, most: int = 5) -> Layers:
    """A few layers of one to four candidates; whole numbers, so that sums tie, or any numbers."""
    small = draw(st.booleans())
    cost = st.integers(0, 6).map(float) if small else st.integers(0, 10**9).map(lambda number: number / 1000)
    change = (
        st.integers(-2, 6).map(float)
        if small
        else st.integers(-(10**6), 10**6).map(lambda number: number / 7000)
    )

    def candidate(number: int, rank: int) -> Candidate:
        costs = {name: draw(cost) for name in COSTS}
        if not rank:
            return Candidate(number, DENSE, (), costs, 0.0)
        return Candidate(number, draw(st.sampled_from(["output", "gauge"])), (rank,), costs, draw(change))

    count = draw(st.integers(1, most))
    return [
        [candidate(number, rank) for rank in range(draw(st.integers(1, 4)))] for number in range(1, count + 1)
    ]


def sums(layers: Layers, name: str) -> npt.NDArray[np.float64]:
    """The cost (or "change") of every choice, added from the first layer to the last."""
    columns = [[one.change if name == "change" else one.costs[name] for one in layer] for layer in layers]
    total: Any = reduce(
        lambda done, column: np.add.outer(done, np.array(column)).ravel(), columns, np.zeros(1)
    )
    return np.asarray(total)
