"""The grammar of ``layers=`` and ``size=``: which convolutions, and at which rank.

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
from numbers import Integral, Real
from typing import Any, TypeAlias

from ..bases import METHODS
from ..errors import FxBasisWarning, LayerError, SelectionError
from ..recipe import FORMS, LayerPlan, Plan
from .numbering import COMPRESSED, OK, UNSUPPORTED, ConvRecord, ConvTable

__all__ = ["FORMS", "Selector", "rank_of", "select"]

Selector: TypeAlias = str | int | Callable[[ConvRecord], bool]
Layers: TypeAlias = Selector | Iterable[Selector] | Mapping[Any, Mapping[str, Any] | None]

_ALL, _PATTERN, _EXACT = 0, 1, 2


@dataclass(frozen=True)
class _Settings:
    size: int | float
    form: str
    method: str


@dataclass(frozen=True)
class _Choice:
    settings: _Settings | None
    strength: int


def select(
    table: ConvTable,
    layers: Layers = "all",
    *,
    size: int | float = 0.5,
    form: str = "output",
    method: str = "svd",
) -> Plan:
    """The plan that ``layers`` and ``size`` mean for the convolutions of ``table``.

    Under ``"all"`` a layer whose cost would not fall is left dense. Asked for by number, name, pattern or
    function it is rewritten all the same, with an ``FxBasisWarning``. A layer that cannot be rewritten is an
    error when asked for by number or name, and otherwise left dense; the plan keeps the reason.

    Raises:
        SelectionError: for a selector that matches nothing, an empty selection, a bad size, form or method.
        LayerError: for a layer that was asked for by number or name and cannot be rewritten.

    >>> from torch import nn
    >>> from fxbasis.passes.numbering import number_convs
    >>> table = number_convs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1)))
    >>> [(layer.rank, layer.reason) for layer in select(table)]
    [(4, ''), (0, 'rank 8 costs 1.50 times its dense MACs (break-even rank 5.3)')]
    """
    defaults = _settings({"size": size, "form": form, "method": method}, None)
    rules: list[tuple[Any, _Settings | None]] = (
        [(key, None if value is None else _settings(value, defaults)) for key, value in layers.items()]
        if isinstance(layers, Mapping)
        else [(layers, defaults)]
    )
    if not rules:
        raise SelectionError('layers={} selects nothing; use layers="all" or name some layers')
    if not table:
        return Plan(())
    choices: dict[int, _Choice] = {}
    for selector, settings in rules:
        for index, strength in _matches(selector, table).items():
            before = choices.get(index)
            if before is None or before.strength < _EXACT or strength == _EXACT:
                choices[index] = _Choice(settings, strength)
    return Plan(tuple(_decide(record, choices.get(record.index)) for record in table))


def _settings(given: Any, defaults: _Settings | None) -> _Settings:
    if not isinstance(given, Mapping) or set(given) - {"size", "form", "method"}:
        raise SelectionError(
            f"settings {given!r} are not a dict of size, form, method; or None to leave alone"
        )
    merged = dict(vars(defaults), **given) if defaults else dict(given)
    settings = _Settings(**merged)
    check_size(settings.size)
    if settings.form not in FORMS:
        raise SelectionError(f"form={settings.form!r} is not known; choose one of {', '.join(FORMS)}")
    if settings.method not in METHODS:
        raise SelectionError(f"method={settings.method!r} is not known; choose one of {', '.join(METHODS)}")
    return settings


def check_size(size: Any) -> None:
    """Refuse a size that is neither a positive integer nor a fraction in (0, 1]."""
    sound = int(size) >= 1 if _is_whole(size) else isinstance(size, Real) and 0 < float(size) <= 1
    if isinstance(size, bool) or not sound:
        raise SelectionError(
            f"size={size!r} is neither an integer from 1 (number of basis convolutions) nor a float in "
            "(0, 1] (fraction of the layer's out_channels); pass for example size=16 or size=0.5"
        )


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _matches(selector: Any, table: ConvTable) -> dict[int, int]:
    """The numbers that a selector names, each with the strength of its naming."""
    if callable(selector):
        found = dict.fromkeys((r.index for r in table if selector(r)), _PATTERN)
        return _some(found, selector, "the function is true for no convolution")
    if _is_whole(selector):
        return {_number(int(selector), table): _EXACT}
    if isinstance(selector, str):
        return _matches_text(selector, table)
    if isinstance(selector, Iterable):
        parts = [_matches(part, table) for part in selector]
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


def rank_of(record: ConvRecord, size: int | float, *, exact: bool = False) -> int:
    """The number of basis convolutions that ``size`` means for a layer.

    A fraction is of ``out_channels``; both are rounded to a multiple of the groups, at least one for each,
    and capped at the largest useful rank.

    Raises:
        LayerError: when ``exact`` and an integer size exceeds the largest useful rank.
    """
    shape, groups = record.shape, record.groups
    if _is_whole(size):
        if exact and size > shape.largest_rank:
            raise LayerError(
                f"{record}: rank {size} exceeds {shape.largest_rank}, at which the basis is exact already; "
                f"pass size={shape.largest_rank} or less"
            )
        wanted = int(size) / groups
    else:
        wanted = float(size) * record.out_channels / groups
    return min(groups * max(1, round(wanted)), shape.largest_rank)


def _decide(record: ConvRecord, choice: _Choice | None) -> LayerPlan:
    dense = LayerPlan(
        number=record.index,
        name=record.name,
        in_channels=record.in_channels,
        out_channels=record.out_channels,
        kernel_size=record.kernel_size,
        groups=record.groups,
    )
    if choice is None or choice.settings is None:
        return _with(dense, reason="not selected")
    if record.status in (UNSUPPORTED, COMPRESSED):
        return _refused(record, dense, choice)
    if choice.strength == _ALL and record.status != OK:
        return _with(dense, reason=f"{record.status} ({record.reason})")
    return _ranked(record, dense, choice.strength, choice.settings)


def _refused(record: ConvRecord, dense: LayerPlan, choice: _Choice) -> LayerPlan:
    if choice.strength == _EXACT:
        remedy = "fold the model first" if record.status == COMPRESSED else "leave it out of layers="
        raise LayerError(f"{record} cannot be rewritten: {record.reason or record.status}; {remedy}")
    return _with(dense, reason=f"{record.status}: {record.reason}")


def _ranked(record: ConvRecord, dense: LayerPlan, strength: int, settings: _Settings) -> LayerPlan:
    rank = rank_of(record, settings.size, exact=strength == _EXACT)
    even = record.shape.break_even_rank
    note = ""
    if rank >= even:
        note = f"rank {rank} costs {rank / even:.2f} times its dense MACs (break-even rank {even:.1f})"
        if strength == _ALL:
            return _with(dense, reason=note)
        warnings.warn(
            f"{record}: {note}; it is rewritten because it was asked for", FxBasisWarning, stacklevel=2
        )
    changes = {"form": settings.form, "method": settings.method, "rank": rank, "reason": note}
    return _with(dense, effective=record.effective, **changes)


def _with(layer: LayerPlan, **changes: Any) -> LayerPlan:
    return LayerPlan(**{**vars(layer), **changes})
