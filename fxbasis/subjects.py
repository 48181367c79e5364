"""A model under study: traced, numbered, with its calibration batches and what is known from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .calibration_data import batches_of, naming_batch
from .copying import copy_model
from .divergence import divergence
from .errors import InputError
from .files import check_target
from .forms import BasisConv2d
from .kernels import kernel_of
from .nests import tensors_of
from .passes.numbering import conv_layers, number_convs
from .passes.records import ConvRecord, ConvTable
from .passes.rewriting import rewrite
from .passes.tracing import trace
from .proposals import excluded
from .recipe import UNFIT, LayerPlan, Plan
from .refitting import batchnorms_behind
from .running import ExampleInputs, batch_size, run
from .statistics import LayerStatistics, collect
from .statistics_file import read_statistics, write_statistics

__all__ = ["Subject", "built", "first_images", "plan_with", "put_weights", "subject_of", "take_off_"]

IMAGES = 512
"""Of the calibration images, those that statistics and estimates are taken over."""


@dataclass(frozen=True)
class Subject:
    """A traced copy of a model, its convolutions, and inputs without labels.

    Attributes:
        model: traced; in no case changed.
        example: the example inputs. table: the numbered convolutions.
        batches: calibration inputs; none without calibration.
        kept: the file that keeps the statistics, or None.
    """

    model: nn.Module
    example: ExampleInputs
    table: ConvTable
    batches: tuple[ExampleInputs, ...]
    kept: Path | None = None

    @cached_property
    def layers(self) -> dict[str, nn.Conv2d]:
        """The convolutions that can be compressed, by name."""
        found = conv_layers(self.model)
        return {r.name: cast(nn.Conv2d, found[r.name]) for r in self.table if not excluded(r)}

    def weight(self, name: str) -> Tensor:
        """The effective kernel (C, c / g, K_h, K_w), float64 on the CPU."""
        return kernel_of(self.layers[name]).conv.weight.detach().to("cpu", torch.float64)

    @property
    def images(self) -> int:
        """How many calibration images there are."""
        return sum(map(batch_size, self.batches))

    @cached_property
    def comparable(self) -> bool:
        """Whether the change between two outputs of the model is defined."""
        with naming_batch(1):
            output = run(self.model, self.batches[0])
        try:
            divergence(output, output)
        except InputError:
            return False
        return True

    def check_comparable(self) -> None:
        """Refuse, before any work, outputs of the model that have no change.

        Raises:
            InputError: saying what they are, and what can be done without it.
        """
        if not self.comparable:
            output = run(self.model, self.batches[0])
            divergence(output, output)

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Of each layer, from the file that keeps them or else into it; none without calibration."""
        if not self.batches:
            return {}
        digest = self.digest("statistics", IMAGES) if self.kept else ""
        found = read_statistics(self.kept, digest) if self.kept else None
        if found is None:
            found = self._collected()
            if self.kept:
                write_statistics(self.kept, found, digest)
        return found

    def _collected(self) -> dict[str, LayerStatistics]:
        batches = first_images(self.batches, IMAGES)
        found = collect(self.model, self.layers, batches, gradients=self.comparable)
        for name, norm in {} if self.comparable else self.norms.items():
            found[name].metric = _scale_of(cast(nn.BatchNorm2d, self.model.get_submodule(norm)))
        for name, one in found.items():
            if not all(bool(sums.isfinite().all()) for sums in (one.mean, one.moment, one.metric)):
                what = "its inputs or gradients on the calibration data are NaN or infinite"
                raise InputError(f"{name}: {what}; repair the data or the model")
        return found

    @cached_property
    def norms(self) -> dict[str, str]:
        """The names of the BatchNorms that alone read a layer, by the layer's."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return {name: names[id(norm)] for name, norm in batchnorms_behind(self.model, self.layers).items()}

    @cached_property
    def with_mean(self) -> set[str]:
        """The layers whose mean output can be set freely: they have a bias, or feed a BatchNorm alone."""
        return {name for name, layer in self.layers.items() if layer.bias is not None or name in self.norms}

    def free_mean(self, name: str) -> Tensor | None:
        """(g, q), the mean patch of a layer whose mean output can be set freely; None of others."""
        return self.statistics[name].mean if name in self.with_mean and name in self.statistics else None

    def constant(self, name: str, shift: Tensor) -> Tensor | None:
        """(C,), what a shift of its weight adds to a layer's mean output; None where that stays."""
        mean = self.free_mean(name)
        if mean is None:
            return None
        return (shift.reshape(len(mean), -1, mean.shape[1]) @ mean[:, :, None]).flatten()

    def digest(self, *settings: Any) -> str:
        """A hash of the code, parameters, buffers and batches, and of the settings."""
        code = re.sub("0x[0-9a-f]+", "", repr((settings, self.model)))
        found = hashlib.sha256(code.encode())
        for name, tensor in self.model.state_dict().items():
            found.update(name.encode())
            found.update(b"".join(map(_bytes, tensors_of(tensor))))
        for batch in self.batches:
            found.update(b"".join(map(_bytes, tensors_of(batch))))
        return found.hexdigest()


