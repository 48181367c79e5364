"""Fitting a compressed model to unlabelled data: exact linear algebra, no gradient step.

Four stages, each measured by the change of the outputs on the calibration images (``divergence``):

    weights        as ``compress`` rewrites it, fitted to the weights alone
    data           each layer by itself, in the metric of its patches and outputs (``datafit``)
    sequential     the last factor of each form again, on what the compressed model brings (``refitting``)
    recalibrated   and the running statistics of its BatchNorms from the calibration images

The last stage costs a good fit some tenths of a point and saves a bad one: the state with the least change is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .datafit import fit_to_data
from .divergence import divergence
from .errors import InputError
from .forms import BasisConv2d
from .passes.numbering import conv_layers
from .progress import progress
from .recalibration import recalibrate_batchnorm_
from .refitting import add_constant, batchnorms_behind, refit_in_sequence_, refittable, targets_of
from .running import ExampleInputs, load_values, run
from .subjects import Subject, put_weights

__all__ = ["Fit", "change_of", "fit_to_data_"]


@dataclass(frozen=True)
class Fit:
    """What fitting to data did.

    Attributes:
        changes: by stage, mean change of the outputs in nats; empty where outputs cannot be compared.
        kept: the stage that the model is in.
        images: of the calibration data.
    """

    changes: dict[str, float]
    kept: str
    images: int


def change_of(expected: list[object], model: nn.Module, batches: tuple[ExampleInputs, ...]) -> float:
    """The mean change of a model's outputs from the expected ones, in nats; infinite where one is NaN."""
    pairs = zip(batches, expected, strict=True)
    changes = torch.cat([divergence(output, run(model, inputs)) for inputs, output in pairs])
    return math.inf if changes.isnan().any() else float(changes.mean())


def fit_to_data_(small: nn.Module, subject: Subject) -> Fit:
    """Fit the forms of a compressed copy of the subject's model, in place.

    Raises:
        InputError: for a subject without calibration data.
    """
    if not subject.batches:
        raise InputError("there is no calibration data to fit to; pass calibration=, some batches of inputs")
    layers = conv_layers(small)
    forms = {name: form for name, form in layers.items() if isinstance(form, BasisConv2d)}
    forms = {name: form for name, form in forms.items() if name in subject.layers}
    stages = _Stages(small, subject)
    stages.done("weights")
    norms = batchnorms_behind(small, {name: form.ends[1] for name, form in forms.items()})
    means = {name: cast(Tensor, norm.running_mean).clone() for name, norm in norms.items()}
    _each_by_itself(forms, subject, norms)
    stages.done("data")
    once = {r.name for r in subject.table if r.calls == 1}
    again = {name: form for name, form in forms.items() if name in once and refittable(form)}
    for name in again.keys() & norms.keys():  # they are to take the whole constant again
        cast(Tensor, norms[name].running_mean).copy_(means[name])
    targets = targets_of(subject.layers, again, subject.model, subject.batches)
    refit_in_sequence_(small, again, targets, subject.batches)
    stages.done("sequential")
    if _recalibrated(small, subject.batches):
        stages.done("recalibrated")
    return stages.best()


def _recalibrated(small: nn.Module, batches: tuple[ExampleInputs, ...]) -> bool:
    """Whether it could be: in training mode a BatchNorm refuses a single value for each channel."""
    try:
        return bool(recalibrate_batchnorm_(small, [(inputs,) for inputs in batches]))
    except InputError:
        return False


class _Stages:
    """The state of a model after each stage, as far as it can be compared, and the best of them."""

    def __init__(self, small: nn.Module, subject: Subject) -> None:
        self.small, self.subject = small, subject
        self.expected = [run(subject.model, batch) for batch in subject.batches]
        self.changes: dict[str, float] = {}
        self.state: dict[str, Tensor] = {}
        self.kept = ""

    def done(self, stage: str) -> None:
        """Keep the state if its change is the least; where none is defined, that of the sequential refit."""
        if self.subject.comparable:
            change = change_of(self.expected, self.small, self.subject.batches)
            better = change <= self.changes.get(self.kept, math.inf)
            self.changes[stage] = change
        else:
            better = stage != "recalibrated"
        if better:
            self.kept = stage
            state = self.small.state_dict().items()
            self.state = {name: value.clone() for name, value in state if isinstance(value, Tensor)}

    def best(self) -> Fit:
        """Put the best state back."""
        load_values(self.small, self.state)
        return Fit(self.changes, self.kept, self.subject.images)


def _each_by_itself(
    forms: Mapping[str, BasisConv2d], subject: Subject, norms: Mapping[str, nn.BatchNorm2d]
) -> None:
    """Fit the layers; where a constant is free, it makes up for what the mean patch gives less."""
    for name, form in progress(list(forms.items()), "fitting to data"):
        statistics, norm, weight = subject.statistics[name], norms.get(name), subject.weight(name)
        with_mean = form.bias is not None or norm is not None
        moment = statistics.covariance if with_mean else statistics.moment
        put_weights(form, fit_to_data(weight, form.plan, moment, statistics.metric, _start(form)))
        if with_mean:
            shift = weight - form.weight.detach().to("cpu", torch.float64)
            rows = shift.reshape(len(moment), -1, moment.shape[1])
            add_constant(form, norm, (rows @ statistics.mean[:, :, None]).flatten())


def _start(form: BasisConv2d) -> dict[str, Tensor] | None:
    """The fit to the weight that a form of CP holds, which takes long to find; the others begin anew."""
    if form.plan.form not in ("cp", "cp4"):
        return None
    state = form.state_dict().items()
    return {name: value.to("cpu", torch.float64) for name, value in state if name.endswith(".weight")}
