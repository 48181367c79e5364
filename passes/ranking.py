"""How many channels stand between the steps of a form: ``size``, or what they cost, or what they keep.

A form with one rank has R of them over all groups; tucker2 has two, tt three, which grow in step from one for
each group to the largest useful ones. Every rank is a multiple of the groups, at least one for each. Of the
reduced form all this is said of its atoms; ``beta`` says how many of its outputs are sums (``with_sums``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm
from numbers import Integral, Real
from typing import Any

from ..costs import dense_macs, dense_params
from ..errors import LayerError, SelectionError
from ..evbmf import evbmf_rank
from ..fitting import Unfolding
from ..structures import FORMS, Ranks, form_macs, form_params, settled, weight_groups
from .records import ConvRecord

__all__ = [
    "BETA",
    "check_ratio",
    "check_size",
    "cost_ratio",
    "groups_of",
    "is_whole",
    "ranks_by_cost",
    "ranks_by_energy",
    "ranks_by_evbmf",
    "ranks_by_size",
    "rounded_down",
    "rounded_up",
    "with_sums",
]

BETA = 0.25
"""The part of the outputs that are sums in the reduced form, where nothing else is said."""


def check_size(size: Any) -> None:
    """Refuse a size that is neither a positive integer nor a fraction in (0, 1]."""
    sound = int(size) >= 1 if is_whole(size) else isinstance(size, Real) and 0 < float(size) <= 1
    if isinstance(size, bool) or not sound:
        raise SelectionError(
            f"size={size!r} is neither an integer from 1 (number of basis convolutions) nor a float in "
            "(0, 1] (fraction of the layer's out_channels); pass for example size=16 or size=0.5"
        )


def check_ratio(name: str, value: Any) -> None:
    """Refuse a ratio of costs that is not in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise SelectionError(f"{name}={value!r} is no ratio in (0, 1]; pass for example {name}=0.5")


def is_whole(value: Any) -> bool:
    """Whether it is an integer, bool excluded."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def with_sums(record: ConvRecord, ranks: Ranks, form: str, beta: float = BETA) -> Ranks:
    """The ranks; of the reduced form with ``beta`` of each group's outputs as sums, none if it has one atom.

    >>> from torch import nn
    >>> from fxbasis.passes.numbering import number_convs
    >>> with_sums(number_convs(nn.Conv2d(4, 12, 3, groups=2))[0], (6, 0), "reduced", 0.3)
    (6, 4)
    """
    if form != "reduced":
        return ranks
    sums = record.groups * round(beta * (record.out_channels // record.groups))
    return settled(form, record.shape, (ranks[0], sums))


def _limits(record: ConvRecord, form: str, method: str) -> Ranks:
    """The largest useful ranks, of the reduced form that of its atoms."""
    largest = FORMS[form].largest_ranks(record.shape, method)
    return largest[:1] if form == "reduced" else largest


def ranks_by_size(
    record: ConvRecord,
    size: int | float,
    form: str = "output",
    method: str = "",
    *,
    exact: bool = False,
    beta: float = BETA,
) -> Ranks:
    """The ranks that ``size`` means for a layer, capped at the largest useful ones.

    An integer is every rank; a fraction is of ``out_channels``, and of the largest ranks for the forms that
    have several; 1.0 is the largest ranks of every form, at which it is exact.

    Raises:
        LayerError: when ``exact`` and an integer size exceeds all of the largest useful ranks.
    """
    largest, groups = _limits(record, form, method), groups_of(record, form)
    if exact and is_whole(size) and size > max(largest):
        raise LayerError(
            f"{record}: rank {size} exceeds {max(largest)}, at which the basis is exact already; "
            f"pass size={max(largest)} or less"
        )
    if not is_whole(size) and float(size) == 1.0:
        return with_sums(record, largest, form, beta)
    whole = [int(size)] * len(largest)
    parts = [float(size) * (record.out_channels if len(largest) == 1 else most) for most in largest]
    wanted = whole if is_whole(size) else parts
    ranks = [
        min(groups * max(1, round(rank / groups)), most) for rank, most in zip(wanted, largest, strict=True)
    ]
    return with_sums(record, settled(form, record.shape, tuple(ranks)), form, beta)


def ranks_by_cost(
    record: ConvRecord, ratio: float, cost: str, form: str, method: str = "", beta: float = BETA
) -> Ranks:
    """The largest ranks whose MACs or parameters are at most ``ratio`` of the dense ones.

    The smallest where none are; ``cost`` is ``"macs"`` or ``"params"``.
    """
    largest, groups = _limits(record, form, method), groups_of(record, form)
    top = max(largest) // groups

    def ranks_at(step: int) -> Ranks:
        ranks = tuple(groups * max(1, round(step / top * (most // groups))) for most in largest)
        return with_sums(record, settled(form, record.shape, ranks), form, beta)

    return ranks_at(_last(lambda step: cost_ratio(record, ranks_at(step), form, cost) <= ratio, top))


def ranks_by_energy(record: ConvRecord, energy: float, form: str, cuts: Sequence[Unfolding]) -> Ranks:
    """The smallest ranks that keep this part of the squared norm of each unfolding, over all groups."""
    groups, ranks = groups_of(record, form), []
    for cut in cuts:
        kept = cut.energies.sum(0).cumsum(0)
        enough = kept >= kept[-1] * (energy - 1e-12)
        ranks.append(groups * (int(enough.int().argmax()) + 1))
    return settled(form, record.shape, tuple(ranks))


def ranks_by_evbmf(record: ConvRecord, form: str, cuts: Sequence[Unfolding]) -> Ranks:
    """The ranks of analytic variational Bayes, of each unfolding the largest of its groups, at least one."""
    groups, ranks = groups_of(record, form), []
    for cut in cuts:
        found = [evbmf_rank(values.sqrt(), cut.rows, cut.columns) for values in cut.energies]
        ranks.append(groups * max(1, *found))
    return settled(form, record.shape, tuple(ranks))


def rounded_up(
    record: ConvRecord, ranks: Ranks, multiple: int, form: str, method: str, beta: float = BETA
) -> Ranks:
    """The ranks up to the next multiple, where the largest useful ones allow that."""
    largest, step = _limits(record, form, method), lcm(multiple, groups_of(record, form))
    found = tuple(min(-(-rank // step) * step, most) for rank, most in zip(ranks, largest, strict=False))
    return with_sums(record, found, form, beta)


def rounded_down(record: ConvRecord, ranks: Ranks, multiple: int, form: str, beta: float = BETA) -> Ranks:
    """The ranks down to the last multiple; those below the first stay."""
    step = lcm(multiple, groups_of(record, form))
    return with_sums(record, tuple(rank // step * step or rank for rank in ranks), form, beta)


def _last(holds: Callable[[int], bool], top: int) -> int:
    """The last number from 1 to ``top`` for which it holds, if it does up to some number; 1 if for none."""
    low, high = 1, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def cost_ratio(record: ConvRecord, ranks: Ranks, form: str, cost: str = "macs") -> float:
    """MACs, or parameters, of the form over those of the dense layer; without sizes, of a large image."""
    if cost == "params":
        return form_params(form, record.shape, ranks) / dense_params(record.shape)
    after = record.output_size or (1 << 10, 1 << 10)
    before = record.input_size or (after[0] * record.stride[0], after[1] * record.stride[1])
    return form_macs(form, record.shape, ranks, after, before) / max(1, dense_macs(record.shape, after))


def groups_of(record: ConvRecord, form: str) -> int:
    """The groups of the form's steps."""
    return weight_groups(record.shape) if form == "weight" else record.groups
