"""``fold``: every basis subgraph back to one Conv2d, exactly.

The steps are linear, so their product is a convolution with their options and the bias of the last.
Names, ``state_dict`` keys and their order are the original's again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx, nn

from ..copying import Model, copy_model
from ..errors import LayerError
from ..forms import LAYER, BasisConv2d
from ..running import become
from .base import FxPass, call_sites, keep_meta
from .numbering import conv_layers
from .rewriting import graphs_in, names_of

__all__ = ["FoldPass", "chains_in", "fold", "fold_layers", "fold_modules", "join"]


class FoldPass(FxPass):
    """Fold every form of a GraphModule in place: module tree and graph."""

    def change(self, graph_module: fx.GraphModule) -> int:
        """Join call sites, then exchange modules; counts the layers."""
        return _fold(graph_module, conv_layers(graph_module))


def _fold(model: nn.Module, names: Collection[str]) -> int:
    """Find the chains of steps in every graph, exchange the modules, join the chains; counts the layers."""
    layers = {name: layer for name, layer in conv_layers(model).items() if name in names}
    forms = {name: layer for name, layer in layers.items() if isinstance(layer, BasisConv2d)}
    chains = {graph: list(chains_in(graph, model, forms)) for graph in graphs_in(model)}
    fold_modules(model, names)
    for graph_module, found in chains.items():
        for chain in found:
            join(graph_module.graph, chain)
        if found:
            graph_module.graph.lint()
            graph_module.recompile()
    return len(forms)


def chains_in(
    graph_module: fx.GraphModule, model: nn.Module, forms: dict[str, BasisConv2d]
) -> Iterator[list[fx.Node]]:
    """The nodes of the steps of each call in one graph; the forms are those of these names in the model."""
    for name, form in forms.items():
        for target in names_of(graph_module, {id(model.get_submodule(name))}):
            yield from _chains(graph_module, target, form)


def fold_modules(model: nn.Module, names: Collection[str]) -> None:
    """Make the forms of these names their folded Conv2d, in place, and forget what was planned for others."""
    layers = conv_layers(model)
    for name, layer in [(name, layers[name]) for name in names]:
        if isinstance(layer, BasisConv2d):
            become(model.get_submodule(name), layer.to_conv2d())
        elif hasattr(layer, LAYER):
            delattr(layer, LAYER)


def fold(model: Model) -> Model:
    """A folded copy of a compressed model: plain Conv2d under the original's names.

    Every fold is compared with its form on a random patch, in float64. A model with nothing to fold is
    copied. ``original.load_state_dict(fold(small).state_dict())`` works.

    Raises:
        VerificationError: when a folded convolution differs from its form by more than rounding.
        LayerError: when something else reads what is between two steps.

    >>> import torch, fxbasis
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    >>> small = fxbasis.compress(model, torch.zeros(1, 3, 8, 8))
    >>> [name for name, _ in small.named_parameters()]
    ['0.basis.weight', '0.composition.weight', '0.composition.bias']
    >>> [name for name, _ in fold(small).named_parameters()]
    ['0.weight', '0.bias']
    """
    return fold_layers(model, conv_layers(model))


def fold_layers(model: Model, names: Collection[str]) -> Model:
    """A copy in which the layers of these names are folded, and the others are as they were."""
    copied = copy_model(model)
    _fold(copied, names)
    return copied


def _chains(graph_module: fx.GraphModule, name: str, form: BasisConv2d) -> Iterator[list[fx.Node]]:
    """The nodes of the steps, in their order, for each call of one form that was expanded."""
    for node in call_sites(graph_module, {f"{name}.{step}" for step in form.plan.called[-1:]}):
        chain = [node]
        for step in reversed(form.plan.called[:-1]):
            before = chain[0].args[0] if chain[0].args else None
            if not isinstance(before, fx.Node) or before.target != f"{name}.{step}" or len(before.users) > 1:
                raise LayerError(
                    f"{form.plan} cannot be folded: something stands between its steps, or reads what is "
                    f"between them (node {chain[0].name}); remove it from the graph first"
                )
            chain.insert(0, before)
        yield chain


def join(graph: fx.Graph, chain: list[fx.Node]) -> None:
    """One node for the layer in place of those of its steps."""
    first, last = chain[0], chain[-1]
    with graph.inserting_before(last):
        node = graph.call_module(str(last.target).rpartition(".")[0], first.args, dict(first.kwargs))
    keep_meta(last, same_output=True, to=node)
    last.replace_all_uses_with(node)
    for step in reversed(chain):
        graph.erase_node(step)
