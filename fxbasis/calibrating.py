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

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .datafit import fit_to_data
from .divergence import divergence
from .errors import InputError
from .forms import BasisConv2d
from .passes.numbering import conv_layers
from .progress import progress
from .recalibration import recalibrate_batchnorm_
from .refitting import refit_in_sequence_, refittable, targets_of
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
    """The mean change of a model's outputs from the expected ones, in nats."""
    pairs = zip(batches, expected, strict=True)
    return float(torch.cat([divergence(output, run(model, inputs)) for inputs, output in pairs]).mean())


def fit_to_data_(small: nn.Module, subject: Subject) -> Fit:
    """Fit the forms of a compressed copy of the subject's model, in place.

    Raises:
        InputError: for a subject without calibration data.
    """
    if not subject.batches:
        raise InputError("there is no calibration data to fit to; pass calibration=, some batches of inputs")
    layers = conv_layers(small)
    forms = {name: form for name, form in layers.items() if isinstance(form, BasisConv2d)}
    forms = {name: form for name, form in forms.items() if name in subject.layers and _fits(form)}
    stages = _Stages(small, subject)
    stages.done("weights")
    for name, form in progress(list(forms.items()), "fitting to data"):
        _fit(form, subject, name)
    stages.done("data")
    once = {r.name for r in subject.table if r.calls == 1}
    again = {name: form for name, form in forms.items() if name in once and refittable(form)}
    targets = targets_of(subject.layers, again, subject.model, subject.batches)
    refit_in_sequence_(small, again, targets, subject.batches)
    stages.done("sequential")
    if recalibrate_batchnorm_(small, subject.batches):
        stages.done("recalibrated")
    return stages.best()


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
            self.changes[stage] = change_of(self.expected, self.small, self.subject.batches)
            better = self.changes[stage] <= min(self.changes.values())
        else:
            better = stage != "recalibrated"
        if better:
            self.kept = stage
            self.state = {name: value.clone() for name, value in self.small.state_dict().items()}

    def best(self) -> Fit:
        """Put the best state back."""
        load_values(self.small, self.state)
        return Fit(self.changes, self.kept, self.subject.images)


def _fits(form: BasisConv2d) -> bool:
    """Whether a fit to data is known: copies and sums of atoms are no free composition."""
    return form.plan.form != "reduced"


def _fit(form: BasisConv2d, subject: Subject, name: str) -> None:
    statistics = subject.statistics[name]
    moment = statistics.covariance if name in subject.with_mean else statistics.moment
    weights = fit_to_data(subject.weight(name), form.plan, moment, statistics.metric)
    put_weights(form, weights)
