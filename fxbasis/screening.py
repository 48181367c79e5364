"""Fits of what could stand for each layer, and the first look that rules most of it out.

Of all forms a layer has use for two or three, and fits are most of the work of a plan. So each form is
fitted at one rank first, near ``PROBE`` of the layer's MACs, and judged by the sums of the statistics alone
(``kfac``; without calibration data ``weight``), as if changes fell with the square of the MACs. The ``BEST``
that change least stay, if no more than ``SLACK`` times as much as the first of them. So do those of
``QUICK``: two dense convolutions take less time for the same work, which this look does not see. Output is
not among the best by itself: it is the function of gauge for more work, and often in less time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .datafit import Kept
from .estimating import Fitted, by_statistics
from .progress import progress
from .proposals import Proposal, step_weights
from .subjects import Subject

__all__ = ["fitted_all"]

PROBE, BEST, SLACK = 0.3, 2, 2.0
"""On ResNet-20 the plans for 0.5, 0.35 and 0.25 of the MACs predict what those of all fits do, within 1 %."""
QUICK = ("gauge", "output", "spatial")


def fitted_all(
    subject: Subject, proposals: Mapping[str, Sequence[Proposal]], *, screen: bool
) -> tuple[dict[str, list[Fitted]], dict[str, tuple[str, ...]]]:
    """By the name of a layer its proposals, with the weights of their steps, and the forms ruled out.

    Args:
        subject: the model under study.
        proposals: of each layer.
        screen: whether any may be ruled out.
    """
    fits: dict[str, list[Fitted]] = {}
    ruled_out: dict[str, tuple[str, ...]] = {}
    for name, listed in progress(list(proposals.items()), "fitting"):
        kept: Kept = {}
        looked = _fitted(subject, name, _probes(listed) if screen else [], kept)
        lost = _lost(subject, name, looked)
        left = [one for one in listed if one.layer.form not in lost]
        known = {one.layer.key for one, _ in looked}
        more = _fitted(subject, name, [one for one in left if one.layer.key not in known], kept)
        weights = {one.layer.key: made for one, made in (*looked, *more)}
        fits[name] = [(one, weights[one.layer.key]) for one in left]
        if lost:
            ruled_out[name] = lost
    return fits, ruled_out


def _fitted(subject: Subject, name: str, listed: Sequence[Proposal], kept: Kept) -> list[Fitted]:
    statistics, free = subject.statistics.get(name), name in subject.with_mean
    weights = step_weights(listed, subject.weight(name), statistics, kept, with_mean=free)
    return list(zip(listed, weights, strict=True))


def _probes(listed: Sequence[Proposal]) -> list[Proposal]:
    """Of each form the proposal whose part of the dense MACs is nearest to ``PROBE``."""
    found: dict[str, Proposal] = {}
    for one in listed:
        other = found.setdefault(one.layer.form, one)
        if abs(one.ratio - PROBE) < abs(other.ratio - PROBE):
            found[one.layer.form] = one
    return list(found.values())


def _lost(subject: Subject, name: str, looked: Sequence[Fitted]) -> tuple[str, ...]:
    estimator = "kfac" if subject.statistics else "weight"
    changes = by_statistics(subject, name, looked, estimator)
    scores = {
        one.layer.form: change * one.ratio**2 for (one, _), (change, _) in zip(looked, changes, strict=True)
    }
    best = sorted(scores.keys() - {"output"}, key=lambda form: (scores[form], form))[:BEST]
    kept = {*QUICK, *(form for form in best if scores[form] <= SLACK * scores[best[0]])}
    return tuple(form for form in scores if form not in kept)
