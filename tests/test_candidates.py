"""Candidates: the envelope, dominance, the paper's averages, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_candidates import COSTS, Layers, layers, layers_of

from fxbasis.candidates import (
    DENSE,
    Candidate,
    added,
    averaged,
    check_layers,
    dense_of,
    envelope,
    undominated,
)
from fxbasis.errors import InputError, SelectionError
from fxbasis.paper import paper_average


def one(
    change: float, *, form: str = "output", layer: int = 1, error: float = 0.0, **costs: float
) -> Candidate:
    return Candidate(layer, form, () if form == DENSE else (8,), costs, change, error)


def cheaper(low: Candidate, high: Candidate) -> bool:
    costs = [(low.costs[name], high.costs[name]) for name in low.costs]
    return all(a <= b for a, b in costs) and any(a < b for a, b in costs)


@given(layers())
def test_the_envelope_is_the_least_monotone_function_on_or_above(drawn: Layers) -> None:
    before = [candidate for layer in drawn for candidate in layer]
    after = envelope(before)
    assert [replace(new, change=old.change) for new, old in zip(after, before, strict=True)] == before
    for new, old in zip(after, before, strict=True):
        same = [
            (b, a) for b, a in zip(before, after, strict=True) if (b.layer, b.form) == (old.layer, old.form)
        ]
        assert all(new.change >= lifted.change for other, lifted in same if cheaper(old, other))
        above = [other.change for other, _ in same if cheaper(old, other)]
        assert new.change == max([old.change, *above])
    assert envelope(after) == after


def test_the_envelope_by_hand() -> None:
    noisy = [one(0.1, macs=3.0, error=0.5), one(0.4, macs=4.0, error=0.7), one(0.2, macs=9.0, error=0.9)]
    lifted = envelope(noisy)
    assert [(candidate.change, candidate.error) for candidate in lifted] == [
        (0.4, 0.7),
        (0.4, 0.7),
        (0.2, 0.9),
    ]


def test_the_envelope_leaves_alone_what_cannot_be_compared() -> None:
    kept = [
        one(0.1, macs=3.0, ms=2.0),
        one(0.4, macs=4.0, ms=1.0),  # fewer milliseconds
        one(0.9, macs=3.0, ms=2.0),  # the same costs
        one(2.0, macs=9.0, ms=9.0, form="gauge"),
        one(3.0, macs=9.0, ms=9.0, layer=2),
    ]
    assert envelope(kept) == kept
    assert envelope([]) == []


def test_an_accuracy_that_rises_is_no_noise_between_forms() -> None:
    better = [one(0.0, form=DENSE, macs=9.0), one(-0.3, macs=4.0)]
    assert envelope(better) == better


@given(layers(), st.sampled_from([COSTS, COSTS[:1], COSTS[1:]]))
def test_undominated_drops_what_another_beats_and_no_more(drawn: Layers, names: tuple[str, ...]) -> None:
    before = [candidate for layer in drawn for candidate in layer]
    kept = undominated(before, names)

    def point(candidate: Candidate) -> tuple[float, ...]:
        return (*(candidate.costs[name] for name in names), candidate.change)

    def beats(a: Candidate, b: Candidate) -> bool:
        return a.layer == b.layer and all(x <= y for x, y in zip(point(a), point(b), strict=True))

    assert kept == [candidate for candidate in before if candidate in kept]
    assert all(any(beats(other, candidate) for other in kept) for candidate in before)
    for a, b in itertools.permutations(kept, 2):
        assert b.form == DENSE or not beats(a, b)
    assert undominated(kept, names) == kept


def test_dense_stays_even_when_beaten() -> None:
    layer = [one(0.0, form=DENSE, macs=9.0), one(-0.3, macs=4.0)]
    assert undominated(layer, ["macs"]) == layer


@pytest.mark.parametrize("count", [1, 3, 8])
def test_averages_are_those_of_the_paper(count: int) -> None:
    """m_s of the paper, from whole-model values measured with one layer replaced, for time and for drop."""
    given_layers = layers_of(count, 2, seed=count)
    baseline = added(dense_of(layer).costs["latency"] for layer in given_layers)
    rows = list(zip(given_layers, averaged(given_layers), strict=True))
    times = [baseline - layer[0].costs["latency"] + layer[1].costs["latency"] for layer in given_layers]
    drops = [layer[1].change for layer in given_layers]
    for size in range(count + 1):
        for chosen in itertools.combinations(range(1, count + 1), size):
            picked = [new[number in chosen] for number, (_, new) in enumerate(rows, 1)]
            time = added(candidate.costs["latency"] for candidate in picked)
            assert time == pytest.approx(paper_average(baseline, times, chosen), rel=1e-12)
            drop = added(candidate.change for candidate in picked)
            assert drop == pytest.approx(paper_average(0.0, drops, chosen), rel=1e-12, abs=1e-15)
            summed = added(layer[number in chosen].change for number, (layer, _) in enumerate(rows, 1))
            assert drop == pytest.approx(summed / count, rel=1e-12, abs=1e-15)  # affine, slope 1 / L


def test_refused_candidates() -> None:
    with pytest.raises(InputError, match=r"layer 1, output\[8\]: macs=-1.0 is none; give a finite number of"):
        one(0.0, macs=-1.0)
    with pytest.raises(InputError, match=r"layer 1, output\[8\]: error=nan is none; give a finite number"):
        one(0.0, error=float("nan"), macs=1.0)
    with pytest.raises(InputError, match=r"layer 1, output\[8\]: change=inf ranks nowhere; give a finite"):
        one(float("inf"), macs=1.0)
    with pytest.raises(InputError, match=r"layer 1, dense is the layer as it is; give it no ranks, change 0"):
        one(0.1, form=DENSE, macs=1.0)


def test_refused_layers() -> None:
    dense = one(0.0, form=DENSE, macs=9.0)
    with pytest.raises(
        InputError, match="there are no layers to choose for; pass the candidates of at least"
    ):
        check_layers([])
    with pytest.raises(InputError, match=r"layer 1 has no dense candidate; add Candidate\(layer, \"dense\""):
        check_layers([[one(0.1, macs=1.0)]])
    with pytest.raises(InputError, match=r"a layer has no candidates, so no dense candidate; add"):
        averaged([[dense], []])
    with pytest.raises(InputError, match="candidates of layer 1 are mixed up; pass one list for each layer"):
        check_layers([[dense, one(0.1, macs=1.0, layer=2)]])
    with pytest.raises(InputError, match="candidates of layer 1 are mixed up; pass one list for each layer"):
        check_layers([[dense], [dense]])
    wrong = (
        r"output\[8\] has the costs \['ms'\] and layer 1, dense has \['macs'\]; give all candidates the same"
    )
    with pytest.raises(InputError, match=wrong):
        check_layers([[dense, one(0.1, ms=1.0)]])
    with pytest.raises(InputError, match=wrong):
        envelope([dense, one(0.1, ms=1.0)])
    with pytest.raises(SelectionError, match="no candidate has the cost 'ms'; the costs are macs"):
        undominated([dense], ["ms"])
