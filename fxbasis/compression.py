"""``compress``: trace, number, select, decompose, rewrite, compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .arguments import check_flags
from .calibrating import fit_to_data_
from .choices import asked_for
from .compositions import ReducedComposition
from .copying import copy_model
from .errors import FxBasisWarning, InputError, LayerError, PlanError, SelectionError, VerificationError
from .forms import BasisConv2d, layer_plan
from .kernels import kernel_of
from .passes.folding import fold
from .passes.numbering import conv_layers, number_convs
from .passes.records import ConvRecord
from .passes.rewriting import check_plan, check_weight, effective_weight_note, rewrite
from .passes.selection import Layers, select
from .passes.settings import WeightOf
from .planning import plan_for
from .proving import blamed, rewrite_difference
from .recipe import FORECAST, Plan
from .running import ExampleInputs
from .sensitivities import estimator_for
from .subjects import Subject, subject_of
from .timing import without_slower

__all__ = ["compress", "plan_of"]

_SIZE = 0.5
_FORM_DEFAULTS = {
    "form": "output",
    "method": None,
    "fixed_basis": False,
    "beta": None,
    "effective_weights": False,
}


def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    layers: Layers = "all",
    size: int | float = _SIZE,
    macs_ratio: float | None = None,
    params_ratio: float | None = None,
    energy: float | None = None,
    evbmf: bool = False,
    multiple: int = 1,
    form: str = "output",
    method: str | None = None,
    fixed_basis: bool = False,
    beta: float | None = None,
    plan: Plan | str | Path | None = None,
    effective_weights: bool = False,
    keep_if_slower: bool = True,
    threads: int = 1,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: str | Path | None = None,
    forms: Sequence[str] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> nn.Module:
    """A compressed copy: each selected ``name`` becomes ``name.basis`` and ``name.composition``.

    The copy is compared on the example inputs, layer by layer and as a whole, with the original under the
    reconstructed weights, which proves trace, rewrite and fold together; accuracy is the user's to measure.

    Args:
        model: any nn.Module in any mode; it is not touched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        layers: which convolutions; ``"all"`` means each that qualifies and whose cost falls. Numbers,
            ranges, names, patterns, functions and dicts of rules: see ``fxbasis.passes.selection``.
        size: an integer is the number of basis convolutions, a float in (0, 1] the fraction of the layer's
            out_channels, at least one for each group and capped at the largest useful rank.
        macs_ratio, params_ratio: instead of ``size``, the largest rank at which the layer has at most this
            part of its MACs or parameters; the smallest, with a reason in the plan, where none has.
        energy: instead of ``size``, the smallest rank that keeps this part of the weight's squared norm.
        evbmf: instead of ``size``, the rank of analytic variational Bayes (Nakajima et al. 2013), which takes
            the weight for low rank plus noise. Trained weights are not: ranks come out low and uneven.
        multiple: round ranks to a multiple of it (16 is a step of ONNX Runtime with AVX-512): down under
            ``macs_ratio`` and ``params_ratio``, otherwise up.
        form: a chain of convolutions: ``"output"``, ``"gauge"``, ``"weight"``, ``"reduced"``, ``"input"``,
            ``"spatial"``, ``"tucker2"``, ``"cp"``, ``"cp4"`` or ``"tt"``; see ``fxbasis.structures``.
        method: how its numbers are found; by default the first of those that the form has: ``"svd"``,
            ``"eigen"``, ``"qr"`` (a subset of filters), ``"qr-unpivoted"``, ``"random"``, ``"als"``; of the
            reduced form ``"atoms"`` (learned), ``"subset"`` (true filters).
        fixed_basis: the first step has no gradients, so that only the others learn (BasisConv).
        beta: of the reduced form, the part of the outputs that are sums of two atoms, 0.25 unless given; the
            others are scaled copies of one. No output is a sum where a group has a single atom.
        plan: a plan, or the file of one, that decides instead of all the others.
        effective_weights: compress classes that compute their kernel from the stored weight in a forward of
            their own (weight standardisation) by that kernel; fold gives plain Conv2d for them. Otherwise
            they are left alone.
        keep_if_slower: False to time each layer in ONNX Runtime at the sizes of the example inputs, from the
            cache of ``measure_layer``. What is slower than dense there stays dense, with an FxBasisWarning;
            another names the better rank of a layer just above a step. With budgets such candidates are not
            chosen, and the whole model is measured, as with ``latency=1.0``. True times nothing.
        threads: with which layers and models are timed.
        macs, params, latency, max_drop, forms, evaluate: instead of a rank, what ``plan`` plans for: budgets
            as fractions of the whole model's, or the largest predicted change.
        calibration: batches of inputs, without labels, to which every form is then fitted (see
            ``calibrating``): means, metric, sequential refit. The fit is kept that changes the outputs least.
        statistics: a file for the sums of the calibration pass, as of ``sensitivities``.

    Returns:
        A ``torch.fx.GraphModule`` where the model can be traced as a whole, otherwise a module tree of the
        same classes; dtypes, devices, modes, memory format and frozen parameters as in the original.

    Raises:
        SelectionError, LayerError, PlanError, InputError, TraceError, ExportError: see their messages.
        VerificationError: when the comparison fails.

    Source: arXiv 2408.06024, arXiv 1906.04509.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    >>> small = compress(model, torch.zeros(1, 3, 8, 8), size=4)
    >>> small.get_submodule("0.basis").weight.shape, small.get_submodule("0.composition").weight.shape
    (torch.Size([4, 3, 3, 3]), torch.Size([16, 4, 1, 1]))
    """
    if example_inputs is None:
        raise InputError(
            "compress needs example_inputs to prove its result; pass one batch that the model takes"
        )
    check_flags(evbmf=evbmf, fixed_basis=fixed_basis, effective_weights=effective_weights)
    check_flags(keep_if_slower=keep_if_slower)
    limits = {"macs": macs, "params": params, "latency": latency, "max_drop": max_drop}
    rules = {"macs_ratio": macs_ratio, "params_ratio": params_ratio, "energy": energy, "evbmf": evbmf or None}
    form_of = {"form": form, "method": method, "fixed_basis": fixed_basis, "beta": beta}
    searched = {"forms": forms, "evaluate": evaluate}
    budget = any(value is not None for value in limits.values())
    ranks = {"size": size, **rules}
    _check_no_contradiction(budget, plan, ranks, form_of | {"effective_weights": effective_weights}, searched)
    given = _given(plan)

    def decide(subject: Subject, traced: nn.Module) -> Plan:
        """What is done to each layer."""
        if budget:
            asked = asked_for(**limits)
            asked |= {} if keep_if_slower else {"latency": asked.get("latency", 1.0)}
            return _planned(subject, asked, layers, forms, multiple, evaluate, threads)
        chosen = given
        if chosen is None:
            rule = {name: value for name, value in rules.items() if value is not None} or {"size": size}
            settings = {**form_of, "multiple": multiple, **rule}
            chosen = _selected(traced, example_inputs, layers, settings, effective_weights)
        if keep_if_slower:
            return chosen
        _check(traced, chosen)
        return without_slower(chosen, number_convs(traced, example_inputs), threads)

    subject_for = partial(subject_of, model, example_inputs, calibration, statistics)
    return _proven(model, subject_for, decide, spare=given is None)


def _proven(
    model: nn.Module,
    subject_for: Callable[[Mapping[str, str]], Subject],
    decide: Callable[[Subject, nn.Module], Plan],
    *,
    spare: bool,
) -> nn.Module:
    """The model under the plan that is decided on; layers that cannot be proven are left alone if spared."""
    unfit: dict[str, str] = {}
    found: VerificationError | None = None
    while True:
        subject = subject_for(unfit)
        traced = copy_model(subject.model) if subject.batches else subject.model
        try:
            plan = decide(subject, traced)
        except LayerError as refused:
            raise (found or refused) from None  # it was asked for by number or name
        if found:
            warnings.warn(f"left alone: {unfit[found.layer]}", FxBasisWarning, stacklevel=3)
        try:
            return _rewritten(model, traced, plan, subject)
        except VerificationError as error:
            found = blamed(error, traced, subject.example)
            if not (spare and found.layer):
                raise found from error
            unfit[found.layer] = str(found).rpartition("; ")[0]


def _planned(
    subject: Subject,
    asked: Mapping[str, float],
    layers: Layers,
    forms: Sequence[str] | None,
    multiple: int,
    evaluate: Callable[[nn.Module], float] | None,
    threads: int,
) -> Plan:
    how = {"evaluate": evaluate, "path": None, "executor": None, "minutes": None}
    estimator = estimator_for(None, subject.batches or None, how)
    return plan_for(subject, asked, layers, forms, estimator, multiple, "sum", threads, how)


def _selected(
    traced: nn.Module, example: ExampleInputs, layers: Layers, settings: dict[str, Any], effective: bool
) -> Plan:
    table = number_convs(traced, example, effective_weights=effective)
    return select(table, layers, weight_of=_weight_in(traced), **settings)


def _check_no_contradiction(
    budget: bool,
    plan: object,
    rules: Mapping[str, object],
    form: Mapping[str, object],
    searched: Mapping[str, object],
) -> None:
    """Refuse, by a SelectionError, arguments that a budget or a plan would silently overrule."""
    if plan is not None and budget:
        raise SelectionError("plan= decides instead of a budget; pass one of them")
    if not budget:
        idle = [name for name, value in searched.items() if value is not None]
        if idle:
            raise SelectionError(f"{idle[0]}= is for plans; pass a budget too, such as macs=0.5")
        return
    left = {"size": _SIZE}
    given = [name for name, value in rules.items() if value is not None and value != left.get(name)]
    if given:
        raise SelectionError(f"{given[0]}= and a budget both say the ranks; pass one of them")
    given = [name for name, value in form.items() if value != _FORM_DEFAULTS[name]]
    if given:
        raise SelectionError(f"a budget finds the forms by itself; pass forms= instead of {given[0]}=")


def _rewritten(model: nn.Module, traced: nn.Module, plan: Plan, subject: Subject) -> nn.Module:
    """Rewrite, prove, and fit to the calibration data if there are any; and prove that again."""
    _say(traced, plan)
    _warn_of_repeated_outputs(rewrite(traced, plan))
    rewrite_difference(model, traced, subject.example)
    forecast = {name: value for name, value in plan.forecast.items() if name != "fit"}  # of another model
    if subject.batches and plan.compressed:
        forecast["fit"] = asdict(fit_to_data_(traced, subject))
        rewrite_difference(fold(traced), traced, subject.example)
    if forecast:
        setattr(traced, FORECAST, forecast)
    return traced


def _given(plan: Plan | str | Path | None) -> Plan | None:
    if isinstance(plan, (str, Path)):
        return Plan.from_json(plan)
    if not isinstance(plan, Plan | None):
        raise PlanError(f"plan={plan!r} is a {type(plan).__name__}; pass a Plan, or the path of its file")
    return plan


def _check(traced: nn.Module, plan: Plan) -> None:
    convs = check_plan(traced, plan)
    for layer in plan.compressed:
        check_weight(convs[layer.name], layer)


def _warn_of_repeated_outputs(forms: Iterable[BasisConv2d]) -> None:
    for form in forms:
        if isinstance(form.composition, ReducedComposition):
            filters, distinct = form.out_channels, form.composition.distinct_outputs
            if distinct < filters:
                warnings.warn(
                    f"{form.plan}: {filters - distinct} of its {filters} outputs repeat another one exactly, "
                    "bias aside; a larger rank or beta may tell them apart",
                    FxBasisWarning,
                    stacklevel=3,
                )


def _weight_in(model: nn.Module) -> WeightOf:
    """The kernel of a numbered convolution, refused when it is not finite."""
    layers = conv_layers(model)

    def weight_of(record: ConvRecord) -> Tensor:
        conv = cast(nn.Conv2d, layers[record.name])
        check_weight(conv, record)
        return kernel_of(conv).conv.weight

    return weight_of


def plan_of(model: nn.Module) -> Plan:
    """The plan that a compressed model was made by.

    Raises:
        PlanError: when the model was not made by ``compress`` or ``load``.
    """
    plans = [layer_plan(layer) for layer in conv_layers(model).values()]
    found = tuple(plan for plan in plans if plan is not None)
    if len(found) != len(plans):
        raise PlanError(f"{type(model).__name__} was not made by compress; compress it first")
    return Plan(found, getattr(model, FORECAST, {}))


def _say(traced: nn.Module, plan: Plan) -> None:
    convs: Any = check_plan(traced, plan)
    for layer in plan.compressed:
        note = effective_weight_note(convs[layer.name], layer)
        if note:
            warnings.warn(f"{layer}: {note}", FxBasisWarning, stacklevel=3)
    if not plan.compressed:
        reasons = sorted({layer.reason for layer in plan})
        why = "; ".join(reasons[:3]) or "the model has no Conv2d"
        warnings.warn(f"nothing is compressed: {why}", FxBasisWarning, stacklevel=3)
