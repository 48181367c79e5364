"""``RewritePass``: each Conv2d that a plan names becomes the steps of a form.

The form module takes the convolution's place in the module tree, under every name that it has. In a
graph each call of the convolution then becomes one node for each step, ``name.basis`` to
``name.composition``. Where a
call is not a node (a part that stayed Python), or where the convolution has hooks, which belong to one
call, the form module itself is called. So one exchange serves graphs, parts of graphs and plain modules. The
convolution *becomes* the form, so that a list or a closure that holds it holds the form too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import fx, nn

from ..carrying import has_hooks
from ..errors import LayerError, PlanError
from ..fitting import fit
from ..forms import LAYER, BasisConv2d, layer_plan
from ..kernels import KernelError, kernel_of, makers_of
from ..progress import progress
from ..recipe import LayerPlan, Plan
from ..running import become
from .base import FxPass, call_sites, keep_meta
from .numbering import conv_layers, shape_of
from .records import ConvRecord

__all__ = [
    "RewritePass",
    "check_plan",
    "check_uncompressed",
    "check_weight",
    "expand",
    "factorise",
    "graphs_in",
    "names_of",
    "rewrite",
    "rewrite_modules",
    "weight_flaw",
]


class RewritePass(FxPass):
    """Rewrite the layers of a plan inside a GraphModule, and in the graphs inside of it.

    Args:
        plan: what to do with each convolution; dense layers are marked with their reason only.
        empty: leave the factors uninitialised, to be loaded; nothing is decomposed.
    """

    def __init__(self, plan: Plan, *, empty: bool = False) -> None:
        super().__init__()
        self.plan = plan
        self.empty = empty

    def change(self, graph_module: fx.GraphModule) -> int:
        """Exchange modules, then expand their call sites; counts the layers, none when all is as planned."""
        return len(rewrite(graph_module, self.plan, empty=self.empty))


def rewrite(model: nn.Module, plan: Plan, *, empty: bool = False) -> list[BasisConv2d]:
    """Exchange modules, then expand their call sites in every graph; returns the forms, if any is new.

    Raises:
        PlanError, LayerError: see ``rewrite_modules``.
    """
    if [layer_plan(layer) for layer in conv_layers(model).values()] == list(plan):
        return []
    forms = rewrite_modules(model, plan, empty=empty)
    for graph_module in graphs_in(model):
        if expand(graph_module, forms):
            graph_module.graph.lint()
            graph_module.recompile()
    return forms


def rewrite_modules(model: nn.Module, plan: Plan, *, empty: bool = False) -> list[BasisConv2d]:
    """Make the convolutions of a plan form modules, in place; returns them.

    All are decomposed before the first is exchanged, so that a refusal leaves the model as it was.

    Raises:
        PlanError: when the plan is for another model.
        LayerError: when a weight is not finite, has no data, or is not the kernel that the plan means.
    """
    convs = check_plan(model, plan)
    for layer in plan.compressed:
        check_weight(convs[layer.name], layer)
    forms = {
        layer.name: BasisConv2d.empty_like(convs[layer.name], layer)
        if empty
        else factorise(convs[layer.name], layer)
        for layer in progress(plan.compressed, "decomposing")
    }
    for layer in plan:
        if not layer.compressed:
            setattr(convs[layer.name], LAYER, layer)
    for name, form in forms.items():
        become(convs[name], form)
    return [cast(BasisConv2d, convs[name]) for name in forms]


def check_plan(model: nn.Module, plan: Plan) -> Mapping[str, nn.Conv2d]:
    """The convolutions of the model by name, if they are those that the plan was made for.

    Raises:
        PlanError: naming the first layer that differs.
        LayerError: when a layer's kernel is not the one that the plan means, or is compressed already.
    """
    check_uncompressed(model)
    layers = cast(dict[str, nn.Conv2d], conv_layers(model))
    if len(layers) != len(plan):
        raise PlanError(
            f"the plan has {len(plan)} convolutions, {type(model).__name__} has {len(layers)}; "
            "use the model that the plan was made for, uncompressed"
        )
    convs: dict[str, nn.Conv2d] = {}
    for number, ((name, conv), layer) in enumerate(zip(layers.items(), plan, strict=True), 1):
        shape = shape_of(conv)
        found = (number, name, shape.in_channels, shape.out_channels, shape.kernel_size, shape.groups)
        meant = (layer.number, layer.name, layer.in_channels, layer.out_channels)
        if found != (*meant, layer.kernel_size, layer.groups):
            raise PlanError(
                f"the plan's {layer} meets conv {number} ({name}), {type(conv).__name__} of weight "
                f"{tuple(conv.weight.shape)}; use the model that the plan was made for, uncompressed"
            )
        if layer.compressed:
            _check_kernel(conv, layer)
        convs[name] = conv
    return convs


def check_uncompressed(model: nn.Module) -> None:
    """Refuse a model that has forms already: a plan is for all layers of an original."""
    for name, layer in conv_layers(model).items():
        if isinstance(layer, BasisConv2d):
            raise LayerError(
                f"{name} is compressed already ({layer.plan.form} form, rank {layer.plan.ranks}); fold the "
                "model first, or compress the original under one plan for all its layers"
            )


def check_weight(conv: nn.Conv2d, layer: LayerPlan | ConvRecord) -> None:
    """Refuse a weight without data, or with values that are not finite."""
    flaw = weight_flaw(conv)
    if flaw:
        raise LayerError(f"{layer}: {flaw}")


def weight_flaw(conv: nn.Conv2d) -> str:
    """Why the values of a weight cannot be taken apart, and the remedy; empty when they can."""
    weight = kernel_of(conv).conv.weight
    if weight.is_meta:
        return "its weight is on the meta device and has no data; load the weights first"
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        return f"{bad} of its weights are NaN or infinite; repair them, or leave the layer out of layers="
    return ""


def _check_kernel(conv: nn.Conv2d, layer: LayerPlan) -> None:
    try:
        kernel = kernel_of(conv)
    except KernelError as error:
        raise LayerError(f"{layer} cannot be rewritten: {error}; leave it out of layers=") from error
    if kernel.effective != layer.effective:
        found = "another weight than the stored one" if kernel.effective else "the stored weight"
        raise LayerError(
            f"{layer}: the plan has effective={layer.effective}, its class {type(conv).__name__} convolves "
            f"with {found}; make the plan again"
        )


def factorise(conv: nn.Conv2d, layer: LayerPlan) -> BasisConv2d:
    """The form of one convolution, fitted to its effective weight."""
    return BasisConv2d.from_conv2d(conv, layer, fit(kernel_of(conv).conv.weight, layer))


def effective_weight_note(conv: nn.Conv2d, layer: LayerPlan) -> str:
    """A remark for a layer whose weight is computed from others; empty for a plain one."""
    if layer.effective:
        return (
            f"its class {type(conv).__name__} computes its kernel from the stored weight; this effective "
            "weight is rewritten, and fold gives a plain Conv2d with it"
        )
    makers = makers_of(conv)
    return f"{makers} is replaced by the effective weight" if makers else ""


def graphs_in(model: nn.Module) -> list[fx.GraphModule]:
    """Every GraphModule in a module tree, the model itself included."""
    return [module for module in model.modules() if isinstance(module, fx.GraphModule)]


def names_of(model: nn.Module, modules: Collection[int]) -> set[str]:
    """Every qualified name of the modules with these ids: one each, or more when shared."""
    return {name for name, found in model.named_modules(remove_duplicate=False) if id(found) in modules}


def expand(graph_module: fx.GraphModule, forms: Sequence[BasisConv2d]) -> int:
    """A node for each step in place of each call of the forms; returns how many calls there were."""
    graph, count = graph_module.graph, 0
    for form in (form for form in forms if form.plan.called and not has_hooks(form)):
        for node in call_sites(graph_module, names_of(graph_module, {id(form)})):
            *inner, last = form.plan.called
            given, named = node.args, dict(node.kwargs)
            with graph.inserting_before(node):
                for name in inner:
                    step = graph.call_module(f"{node.target}.{name}", given, named)
                    keep_meta(node, same_output=False, to=step)
                    given, named = (step,), {}
                composition = graph.call_module(f"{node.target}.{last}", given, named)
            keep_meta(node, same_output=True, to=composition)
            node.replace_all_uses_with(composition)
            graph.erase_node(node)
            count += 1
    return count
