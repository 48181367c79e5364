"""What is to be done with a layer: a form, a method, and one way to say the rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

from ..arguments import check_flags
from ..errors import SelectionError
from ..fitting import Unfolding, unfoldings
from ..structures import FORMS, Ranks
from .ranking import (
    BETA,
    check_ratio,
    check_size,
    groups_of,
    is_whole,
    ranks_by_cost,
    ranks_by_energy,
    ranks_by_evbmf,
    ranks_by_size,
    rounded_down,
    rounded_up,
)
from .records import ConvRecord

__all__ = ["RANK_RULES", "Settings", "WeightOf", "ranks_of", "settings_of"]

WeightOf: TypeAlias = Callable[[ConvRecord], Tensor]

RANK_RULES = ("size", "macs_ratio", "params_ratio", "energy", "evbmf")
_KEYS = (*RANK_RULES, "multiple", "form", "method", "fixed_basis", "beta")


@dataclass(frozen=True)
class Settings:
    """The settings of one rule, checked.

    Attributes:
        rule, value: the way to say the rank, one of ``RANK_RULES``, and what it says.
        multiple: ranks are rounded to a multiple of it: down where the rule bounds a cost, otherwise up.
        form, method, fixed_basis: see ``compress``.
        beta: of the reduced form, see ``compress``; of the others without a meaning.
    """

    rule: str
    value: Any
    multiple: int
    form: str
    method: str
    fixed_basis: bool
    beta: float = BETA


def settings_of(given: Any, defaults: Settings | None = None) -> Settings:
    """The settings that a dict gives, on top of the defaults.

    Raises:
        SelectionError: for an unknown key, form or method, two ways to say the rank, or a value out of range.
    """
    if not isinstance(given, Mapping) or set(given) - set(_KEYS):
        raise SelectionError(
            f"settings {given!r} are not a dict of {', '.join(_KEYS)}; or None to leave alone"
        )
    rules = [name for name in RANK_RULES if name in given]
    if len(rules) > 1:
        raise SelectionError(f"{' and '.join(rules)} both say the rank; pass one of them")
    merged = (vars(defaults) if defaults else {"multiple": 1, "fixed_basis": False}) | dict(given)
    _check_beta(given.get("beta"), merged["form"])
    for name in rules:
        _check_rule(name, given[name])
        merged |= {"rule": name, "value": merged.pop(name)}
    if defaults and "method" not in given and merged["form"] != defaults.form:
        merged["method"] = None  # each form has its own
    return _checked(merged)


def _check_beta(beta: Any, form: Any) -> None:
    if beta is None:
        return
    if form != "reduced":
        raise SelectionError(f"beta={beta!r} is a setting of the reduced form; leave it out of form={form!r}")
    if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= float(beta) <= 1:
        raise SelectionError(f"beta={beta!r} is no fraction of the outputs; pass one in [0, 1]")


def _check_rule(name: str, value: Any) -> None:
    if name == "size":
        check_size(value)
    elif name != "evbmf":
        check_ratio(name, value)
    elif value is not True:
        raise SelectionError(f"evbmf={value!r} is not True; leave it out, or pass evbmf=True")


def check_multiple(multiple: Any) -> None:
    """Refuse, by a SelectionError, what ranks cannot be multiples of."""
    if not is_whole(multiple) or multiple < 1:
        raise SelectionError(f"multiple={multiple!r} is no whole number from 1; pass for example multiple=16")


def _checked(merged: dict[str, Any]) -> Settings:
    form, method, multiple = merged["form"], merged["method"], merged["multiple"]
    if not isinstance(form, str) or form not in FORMS:
        raise SelectionError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}")
    known = FORMS[form].methods
    if method is not None and method not in known:
        raise SelectionError(
            f"method={method!r} is not known for the {form} form; choose one of {', '.join(known)}"
        )
    check_multiple(multiple)
    check_flags(fixed_basis=merged["fixed_basis"])
    beta = BETA if merged.get("beta") is None else float(merged["beta"])
    return Settings(**{**merged, "method": method or known[0], "beta": beta})


def ranks_of(record: ConvRecord, settings: Settings, weight_of: WeightOf | None, *, exact: bool) -> Ranks:
    """The ranks that the settings mean for a layer.

    Raises:
        LayerError: when ``exact`` and an integer size exceeds the largest useful ranks.
        SelectionError: when the rank depends on weights, and there are none, or no matrix of them.
    """
    form, method, beta = settings.form, settings.method, settings.beta
    if settings.rule == "size":
        ranks = ranks_by_size(record, settings.value, form, method, exact=exact, beta=beta)
    elif settings.rule in ("macs_ratio", "params_ratio"):
        cost = settings.rule.removesuffix("_ratio")
        ranks = ranks_by_cost(record, settings.value, cost, form, method, beta)
        return rounded_down(record, ranks, settings.multiple, form, beta)
    elif settings.rule == "energy":
        ranks = ranks_by_energy(record, settings.value, form, _unfoldings(record, settings, weight_of))
    else:
        ranks = ranks_by_evbmf(record, form, _unfoldings(record, settings, weight_of))
    return rounded_up(record, ranks, settings.multiple, form, method, beta)


def _unfoldings(record: ConvRecord, settings: Settings, weight_of: WeightOf | None) -> tuple[Unfolding, ...]:
    if weight_of is None:
        raise SelectionError(f"{settings.rule} needs the weights; use compress, or pass weight_of= to select")
    found = unfoldings(weight_of(record), groups_of(record, settings.form), settings.form)
    if not found:
        raise SelectionError(
            f"{settings.rule} has no meaning for the {settings.form} form, whose rank is that of no matrix; "
            "use size=, macs_ratio= or params_ratio="
        )
    return found
