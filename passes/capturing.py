"""Symbolic tracing that notices what fx would change in silence, and a GraphModule that keeps everything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..forms import has_hooks
from ..running import copy_model, seeded

__all__ = ["ObstacleError", "TracedModule", "graph_of_both_modes", "keep_constants"]

_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")


class ObstacleError(Exception):
    """Why a model stays Python."""


class TracedModule(fx.GraphModule):
    """A GraphModule that keeps the whole module tree of the traced model.

    A plain GraphModule keeps only what its nodes name, and containers lose their class. Here every
    submodule, parameter, buffer, plain attribute and hook stays, in the original order, so that
    ``state_dict`` keys and their order are the model's own. Other methods, properties and constants of the
    model's class still answer; they run as Python on the same submodules.
    """

    _model_class: type[nn.Module] = nn.Module

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        class_name: str = "TracedModule",
        model_class: type[nn.Module] = nn.Module,
    ) -> None:
        super().__init__(root, graph, class_name)
        type(self)._model_class = model_class  # fx gives each GraphModule a class of its own
        for key, value in root.__dict__.items():
            if key in _STATE or key.endswith("_hooks") or key not in self.__dict__:
                self.__dict__[key] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            for owner in self._model_class.__mro__:
                if name in vars(owner) and not owner.__module__.startswith("torch."):
                    value = vars(owner)[name]
                    return value.__get__(self, owner) if hasattr(value, "__get__") else value
            raise

    def _deepcopy_init(self) -> Any:
        name, model_class = type(self).__name__, self._model_class

        def init(copied: TracedModule, root: nn.Module, graph: fx.Graph) -> None:
            TracedModule.__init__(copied, root, graph, name, model_class)

        return init


class _Tracer(fx.Tracer):
    """fx's tracer with Conv2d, hooked modules and the given names as leaves."""

    def __init__(self, leaves: frozenset[str] = frozenset()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves
        self.context = _open_contexts()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or isinstance(m, (nn.Conv2d, torch.jit.ScriptModule)):
            return True
        return has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _open_contexts() != self.context:
            raise ObstacleError(
                "it opens a context (no_grad, autocast, checkpoint) that a graph does not keep"
            )
        return super().create_node(*args, **kwargs)


def _open_contexts() -> tuple[Any, ...]:
    switches = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return (*switches, torch._C._autograd._top_saved_tensors_default_hooks(True))


@contextmanager
def _contexts(*, training: bool) -> Iterator[None]:
    """Other contexts in train() than in eval(), so that no context of the model is the one already open."""
    before = _open_contexts()
    torch.set_grad_enabled(not training)
    torch.set_autocast_enabled("cpu", training)
    torch.set_autocast_enabled("cuda", training)
    try:
        yield
    finally:
        torch.set_grad_enabled(before[0])
        torch.set_autocast_enabled("cpu", before[1])
        torch.set_autocast_enabled("cuda", before[2])


def _random_state() -> tuple[Any, ...]:
    return (
        bytes(torch.get_rng_state().numpy()),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["pos"],
    )


def graph_of_both_modes(model: nn.Module, defaults: dict[str, Any]) -> tuple[fx.Graph, nn.Module]:
    """The graph that train() and eval() share, and the copy of the model it was made from."""
    leaves: set[str] = set()
    while True:
        graph, root, drew = _symbolic(model, leaves, defaults, training=False)
        other, other_root, drew_too = _symbolic(model, leaves, defaults, training=True)
        pair = _first_difference(graph, other)
        if pair is None:
            if drew or drew_too:
                raise ObstacleError("it draws random numbers that a graph would keep as constants")
            _check_constants(graph, root, other_root)
            return graph, root
        leaves.add(_part_to_keep(model, pair, leaves))


def _symbolic(
    model: nn.Module, leaves: set[str], defaults: dict[str, Any], *, training: bool
) -> tuple[fx.Graph, nn.Module, bool]:
    """The graph, the copy that it was made from, and whether tracing drew random numbers."""
    root = copy_model(model, share_parameters=True)
    for module in root.modules():
        module.training = training
    try:
        with seeded(1), _contexts(training=training):
            before = _random_state()
            graph = _Tracer(frozenset(leaves)).trace(root, concrete_args=defaults or None)
            drew = _random_state() != before
    except ObstacleError:
        raise
    except Exception as error:
        raise ObstacleError(f"{type(error).__name__}: {error} ({_source_of(error)})") from error
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target).rpartition("_")[0]
        node.target = name if name in defaults else node.target
    return graph, root, drew


def _source_of(error: BaseException) -> str:
    """File and line of the innermost frame outside of torch."""
    place, frame = "unknown line", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith("<") and file != __file__:
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def _first_difference(graph: fx.Graph, other: fx.Graph) -> tuple[fx.Node, fx.Node] | None:
    for a, b in zip(graph.nodes, other.nodes, strict=False):
        if (a.op, a.target, str(a.args), str(a.kwargs)) != (b.op, b.target, str(b.args), str(b.kwargs)):
            return a, b
    return None


def _check_constants(graph: fx.Graph, root: nn.Module, other: nn.Module) -> None:
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        one, two = (part.__dict__.get(name) for part in (root, other))
        if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
            continue
        if one.shape != two.shape or not bool(((one == two) | (one != one)).all()):
            raise ObstacleError(f"train() and eval() use different constants ({name})")


def _part_to_keep(model: nn.Module, pair: tuple[fx.Node, fx.Node], leaves: set[str]) -> str:
    """The innermost module at the first difference, if it holds no convolution."""
    for node in pair:
        stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
        name = stack[-1] if stack else ""
        if name and name not in leaves:
            part = model.get_submodule(name)
            if not any(isinstance(module, nn.Conv2d) for module in part.modules()):
                return name
    raise ObstacleError(
        f"train() and eval() take different ways, first at {pair[0].name!r} and {pair[1].name!r}"
    )


def keep_constants(graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
    """Tensors that forward makes from constants: buffers outside of the state_dict."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if "." not in name and not hasattr(model, name):
            value = getattr(root, name)
            if isinstance(value, torch.Tensor):
                model.register_buffer(name, value, persistent=False)
            else:
                setattr(model, name, value)
