"""The solvers against brute force: feasible, optimal, bounded from below; and what cannot be met."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import assume, given
from hypothesis import strategies as st
from random_candidates import COSTS, Layers, layers, layers_of, sums

from fxbasis import programs
from fxbasis.candidates import DENSE, Candidate, Choice, added
from fxbasis.errors import InputError, PlanError, SelectionError
from fxbasis.fronts import front
from fxbasis.solvers import choose, minimax, minimise

shares = st.lists(st.floats(0, 1), min_size=1, max_size=3)


def budgets_of(drawn: Layers, shares: list[float]) -> dict[str, float]:
    """One budget for each share, between the least and the most that its cost can be."""
    spans = {name: (sums(drawn, name).min(), sums(drawn, name).max()) for name in COSTS}
    pairs = zip(spans.items(), shares, strict=False)
    return {name: float(low + share * (high - low)) for (name, (low, high)), share in pairs}


def feasible(drawn: Layers, budgets: dict[str, float]) -> np.ndarray:
    return np.all([sums(drawn, name) <= budget for name, budget in budgets.items()], axis=0)


def check(choice: Choice, drawn: Layers, budgets: dict[str, float]) -> None:
    """One candidate of each layer, sums that are theirs, budgets kept, bound below value."""
    assert all(one in layer for one, layer in zip(choice.candidates, drawn, strict=True))
    for name in COSTS:
        assert choice.costs[name] == added(one.costs[name] for one in choice.candidates)
    assert choice.change == added(one.change for one in choice.candidates)
    assert all(choice.costs[name] <= budget for name, budget in budgets.items())
    assert choice.bound <= choice.value
    assert choice.gap >= 0


@given(layers(), shares)
def test_choose_is_the_best_of_all_choices(drawn: Layers, shares: list[float]) -> None:
    budgets = budgets_of(drawn, shares)
    assume(all(budget > 0 for budget in budgets.values()))
    allowed = feasible(drawn, budgets)
    if not allowed.any():
        with pytest.raises(PlanError, match="together; all of them times"):
            choose(drawn, budgets)
        return
    best = sums(drawn, "change")[allowed].min()
    choice = choose(drawn, budgets)
    check(choice, drawn, budgets)
    scale = sum(max(abs(one.change) for one in layer) for layer in drawn)
    assert best <= choice.change <= best + (0 if len(budgets) == 1 else 1e-8 * scale)
    assert choice.bound <= best
    if all(sum(layer[0].costs[name] for layer in drawn) <= budget for name, budget in budgets.items()):
        assert choice.change <= 0  # dense is within the budgets


@given(layers(), st.floats(0, 1))
def test_minimise_is_the_best_of_all_choices(drawn: Layers, share: float) -> None:
    changes = sums(drawn, "change")
    limit = float(changes.min() + share * (changes.max() - changes.min()))
    choice = minimise(drawn, "params", limit)
    check(choice, drawn, {})
    assert choice.change <= limit
    best = sums(drawn, "params")[changes <= limit].min()
    assert choice.costs["params"] == choice.value == best >= choice.bound


@given(layers(), st.floats(0, 10))
def test_minimise_never_costs_more_than_dense(drawn: Layers, max_change: float) -> None:
    choice = minimise(drawn, "macs", max_change)
    assert choice.costs["macs"] <= added(layer[0].costs["macs"] for layer in drawn)


@given(layers(4), shares)
def test_minimax_has_the_least_largest_change(drawn: Layers, shares: list[float]) -> None:
    budgets = budgets_of(drawn, shares)
    assume(all(budget > 0 for budget in budgets.values()))
    allowed = feasible(drawn, budgets)
    assume(allowed.any())
    choice = minimax(drawn, budgets)
    check(choice, drawn, budgets)
    largest = np.full(1, -np.inf)
    for layer in drawn:
        largest = np.maximum.outer(largest, [one.change for one in layer]).ravel()
    assert choice.value == largest[allowed].min() == choice.bound


@pytest.mark.parametrize("count", [53, 161])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_choose_and_minimise_meet_on_the_front(count: int, share: float) -> None:
    drawn = layers_of(count, 4, seed=count)
    found = front(drawn, "macs")
    budget = share * added(layer[0].costs["macs"] for layer in drawn)
    index = int(np.searchsorted(found.costs, budget, side="right")) - 1
    choice = choose(drawn, {"macs": budget})
    assert (choice.costs["macs"], choice.change) == (found.costs[index], found.changes[index])
    back = minimise(drawn, "macs", choice.change)
    assert (back.costs["macs"], back.change) == (choice.costs["macs"], choice.change)
    assert choice.gap < 0.01 * max(one.change for layer in drawn for one in layer)
    assert 0 <= back.gap < max(one.costs["macs"] for layer in drawn for one in layer)
    assert choose(drawn, {"macs": budget, "params": 1e12}).change == pytest.approx(choice.change, rel=1e-8)
    assert minimax(drawn, {"macs": budget}).change >= choice.change


def test_several_budgets_on_a_large_net() -> None:
    drawn = layers_of(60, 4, seed=3)
    budgets = {name: 0.6 * added(layer[0].costs[name] for layer in drawn) for name in COSTS}
    choice = choose(drawn, budgets)
    check(choice, drawn, budgets)
    assert choice.method == "integer program"
    assert choice.gap <= 1e-8 * choice.change
    for name in COSTS:
        assert choose(drawn, {name: budgets[name]}).change <= choice.change


@given(layers(4).filter(lambda drawn: len(drawn) in (1, 2, 4)), st.floats(0, 1))
def test_the_paper_s_average_chooses_alike(drawn: Layers, share: float) -> None:
    """At the budget whose average is that of the sum's."""
    assume(all(one.costs[name] == int(one.costs[name]) for layer in drawn for one in layer for name in COSTS))
    count, dense = len(drawn), added(layer[0].costs["macs"] for layer in drawn)
    budget = float(np.floor(budgets_of(drawn, [share])["macs"]))
    average = dense + (budget - dense) / count
    assume(budget > 0 and average > 0)
    summed, averaged = choose(drawn, {"macs": budget}), choose(drawn, {"macs": average}, combine="paper")
    assert averaged.change == summed.change / count
    assert averaged.costs["macs"] == dense + (summed.costs["macs"] - dense) / count
    assert averaged.candidates == summed.candidates
    least = minimise(drawn, "macs", summed.change / count, combine="paper")
    assert least.candidates == minimise(drawn, "macs", summed.change).candidates


