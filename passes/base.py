"""What every pass shares: fx's own pass interface, the keys in ``node.meta``, and node look-ups.

A pass is a ``torch.fx.passes.infra`` pass: it changes the GraphModule it is given, returns a
``PassResult`` whose ``modified`` is a count turned bool, and drops into fx's ``PassManager``.
"""

from __future__ import annotations

from abc import abstractmethod

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

__all__ = ["CONV_NUMBER", "MACS", "FxPass", "PassResult", "call_sites", "keep_meta"]

CONV_NUMBER = "fxbasis_conv_number"
MACS = "fxbasis_macs"


class FxPass(PassBase):
    """A pass that says how many things it changed, and leaves a sound graph behind."""

    @abstractmethod
    def change(self, graph_module: GraphModule) -> int:
        """Change the graph module; return how many changes were made."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run ``change``, then lint and recompile when it did something."""
        count = self.change(graph_module)
        if count:
            graph_module.graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, count > 0)


def keep_meta(node: Node, *, same_output: bool, to: Node) -> None:
    """Give a node's meta to one that replaces it: all but its MACs, or what does not depend on its output."""
    inner = (CONV_NUMBER, "nn_module_stack", "stack_trace")
    keys = [key for key in node.meta if key != MACS and (same_output or key in inner)]
    to.meta.update({key: node.meta[key] for key in keys})


def call_sites(graph_module: GraphModule, names: set[str]) -> list[Node]:
    """The call_module nodes whose target is one of ``names``, in graph order."""
    return [node for node in graph_module.graph.nodes if node.op == "call_module" and node.target in names]
