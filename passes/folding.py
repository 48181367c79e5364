"""``fold``: every basis subgraph back to one Conv2d, exactly.

Composition and basis are linear, so their product is a convolution with the options of the basis and
the bias of the composition. Names, ``state_dict`` keys and their order are the original's again.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from ..errors import LayerError
from ..forms import LAYER, BasisConv2d
from ..running import Model, become, copy_model
from .base import FxPass, call_sites, keep_meta
from .numbering import conv_layers
from .rewriting import graphs_in, names_of

__all__ = ["FoldPass", "fold", "fold_modules"]


class FoldPass(FxPass):
    """Fold every form of a GraphModule in place: module tree and graph."""

    def change(self, graph_module: fx.GraphModule) -> int:
        """Join call sites, then exchange modules; counts the layers."""
        return _fold(graph_module)


def _fold(model: nn.Module) -> int:
    """Find the pairs in every graph, exchange the modules, join the pairs; counts the layers."""
    forms = {name: layer for name, layer in conv_layers(model).items() if isinstance(layer, BasisConv2d)}
    pairs = {graph: list(_pairs_in(graph, model, forms)) for graph in graphs_in(model)}
    fold_modules(model)
    for graph_module, found in pairs.items():
        for basis, composition in found:
            _join(graph_module.graph, basis, composition)
        if found:
            graph_module.graph.lint()
            graph_module.recompile()
    return len(forms)


def _pairs_in(
    graph_module: fx.GraphModule, model: nn.Module, forms: dict[str, BasisConv2d]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    for name, form in forms.items():
        names = names_of(graph_module, {id(model.get_submodule(name))})
        yield from _pairs(graph_module, names, form)


def fold_modules(model: nn.Module) -> None:
    """Make every form in the module tree its folded Conv2d, in place."""
    for name, layer in conv_layers(model).items():
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
        LayerError: when something else reads the output between a basis and its composition.

    >>> import torch, fxbasis
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    >>> small = fxbasis.compress(model, torch.zeros(1, 3, 8, 8))
    >>> [name for name, _ in small.named_parameters()]
    ['0.basis.weight', '0.composition.weight', '0.composition.bias']
    >>> [name for name, _ in fold(small).named_parameters()]
    ['0.weight', '0.bias']
    """
    copied = copy_model(model)
    _fold(copied)
    return copied


def _pairs(graph_module: fx.GraphModule, names: set[str], form: BasisConv2d) -> list[tuple[fx.Node, fx.Node]]:
    pairs = []
    for composition in call_sites(graph_module, {f"{name}.composition" for name in names}):
        basis = composition.args[0] if composition.args else None
        targets = {f"{name}.basis" for name in names}
        if not isinstance(basis, fx.Node) or basis.target not in targets or len(basis.users) > 1:
            raise LayerError(
                f"{form.plan} cannot be folded: something stands between its basis and its composition, "
                f"or reads the basis (node {composition.name}); remove it from the graph first"
            )
        pairs.append((basis, composition))
    return pairs


def _join(graph: fx.Graph, basis: fx.Node, composition: fx.Node) -> None:
    name = str(composition.target).removesuffix(".composition")
    with graph.inserting_before(composition):
        node = graph.call_module(name, basis.args, dict(basis.kwargs))
    keep_meta(composition, same_output=True, to=node)
    composition.replace_all_uses_with(node)
    graph.erase_node(composition)
    graph.erase_node(basis)