def two() -> Layers:
    def layer(number: int) -> list[Candidate]:
        rows = [(DENSE, (), 9.0, 4.0, 0.0), ("output", (8,), 4.0, 3.0, 0.1), ("gauge", (2,), 6.0, 1.0, 0.2)]
        return [
            Candidate(number, form, ranks, {"a": a, "b": b}, change) for form, ranks, a, b, change in rows
        ]

    return [layer(1), layer(2)]


def test_what_no_choice_meets_is_refused_with_what_one_does() -> None:
    with pytest.raises(
        PlanError, match=r"no choice has less a than 8.0, and the budget is 7.0; raise it, or"
    ):
        choose(two(), {"a": 7.0})
    with pytest.raises(
        PlanError, match=r"no choice has less b than 2.0, and the budget is 1; raise it, or add"
    ):
        minimax(two(), {"a": 18.0, "b": 1})
    together = r"no choice meets the budgets a 8.0, b 4.0 together; all of them times 1.25 can be met: raise"
    for solver in (choose, minimax):
        with pytest.raises(PlanError, match=together):
            solver(two(), {"a": 8.0, "b": 4.0})
        assert solver(two(), {"a": 10.0, "b": 5.0}).costs == {"a": 10.0, "b": 4.0}
    with pytest.raises(PlanError, match=r"no choice changes less than 0.0, and max_change is -0.1; raise it"):
        minimise(two(), "a", -0.1)


def test_refusals() -> None:
    with pytest.raises(SelectionError, match=r"there is no budget to choose within; pass one, such as"):
        choose(two(), {})
    with pytest.raises(SelectionError, match=r"the budget a=0.0 is none; give a positive number"):
        choose(two(), {"a": 0.0})
    with pytest.raises(SelectionError, match=r"the budget a=nan is none; give a positive number"):
        minimax(two(), {"a": float("nan")})
    with pytest.raises(SelectionError, match=r"no candidate has the cost 'macs'; the costs are a, b"):
        minimise(two(), "macs", 1.0)
    with pytest.raises(SelectionError, match=r"max_change=nan is no limit; give a finite number"):
        minimise(two(), "a", float("nan"))
    with pytest.raises(
        InputError, match=r"there are no layers to choose for; pass the candidates of at least"
    ):
        choose([], {"a": 1.0})


def test_a_choice_within_the_tolerance_and_over_the_limit_is_not_taken() -> None:
    values, over = [np.array([0.0, 1.0])] * 2, 1e9 * (1 + 1e-12)
    costs = [[np.array([over / 2, 1.0])] * 2, [np.array([1.0, 1.0])] * 2]
    solved = programs.solve_program(values, costs, [1e9, 9.0])
    assert solved is not None
    assert sorted(solved[0]) == [0, 1]
    assert solved[1] <= 1.0


def test_costs_far_above_a_budget_do_no_harm() -> None:
    budgets = {"a": 10.0, "b": 1e-25}
    layers = [[Candidate(1, form, (), {"a": 9.0, "b": b}, 0.0) for form, b in [(DENSE, 4.0), ("none", 0.0)]]]
    assert choose(layers, budgets).costs["b"] == 0.0
    assert choose(layers, budgets).gap == 0.0
    extra = Candidate(1, "less", (), {"a": 4.0, "b": 1.2e-25}, 0.0)
    away = Candidate(1, "zero", (), {"a": 13.0, "b": 0.0}, 0.0)
    with pytest.raises(PlanError, match=r"together; all of them times 1\.2 can be met"):
        choose([[layers[0][0], extra, away]], budgets)


def test_a_program_that_is_not_solved_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = scipy.optimize.OptimizeResult(status=4, message="numbers", x=None)
    monkeypatch.setattr(programs, "milp", lambda *_, **__: given_up)
    with pytest.raises(PlanError, match="the integer program was not solved: numbers; pass a single budget"):
        choose(two(), {"a": 10.0, "b": 5.0})
