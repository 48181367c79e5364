"""The front: every point of brute force and no other, choices that are what they say, and speed."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from random_candidates import Layers, layers, layers_of, sums

from fxbasis.errors import InputError, SelectionError
from fxbasis.fronts import Front, front


def brute(layers: Layers, name: str) -> list[tuple[float, float]]:
    """All choices sorted by cost and change; those that fall below all before."""
    costs, changes = sums(layers, name), sums(layers, "change")
    order = np.lexsort((changes, costs))
    costs, changes = costs[order], changes[order]
    falls = np.append(True, changes[1:] < np.minimum.accumulate(changes)[:-1])
    return list(zip(costs[falls].tolist(), changes[falls].tolist(), strict=True))


def points(found: Front) -> list[tuple[float, float]]:
    return list(zip(found.costs.tolist(), found.changes.tolist(), strict=True))


SHAPES = [(8, 2), (9, 3), (10, 3), (11, 2), (12, 2), (12, 3), (20, 2)]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "real"])
@pytest.mark.parametrize(("count", "kinds"), SHAPES)
def test_the_front_is_that_of_brute_force(count: int, kinds: int, whole: bool) -> None:
    drawn = layers_of(count, kinds, seed=count, whole=whole)
    found = front(drawn, "macs")
    assert points(found) == brute(drawn, "macs")
    assert len(found) > count


@given(layers())
def test_the_front_is_that_of_brute_force_whatever_the_numbers(drawn: Layers) -> None:
    found = front(drawn, "latency")
    assert points(found) == brute(drawn, "latency")
    for choice, point in zip(found, points(found), strict=True):
        assert (choice.costs["latency"], choice.change) == point
        assert (choice.bound, choice.gap, choice.value) == (choice.change, 0.0, choice.change)
        assert all(one in layer for one, layer in zip(choice.candidates, drawn, strict=True))
        assert choice.error == pytest.approx(sum(one.error**2 for one in choice.candidates) ** 0.5)


@pytest.mark.parametrize("count", [4, 8])
def test_the_paper_s_averages_have_the_same_front(count: int) -> None:
    """A power of two divides without rounding, so the choices are the same to the last tie."""
    drawn = layers_of(count, 3, seed=count, whole=True)
    summed, average = front(drawn, "macs"), front(drawn, "macs", combine="paper")
    baseline = sum(layer[0].costs["macs"] for layer in drawn)
    assert [choice.candidates for choice in average] == [choice.candidates for choice in summed]
    assert (average.changes == summed.changes / count).all()
    assert (average.costs == baseline + (summed.costs - baseline) / count).all()
    assert average[0].error == pytest.approx(summed[0].error / count)


def test_a_front_is_indexed_from_both_ends() -> None:
    found = front(layers_of(5, 3, seed=1), "macs")
    assert found[-1].costs["macs"] == found.costs[-1]
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_hundred_layers_take_seconds() -> None:
    drawn = layers_of(161, 5, seed=0)
    start = time.process_time()
    found = front(drawn, "macs")
    assert time.process_time() - start < 5
    assert len(found) > 1000
    assert (np.diff(found.costs) > 0).all()
    assert (np.diff(found.changes) < 0).all()


def test_refusals() -> None:
    drawn = layers_of(2, 2, seed=0)
    with pytest.raises(
        SelectionError, match="no candidate has the cost 'ms'; the costs are macs, params, lat"
    ):
        front(drawn, "ms")
    with pytest.raises(SelectionError, match='combine=\'mean\' is no rule; pass "sum", or "paper" for its'):
        front(drawn, "macs", combine="mean")
    with pytest.raises(InputError, match="there are no layers to choose for; pass"):
        front([], "macs")
