"""What a plan promised beside what was measured, in sentences of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["promised"]

EXACT = "merging, exact"
"""The solver that finds the best choice, not only one within a bound."""
_NAMES = {"macs": "MACs", "params": "parameters", "latency": "time"}
_OF_PLANS = {**_NAMES, "max_drop": "predicted change"}


def promised(forecast: Mapping[str, Any], measured: Mapping[str, float] | None = None) -> list[str]:
    """Paragraphs on a plan and on the fit to calibration data; none where there was neither.

    >>> promised({"asked": {"macs": 0.5}, "macs": 0.49, "change": 0.02, "unit": "nats"}, {"macs": 0.49})
    ['Planned for MACs at most 0.5. Predicted: MACs 0.490, change 0.02 nats.']

    Args:
        forecast: of a ``Plan``.
        measured: ratios to the original by name: macs, params, latency; None before they are known.
    """
    found, measured = [], measured or {}
    if "asked" in forecast:
        found.append(_planned(forecast))
        broken = {name: limit for name, limit in forecast["asked"].items() if measured.get(name, 0.0) > limit}
        found += [
            f"**A promise failed: {_NAMES[name]} at most {limit}, measured {measured[name]:.3f}.**"
            for name, limit in broken.items()
        ]
    if "fit" in forecast:
        found.append(_fitted(forecast["fit"]))
    return found


def _planned(forecast: Mapping[str, Any]) -> str:
    limits = forecast["asked"].items()
    asked = [f"{_OF_PLANS[name]} at most {limit}" for name, limit in limits] or ["a point of the front"]
    told = [f"{_NAMES[name]} {forecast[name]:.3f}" for name in _NAMES if name in forecast]
    told.append(f"change {forecast['change']:.3g} {forecast['unit']}")
    text = f"Planned for {' and '.join(asked)}. Predicted: {', '.join(told)}"
    if "estimator" in forecast:
        text += f" ({_estimated(forecast)}; before the sequential refit; {_certified(forecast)})"
    text += "."
    if "measured change" in forecast:
        found, rounds = forecast["measured change"], forecast["rounds"]
        text += f" Measured before the fit: change {found:.3g}, the best of {rounds} rounds about it."
    if "measured latency" in forecast:
        text += f" Measured before the fit: time {forecast['measured latency']:.3f}."
    return text


def _estimated(forecast: Mapping[str, Any]) -> str:
    """By what, and how surely where it comes from images."""
    if not forecast["images"]:
        return str(forecast["estimator"])
    return f"+- {forecast['error']:.1g}; {forecast['estimator']}, {forecast['images']} images"


def _certified(forecast: Mapping[str, Any]) -> str:
    """How far from the best it can be; in rounds, by the candidates of the first."""
    if forecast["solver"] == EXACT and "rounds" not in forecast:
        return "the best of these candidates"
    objective = _NAMES.get(forecast["objective"], forecast["objective"])
    return f"no plan of these candidates is below {forecast['bound']:.3g} {objective}"


def _fitted(fit: Mapping[str, Any]) -> str:
    if not fit["changes"]:
        return f"Fitted to {fit['images']} images; its outputs have no change that could be compared."
    stages = ", ".join(f"{stage} {change:.3g}" for stage, change in fit["changes"].items())
    return (
        f"Fitted to {fit['images']} images without labels. Mean change of the outputs on them, in nats, by "
        f"stage: {stages}. Kept: {fit['kept']}."
    )
