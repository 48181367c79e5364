"""Counting multiply-adds from the ATen operations that run, by module and by graph node.

The count looks at the tensors of each operation and knows nothing of layers, forms or ranks. Convolutions
are counted here (weight times output positions, groups included; PyTorch's registry counts the gradient of a
grouped weight as many times as it has groups); matrix products and attention by PyTorch's own registry of
formulas. Products entry by entry are counted inside of a ``ReducedComposition``, which is made of them, and
nowhere else. What runs backward belongs to the module in which autograd noted it: both have one sequence
number.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

from ..compositions import ReducedComposition
from ..errors import FxBasisWarning
from ..nests import tensors_of
from ..running import ExampleInputs, run, train_once
from .base import MACS
from .graphs import TracedModule

__all__ = ["MacCounter", "count_macs"]

_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten._convolution}
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward
_NO_WORK = {"aten.empty", "aten.clone", "aten.copy_", "aten._to_copy", "aten.zeros", "aten.ones", "aten.full"}


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts MACs and output elements of every operation under the scope that is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scopes: list[str] = [""]
        self.noted: dict[int, str] = {}
        self.of_products: set[str] = set()
        self.macs: Counter[str] = Counter()
        self.activations: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        output = func(*args, **(kwargs or {}))
        scope, backward = self._place()
        macs = _macs(func._overloadpacket, args, kwargs or {}, output)
        if scope in self.of_products and func._overloadpacket is torch.ops.aten.mul:
            macs = output.numel()
        if macs is not None:
            self.macs[scope] += macs
            self.activations[scope] += 0 if backward else sum(part.numel() for part in tensors_of(output))
        elif not func.is_view and str(func._overloadpacket) not in _NO_WORK and tensors_of(output):
            self.uncounted[str(func._overloadpacket)] += 1
        return output

    def _place(self) -> tuple[str, bool]:
        """The scope of the operation, and whether it runs backward; checkpoints call modules meanwhile."""
        node = torch._C._current_autograd_node()
        if node is not None and len(self.scopes) == 1:
            return self.noted.get(node._sequence_nr(), ""), True
        self.noted.setdefault(torch._C._autograd._get_sequence_nr() - 1, self.scopes[-1])
        return self.scopes[-1], False

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Attribute what runs inside to ``name``."""
        self.scopes.append(name)
        try:
            yield
        finally:
            self.scopes.pop()

    def attach(self, model: nn.Module) -> None:
        """Open a scope for every call of every submodule."""

        def hooks(name: str) -> tuple[Any, Any]:
            def enter(*_: Any) -> None:
                if self in _get_current_dispatch_mode_stack():
                    self.scopes.append(name)
                else:
                    self.elsewhere.append(name)

            def leave(*_: Any) -> None:
                if self in _get_current_dispatch_mode_stack():
                    self.scopes.pop()

            return enter, leave

        for name, module in model.named_modules():
            enter, leave = hooks(name)
            if isinstance(module, ReducedComposition):
                self.of_products.add(name)
            if name and not isinstance(module, torch.jit.ScriptModule):  # some of those take no hooks
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave, always_call=True)  # a checkpoint stops where it can


def _macs(operation: Any, args: Any, kwargs: Any, output: Any) -> int | None:
    if operation in _CONVOLUTIONS:
        transposed = args[6]
        positions = args[0] if transposed else output
        return int(positions.numel() * prod(args[1].shape[1:]))
    if operation is _CONVOLUTION_BACKWARD:
        gradient, given, weight, wanted = args[0], args[1], args[2], args[10]
        positions = given if args[7] else gradient
        return int(positions.numel() * prod(weight.shape[1:]) * (wanted[0] + wanted[1]))
    if operation in flop_registry:
        return int(flop_registry[operation](*args, **kwargs, out_val=output)) // 2
    return None


def count_macs(model: nn.Module, example_inputs: ExampleInputs, *, training: bool = False) -> MacCounter:
    """Run a copy that may be marked: MACs by module, and in ``node.meta[MACS]`` of a graph.

    With ``training`` a forward and a backward pass in train(), and the former alone in ``node.meta``.
    """
    counter = MacCounter()
    runner = model
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            node.meta[MACS] = 0
        runner = _ByNode(model, counter)
    counter.attach(model)
    with counter:
        (train_once if training else run)(runner, example_inputs)
    if counter.elsewhere:
        names = ", ".join(sorted(set(counter.elsewhere)))
        warnings.warn(
            f"{names}: called in another thread, where nothing is counted; call them in that of the model",
            FxBasisWarning,
            stacklevel=3,
        )
    return counter


class _ByNode(nn.Module):
    """Runs a GraphModule through an Interpreter that counts each node, where its graph is what runs."""

    def __init__(self, graph_module: fx.GraphModule, counter: MacCounter) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.counter = counter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graph_module = self.graph_module
        if isinstance(graph_module, TracedModule) and not graph_module.runs_graph(args, kwargs):
            return graph_module(*args, **kwargs)
        bound = inspect.signature(graph_module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return _Interpreter(graph_module, self.counter).run(*bound.args, *bound.kwargs.values())


class _Interpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, counter: MacCounter) -> None:
        super().__init__(graph_module)
        self.counter = counter

    def fetch_attr(self, target: str) -> Any:
        """Read once, as the graph's code does: to read the weight of a form is work."""
        return operator.attrgetter(target)(self.module)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Lists and dicts that can be changed, as the graph's code makes them."""
        return _plain(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        stack = [str(path) for path, _ in n.meta.get("nn_module_stack", {}).values()]
        before = self.counter.macs.total()
        with self.counter.scope(stack[-1] if stack and n.op != "call_module" else ""):
            output = super().run_node(n)
        n.meta[MACS] = self.counter.macs.total() - before
        return output


def _plain(value: Any) -> Any:
    if isinstance(value, fx.immutable_collections.immutable_list):
        return [_plain(part) for part in value]
    if isinstance(value, fx.immutable_collections.immutable_dict):
        return {key: _plain(part) for key, part in value.items()}
    return tuple(map(_plain, value)) if type(value) is tuple else value
