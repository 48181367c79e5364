"""``RewritePass``: each Conv2d that a plan names becomes a basis convolution and a composition.

The form module takes the convolution's place in the module tree, under every name that it has. In a
graph each call of the convolution then becomes two nodes, ``name.basis`` and ``name.composition``. Where a
call is not a node (a part that stayed Python), or where the convolution has hooks, which belong to one
call, the form module itself is called. So one exchange serves graphs, parts of graphs and plain modules. The
convolution *becomes* the form, so that a list or a closure that holds it holds the form too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ..bases import decompose
from ..errors import LayerError, PlanError
from ..forms import LAYER, BasisConv2d, effective_weight, has_hooks, layer_plan
from ..progress import progress
from ..recipe import LayerPlan, Plan
from ..running import become
from .base import FxPass, call_sites, keep_meta
from .numbering import conv_layers

__all__ = ["RewritePass", "check_plan", "factorise", "graphs_in", "names_of", "rewrite", "rewrite_modules"]


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


def rewrite(model: nn.Module, plan: Plan, *, empty: bool = False) -> list[nn.Module]:
    """Exchange modules, then expand their call sites in every graph; returns the forms, if any is new.

    Raises:
        PlanError, LayerError: see ``rewrite_modules``.
    """
    if [layer_plan(layer) for layer in conv_layers(model).values()] == list(plan):
        return []
    forms = rewrite_modules(model, plan, empty=empty)
    for graph_module in graphs_in(model):
        names = names_of(graph_module, {id(form) for form in forms if not has_hooks(form)})
        if _expand(graph_module, names):
            graph_module.graph.lint()
            graph_module.recompile()
    return forms


def rewrite_modules(model: nn.Module, plan: Plan, *, empty: bool = False) -> list[nn.Module]:
    """Make the convolutions of a plan form modules, in place; returns them.

    All are decomposed before the first is exchanged, so that a refusal leaves the model as it was.

    Raises:
        PlanError: when the plan is for another model.
        LayerError: when a weight is not finite or has no data.
    """
    convs = check_plan(model, plan)
    for layer in plan.compressed:
        _check_weight(convs[layer.name], layer)
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
    return [convs[name] for name in forms]


def check_plan(model: nn.Module, plan: Plan) -> Mapping[str, nn.Conv2d]:
    """The convolutions of the model by name, if they are those that the plan was made for.

    Raises:
        PlanError: naming the first layer that differs.
    """
    layers = conv_layers(model)
    if len(layers) != len(plan):
        raise PlanError(
            f"the plan has {len(plan)} convolutions, {type(model).__name__} has {len(layers)}; "
            "use the model that the plan was made for, uncompressed"
        )
    convs: dict[str, nn.Conv2d] = {}
    for number, ((name, conv), layer) in enumerate(zip(layers.items(), plan, strict=True), 1):
        found = (number, name, conv.in_channels, conv.out_channels, tuple(conv.kernel_size), conv.groups)
        meant = (layer.number, layer.name, layer.in_channels, layer.out_channels)
        if found != (*meant, layer.kernel_size, layer.groups) or not isinstance(conv, nn.Conv2d):
            raise PlanError(
                f"the plan's {layer} meets conv {number} ({name}), {type(conv).__name__} of weight "
                f"{tuple(conv.weight.shape)}; use the model that the plan was made for, uncompressed"
            )
        convs[name] = conv
    return convs


def _check_weight(conv: nn.Conv2d, layer: LayerPlan) -> None:
    weight = effective_weight(conv)
    if weight.is_meta:
        raise LayerError(f"{layer}: its weight is on the meta device and has no data; load the weights first")
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise LayerError(
            f"{layer}: {bad} of its weights are NaN or infinite; "
            "repair them, or leave the layer out of layers="
        )


def factorise(conv: nn.Conv2d, layer: LayerPlan) -> BasisConv2d:
    """The form of one convolution, from one decomposition of its effective weight."""
    decomposition = decompose(effective_weight(conv), conv.groups, layer.method)
    factors = decomposition.factors(layer.rank // conv.groups)
    return BasisConv2d.from_conv2d(conv, layer, factors)


def effective_weight_note(conv: nn.Conv2d) -> str:
    """A remark for a layer whose weight is computed from others; empty for a plain one."""
    if not parametrize.is_parametrized(conv, "weight"):
        return ""
    parts = conv.get_submodule("parametrizations.weight").children()
    kinds = ", ".join(type(part).__name__.lstrip("_") for part in parts)
    return f"its parametrization ({kinds}) is replaced by the effective weight"


def graphs_in(model: nn.Module) -> list[fx.GraphModule]:
    """Every GraphModule in a module tree, the model itself included."""
    return [module for module in model.modules() if isinstance(module, fx.GraphModule)]


def names_of(model: nn.Module, modules: Collection[int]) -> set[str]:
    """Every qualified name of the modules with these ids: one each, or more when shared."""
    return {name for name, found in model.named_modules(remove_duplicate=False) if id(found) in modules}


def _expand(graph_module: fx.GraphModule, names: set[str]) -> int:
    """Two nodes in place of each call of the named forms; returns how many calls there were."""
    graph = graph_module.graph
    nodes = call_sites(graph_module, names)
    for node in nodes:
        with graph.inserting_before(node):
            basis = graph.call_module(f"{node.target}.basis", node.args, dict(node.kwargs))
            composition = graph.call_module(f"{node.target}.composition", (basis,))
        keep_meta(node, same_output=False, to=basis)
        keep_meta(node, same_output=True, to=composition)
        node.replace_all_uses_with(composition)
        graph.erase_node(node)
    return len(nodes)
