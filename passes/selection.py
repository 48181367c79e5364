"""The grammar of ``layers=``: which convolutions; what is done with them is in ``settings``.

A selector is ``"all"``, a number, a name, ``"re:PATTERN"`` (matched against the whole name), a function
of ``ConvRecord``, a string of numbers, ranges and names with commas (``"2-5,10,fc.conv"``; digits are
always numbers), or a list of these. A dict maps selectors to settings; ``None`` leaves a layer alone. Among
its rules a number or name beats a pattern, a function or ``"all"``, and a later rule beats an earlier one.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from numpy import ndarray
from torch import Tensor

from ..errors import FxBasisWarning, LayerError, SelectionError
from ..recipe import LayerPlan, Plan
from ..structures import FORMS, Ranks
from .ranking import cost_ratio, is_whole
from .records import COMPRESSED, DEPTHWISE, NO_GAIN, UNSUPPORTED, ConvRecord, ConvTable
from .settings import RANK_RULES, Settings, WeightOf, ranks_of, settings_of

__all__ = ["Layers", "Selector", "matches", "select"]

Selector: TypeAlias = str | int | Callable[[ConvRecord], bool]
Layers: TypeAlias = Selector | Iterable[Selector] | Mapping[Any, Mapping[str, Any] | None]

_ALL, _PATTERN, _EXACT = 0, 1, 2


@dataclass(frozen=True)
class _Choice:
    settings: Settings | None
    strength: int


def select(
    table: ConvTable,
    layers: Layers = "all",
    *,
    weight_of: WeightOf | None = None,
    **settings: Any,
) -> Plan:
    """The plan that ``layers`` and ``size`` mean for the convolutions of ``table``.

    A ratio of costs below that of the smallest ranks gives these; the plan says so. Under ``"all"`` a layer
    whose cost would not fall is left dense. Asked for by number, name, pattern or
    function it is rewritten all the same, with an ``FxBasisWarning``. A layer that cannot be rewritten is an
    error when asked for by number or name, and otherwise left dense; the plan keeps the reason.

    Args:
        table: the convolutions.
        layers: see the top of this file.
        weight_of: the weight of a record's layer, for the rules that depend on it.
        settings: as of ``compress``, which stand where a rule does not say otherwise; by default half of the
            filters as basis, in the output form.

    Raises:
        SelectionError: for a selector that matches nothing, an empty selection, a bad size, form or method.
        LayerError: for a layer that was asked for by number or name and cannot be rewritten.

    >>> from torch import nn
    >>> from fxbasis.passes.numbering import number_convs
    >>> table = number_convs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1)))
    >>> [(layer.rank, layer.reason) for layer in select(table)]
    [(4, ''), (0, 'rank 8 costs 1.50 times its dense MACs (break-even rank 5.3)')]
    """
    chosen = settings if any(name in settings for name in RANK_RULES) else settings | {"size": 0.5}
    defaults = settings_of({"form": "output", "method": None} | chosen)
    rules: list[tuple[Any, Settings | None]] = (
        [(key, None if value is None else settings_of(value, defaults)) for key, value in layers.items()]
        if isinstance(layers, Mapping)
        else [(layers, defaults)]
    )
    if not rules:
        raise SelectionError('layers={} selects nothing; use layers="all" or name some layers')
    if not table:
        return Plan(())
    choices: dict[int, _Choice] = {}
    for selector, found in rules:
        for index, strength in matches(selector, table).items():
            before = choices.get(index)
            if before is None or before.strength < _EXACT or strength == _EXACT:
                choices[index] = _Choice(found, strength)
    return Plan(tuple(_decide(record, choices.get(record.index), weight_of) for record in table))


def matches(selector: Any, table: ConvTable) -> dict[int, int]:
    """The numbers that a selector names, each with the strength of its naming."""
    if callable(selector):
        try:
            found = dict.fromkeys((r.index for r in table if selector(r)), _PATTERN)
        except Exception as error:
            raise SelectionError(
                f"layers=: the function raised {type(error).__name__}: {error}; it takes a ConvRecord"
            ) from error
        return _some(found, selector, "the function is true for no convolution")
    if is_whole(selector):
        return {_number(int(selector), table): _EXACT}
    if isinstance(selector, str):
        return _matches_text(selector, table)
    if isinstance(selector, (Tensor, ndarray)):
        return matches(selector.tolist(), table)
    if isinstance(selector, Iterable) and not isinstance(selector, bytes):
        parts = [matches(part, table) for part in selector]
        found = {i: max(p[i] for p in parts if i in p) for part in parts for i in part}
        return _some(found, selector, "the selection is empty")
    raise SelectionError(f"layers={selector!r} is no selector; pass a number, a name, 're:PATTERN' or 'all'")


def _matches_text(text: str, table: ConvTable) -> dict[int, int]:
    if text == "all":
        return dict.fromkeys((record.index for record in table), _ALL)
    if text.startswith("re:"):
        try:
            pattern = re.compile(text[3:])
        except re.error as error:
            raise SelectionError(f"layers={text!r}: {error}; write a Python regular expression") from error
        found = dict.fromkeys((r.index for r in table if pattern.fullmatch(r.name)), _PATTERN)
        if not found:
            raise SelectionError(
                f"layers={text!r}: the pattern matches no whole name{_close(text[3:], table)}"
            )
        return found
    if not text.strip():
        raise SelectionError(f'layers={text!r}: the selection is empty; use layers="all" or name some layers')
    tokens = [token.strip() for token in text.split(",")]
    return dict.fromkeys((index for token in tokens for index in _token(token, table)), _EXACT)


def _token(token: str, table: ConvTable) -> Iterable[int]:
    names = {record.name: record.index for record in table}
    ends = re.fullmatch(r"(-?\d+)(?:-(\d+))?", token)
    if ends:
        first = _number(int(ends[1]), table)
        last = _number(int(ends[2]), table) if ends[2] else first
        if last < first:
            raise SelectionError(f"layers={token!r}: the range runs backwards; write {last}-{first}")
        return range(first, last + 1)
    if token not in names:
        raise SelectionError(f"layers={token!r}: no convolution has this name{_close(token, table)}")
    return (names[token],)


def _number(number: int, table: ConvTable) -> int:
    if not 1 <= number <= len(table):
        raise SelectionError(
            f"conv {number} does not exist: the numbers of this model run from 1 to {len(table)}; "
            "see number_convs(model) or `fxbasis layers`"
        )
    return number


def _some(found: dict[int, int], selector: Any, why: str) -> dict[int, int]:
    if not found:
        raise SelectionError(f"layers={selector!r}: {why}; see number_convs(model) for the names")
    return found


def _close(name: str, table: ConvTable) -> str:
    close = difflib.get_close_matches(name, [record.name for record in table], n=3, cutoff=0.4)
    return f"; close matches: {', '.join(close)}" if close else "; see number_convs(model) for the names"


def _decide(record: ConvRecord, choice: _Choice | None, weight_of: WeightOf | None) -> LayerPlan:
    dense = record.decided()
    if choice is None or choice.settings is None:
        return _with(dense, reason="not selected")
    form = choice.settings.form
    shared = form == "weight" and record.reason == DEPTHWISE
    if record.status in (UNSUPPORTED, COMPRESSED) and not shared:
        return _refused(record, dense, choice)
    if choice.strength == _ALL and record.status == NO_GAIN and form == "output":
        return _with(dense, reason=f"{record.status} ({record.reason})")
    if record.prepares and not FORMS[form].whole_first:
        return _taken_apart(record, dense, choice)
    ranks = ranks_of(record, choice.settings, weight_of, exact=choice.strength == _EXACT)
    return _ranked(record, dense, choice.strength, choice.settings, ranks)


def _refused(record: ConvRecord, dense: LayerPlan, choice: _Choice) -> LayerPlan:
    if choice.strength == _EXACT:
        remedy = "fold the model first" if record.status == COMPRESSED else "leave it out of layers="
        raise LayerError(f"{record} cannot be rewritten: {record.reason or record.status}; {remedy}")
    return _with(dense, reason=f"{record.status}: {record.reason}")


def _taken_apart(record: ConvRecord, dense: LayerPlan, choice: _Choice) -> LayerPlan:
    form = choice.settings.form if choice.settings else ""
    why = f"its class prepares the input for the whole kernel, which the {form} form takes apart"
    if choice.strength == _EXACT:
        raise LayerError(f"{record} cannot be rewritten: {why}; use form='output' or 'gauge'")
    return _with(dense, reason=f"{UNSUPPORTED}: {why}")


def _ranked(
    record: ConvRecord, dense: LayerPlan, strength: int, settings: Settings, ranks: Ranks
) -> LayerPlan:
    form = settings.form
    ratio = cost_ratio(record, ranks, form, FORMS[form].saves)
    note = _dear(record, ranks, form, ratio) if ratio >= 1 else _over(record, ranks, settings)
    if ratio >= 1 and strength == _ALL:
        return _with(dense, reason=note)
    if note and strength != _ALL:
        warnings.warn(
            f"{record}: {note}; it is rewritten because it was asked for", FxBasisWarning, stacklevel=2
        )
    changes = {"form": form, "method": settings.method, "ranks": ranks, "reason": note}
    return _with(dense, effective=record.effective, fixed_basis=settings.fixed_basis, **changes)


def _dear(record: ConvRecord, ranks: Ranks, form: str, ratio: float) -> str:
    """Why a layer would not become cheaper."""
    if form == "output":
        even = f"(break-even rank {record.shape.break_even_rank:.1f})"
        return f"rank {ranks[0]} costs {ratio:.2f} times its dense MACs {even}"
    what = "parameters" if FORMS[form].saves == "params" else "MACs"
    rank = ranks[0] if len(ranks) == 1 else ranks
    return f"the {form} form of rank {rank} costs {ratio:.2f} times its dense {what}"


def _over(record: ConvRecord, ranks: Ranks, settings: Settings) -> str:
    """Why a layer costs more than the part that was asked for; empty where it does not."""
    cost, _, kind = settings.rule.partition("_")
    least = cost_ratio(record, ranks, settings.form, cost) if kind == "ratio" else 0.0
    if not least or least <= settings.value:
        return ""
    what, rank = "parameters" if cost == "params" else "MACs", ranks[0] if len(ranks) == 1 else ranks
    told = f"{settings.rule}={settings.value:g} is out of reach"
    return f"{told}: rank {rank}, the least, costs {least:.3g} times its dense {what}"


def _with(layer: LayerPlan, **changes: Any) -> LayerPlan:
    return LayerPlan(**{**vars(layer), **changes})
