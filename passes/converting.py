"""``convert``: a compressed model with the same function in another form, without a new fit.

The output, gauge and weight forms are one product of two factors, written in three ways, and the reduced form
is such a product with few coefficients; the four-factor CP form is a three-factor one with separable taps.
Training wants the balanced factors of the output form or the few weights of the weight form, inference the
gauge form, which costs less for the same numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..copying import Model, copy_model
from ..errors import SelectionError
from ..factors import step_weight
from ..fitting import gauge_factors
from ..forms import BasisConv2d
from ..gauge import regauge
from ..recipe import LayerPlan
from ..running import become
from ..structures import FORMS
from .folding import chains_in, join
from .numbering import conv_layers
from .rewriting import expand, graphs_in

__all__ = ["convert"]

_PRODUCTS = ("output", "gauge", "weight")


def convert(model: Model, form: str) -> Model:
    """A copy in which every rewritten layer that the form can represent has it; the others keep theirs.

    Between ``output``, ``gauge`` and ``weight`` in every direction, from ``reduced`` to these, and from
    ``cp4`` to ``cp``: exact up to the rounding of the factors to the layer's dtype.

    Args:
        model: what ``compress`` or ``load`` made; it is not touched.
        form: a key of ``fxbasis.structures.FORMS``.

    Raises:
        SelectionError: for a form that does not exist, or one that no layer can be converted to.
        LayerError: when something stands between the steps of a layer.

    >>> import torch, fxbasis
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU())
    >>> small = fxbasis.compress(model, torch.zeros(1, 8, 8, 8))
    >>> [fxbasis.profile(net, torch.zeros(1, 8, 8, 8)).macs for net in (small, convert(small, "gauge"))]
    [25344, 23040]
    """
    if form not in FORMS:
        raise SelectionError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}")
    copied = copy_model(model)
    forms = {name: layer for name, layer in conv_layers(copied).items() if isinstance(layer, BasisConv2d)}
    chosen = {name: layer for name, layer in forms.items() if _can_be(layer, form)}
    if not chosen:
        has = ", ".join(sorted({layer.plan.form for layer in forms.values()})) or "none"
        raise SelectionError(f"no layer can be converted to form={form!r}: the model has the forms {has}")
    _exchange(copied, chosen, form)
    return copied


def _can_be(layer: BasisConv2d, form: str) -> bool:
    plan = layer.plan
    if plan.form in _PRODUCTS and form in _PRODUCTS:
        shared = plan.steps[0].groups != plan.groups  # the weight form of a depthwise layer
        return plan.form != form and not shared
    if plan.form == "reduced" and form in _PRODUCTS:
        return plan.ranks[:1] <= FORMS[form].largest_ranks(plan.shape)
    return (plan.form, form) == ("cp4", "cp") and plan.ranks <= FORMS["cp"].largest_ranks(plan.shape)


def _exchange(model: nn.Module, chosen: dict[str, BasisConv2d], form: str) -> None:
    """Modules first, then the nodes of every graph: one for the layer again, and one for each new step."""
    converted = {name: _converted(layer, form) for name, layer in chosen.items()}
    chains = {graph: list(chains_in(graph, model, chosen)) for graph in graphs_in(model)}
    for name, made in converted.items():
        become(model.get_submodule(name), made)
    forms = [cast(BasisConv2d, model.get_submodule(name)) for name in converted]
    for graph_module, found in chains.items():
        for chain in found:
            join(graph_module.graph, chain)
        if expand(graph_module, forms) or found:
            graph_module.graph.lint()
            graph_module.recompile()


def _converted(layer: BasisConv2d, form: str) -> BasisConv2d:
    plan = layer.plan
    method = plan.method if plan.method in FORMS[form].methods else FORMS[form].methods[0]
    ranks = plan.ranks[:1] if plan.form == "reduced" else plan.ranks
    wanted = replace(plan, form=form, method=method, ranks=ranks)
    return BasisConv2d.from_conv2d(layer.to_conv2d(), wanted, _factors(layer, wanted))


def _factors(layer: BasisConv2d, wanted: LayerPlan) -> dict[str, Tensor]:
    """The numbers of the layer, by the names of the wanted form's steps."""
    weights = {name: step_weight(module).detach() for name, module in layer.factors.items()}
    if wanted.form == "cp":
        taps = weights["vertical"].double() * weights["horizontal"].double()
        rest = {f"{name}.weight": weights[name] for name in ("basis", "composition")}
        return rest | {"depthwise.weight": taps}
    if wanted.form != "gauge":
        return {f"{name}.weight": weight for name, weight in weights.items()}
    rank = wanted.ranks[0] // wanted.groups
    blocks = {name: weight.to("cpu", torch.float64).flatten(1) for name, weight in weights.items()}
    composition = blocks["composition"].reshape(wanted.groups, -1, rank)
    return gauge_factors(regauge(composition, blocks["basis"].reshape(wanted.groups, rank, -1)))