def _scale_of(norm: nn.BatchNorm2d) -> Tensor:
    """(C, C), the metric in which an error counts as after the BatchNorm: diag(gamma^2 / (var + eps))."""
    scale = cast(Tensor, norm.running_var).double().cpu() + norm.eps
    gain = torch.ones_like(scale) if norm.weight is None else norm.weight.detach().double().cpu()
    return torch.diag(gain.square() / scale)


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype}".encode() + values


def subject_of(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any] | None,
    statistics: str | Path | None = None,
    unfit: Mapping[str, str] | None = None,
) -> Subject:
    """Trace, number, and read the batches.

    Args:
        model, example_inputs, calibration: as of ``compress``.
        statistics: the file that keeps the sums over the batches.
        unfit: by the names of convolutions that are left alone, why.

    Raises:
        InputError: for calibration data that cannot be read twice, or holds nothing, or a file without data.
        UsageError: for a file that cannot be written.
    """
    if example_inputs is None:
        raise InputError("example_inputs is None; pass one batch that the model takes")
    if statistics is not None and not isinstance(statistics, (str, Path)):
        raise InputError(f"statistics={statistics!r} is no path; pass the name of a file")
    if statistics is not None and calibration is None:
        raise InputError("statistics= keeps the sums of calibration data; pass calibration= too")
    kept = None if statistics is None else check_target(statistics)
    traced = trace(model, example_inputs)
    for name, reason in (unfit or {}).items():
        vars(traced.get_submodule(name))[UNFIT] = reason
    table = number_convs(traced, example_inputs)
    batches = () if calibration is None else tuple(batches_of(calibration))
    return Subject(traced, example_inputs, table, batches, kept)


def first_images(batches: Sequence[ExampleInputs], images: int) -> list[ExampleInputs]:
    """The first batches, until they hold so many images."""
    found: list[ExampleInputs] = []
    for batch in batches:
        if found and sum(map(batch_size, found)) >= images:
            break
        found.append(batch)
    return found


def plan_with(
    table: Sequence[ConvRecord], chosen: Mapping[int, LayerPlan], reason: str = "dense is better"
) -> Plan:
    """The plan that writes the chosen layers by their numbers, and leaves the others dense."""
    return Plan(tuple(chosen.get(r.index) or r.decided(reason=excluded(r) or reason) for r in table))


def built(model: nn.Module, plan: Plan, weights: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """A copy of a traced model with the layers of a plan, whose steps have these weights."""
    copied = copy_model(model)
    rewrite(copied, plan, empty=True)
    for name, form in conv_layers(copied).items():
        if isinstance(form, BasisConv2d):
            original = kernel_of(cast(nn.Conv2d, conv_layers(model)[name])).conv
            put_weights(form, weights[name], original.bias)
    return copied


def take_off_(model: nn.Module, name: str, norm: str | None, constant: Tensor) -> None:
    """Take a constant (C,) off the outputs of a layer: by its bias, or the mean of the BatchNorm behind."""
    form = conv_layers(model)[name]
    with torch.no_grad():
        if form.bias is not None:
            form.bias.sub_(constant.to(form.bias))
        elif norm is not None:
            mean = cast(Tensor, model.get_submodule(norm).running_mean)
            mean.add_(constant.to(mean))


def put_weights(form: BasisConv2d, weights: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
    """Give the steps of a form their weights, and its bias, rounded to its dtype."""
    state = form.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value.reshape(state[name].shape))
        if bias is not None and form.bias is not None:
            form.bias.copy_(bias)
