"""Symbolic tracing that notices what fx would change in silence.

Symbolic tracing runs the model's Python once and keeps what it saw. Here it is run in train() and in eval(),
on copies. A submodule becomes a *leaf*, which stays Python and decides at run time, when in its own forward

- fx fails (control flow on a value, ``len``, ``int``, iteration),
- a context such as ``torch.no_grad``, ``torch.autocast`` or a checkpoint is open, which a graph drops,
- a random number is drawn, which a graph keeps as a constant,
- an attribute of the module is set, which a graph does not do again,
- train() and eval() do different things.

With one submodule all others of its class become leaves, so that a deep model is not traced once for each.
When this happens in the forward of the traced module itself, there is no graph: ``ObstacleError``. When it
happens there in train() alone, the graph is that of eval(), and in train() the module's Python is to run.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.proxy import ParameterProxy

from ..forms import has_hooks
from ..running import copy_model, seeded
from .graphs import ObstacleError

_REGISTERED = ("_parameters", "_buffers", "_modules")

__all__ = ["Capture", "capture", "definition_of"]


class ContextError(ObstacleError):
    """A context that a graph would drop, in whichever mode it was seen."""


@dataclass(frozen=True)
class Capture:
    """The graph, the copy that was traced, and why the graph is that of eval() alone; empty if it is not."""

    graph: fx.Graph
    root: nn.Module
    eval_only: str = ""


def capture(model: nn.Module, defaults: Mapping[str, Any]) -> Capture:
    """Trace a module symbolically; ``defaults`` are arguments of forward with the value that they keep.

    Raises:
        ObstacleError: when the module's own forward cannot be a graph.
    """
    leaves: set[str] = set()
    while True:
        graph = None
        try:
            graph, root = _symbolic(model, leaves, defaults, training=False)
            other, other_root = _symbolic(model, leaves, defaults, training=True)
            _check_same(graph, other)
            _check_constants(graph, root, other_root)
            return Capture(graph, root)
        except ObstacleError as obstacle:
            if obstacle.place and obstacle.place not in leaves:
                leaves.update(_alike(model, obstacle.place))
            elif graph is not None and not isinstance(obstacle, ContextError):
                return Capture(graph, root, str(obstacle))
            else:
                raise


def _alike(model: nn.Module, place: str) -> list[str]:
    """The names of all submodules of the same class; for a class of torch, such as Sequential, of one."""
    kind = type(model.get_submodule(place))
    if kind.__module__.startswith("torch."):
        return [place]
    return [
        name for name, module in model.named_modules(remove_duplicate=False) if name and type(module) is kind
    ]


class _Tracer(fx.Tracer):
    """fx's tracer with Conv2d, hooked modules, ScriptModules and the given names as leaves."""

    def __init__(self, leaves: Collection[str] = ()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves
        self.context = _open_contexts()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or isinstance(m, (nn.Conv2d, torch.jit.ScriptModule)):
            return True
        return has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        place = self.path_of_module(m)
        if self.is_leaf_module(m, place):
            return super().call_module(m, forward, args, kwargs)
        with _blamed_on(place):
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A buffer is read at each call, as parameters are; fx would keep what was computed from it."""
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            for name, buffer in self.root.named_buffers():
                if buffer is attr_val:
                    proxy = functools.partial(_BufferProxy, self, name=name, buffer=buffer)
                    return self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=proxy)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _open_contexts() != self.context:
            raise ContextError(
                "it opens a context (no_grad, autocast, checkpoint) that a graph does not keep"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # fx would make it a dict
            items = [self.create_arg((key, value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)


class _BufferProxy(ParameterProxy):
    """A buffer whose shape is known while tracing, as ParameterProxy does it for parameters."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, buffer: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param = buffer  # type: ignore[assignment]
        self.name = name


@contextmanager
def _blamed_on(place: str) -> Iterator[None]:
    """What goes wrong inside is an obstacle in the submodule ``place``, unless it names another."""
    before = _random_state()
    try:
        yield
    except ObstacleError as obstacle:
        if obstacle.place is None:
            raise type(obstacle)(f"{obstacle} ({_source_of(obstacle)})", place) from obstacle
        raise
    except Exception as error:
        said = str(error).partition(". ")[0]  # fx goes on with general advice
        raise ObstacleError(f"{type(error).__name__}: {said} ({_source_of(error)})", place) from error
    if _random_state() != before:
        raise ObstacleError("it draws random numbers that a graph would keep as constants", place)


def _symbolic(
    model: nn.Module, leaves: Collection[str], defaults: Mapping[str, Any], *, training: bool
) -> tuple[fx.Graph, nn.Module]:
    """The graph, and the copy that it was made from."""
    root = copy_model(model, share_parameters=True)
    for module in root.modules():
        module.training = training
    own = {name: m for name, m in root.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    before = {name: _attributes(module) for name, module in own.items()}
    with seeded(1), _contexts(training=training), _blamed_on(""):
        graph = _Tracer(leaves).trace(root, concrete_args=dict(defaults) or None)
    constants = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for name, module in own.items():
        changed = _changed(before[name], _attributes(module)) - (constants - set(before[name]))
        if changed:
            raise ObstacleError(f"it sets its attribute {min(changed)}, which a graph would not", name)
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target).rpartition("_")[0]
        node.target = name if name in defaults else node.target
    return graph, root


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What the module holds: tensors and modules themselves; of lists, dicts and objects what is in them."""
    held = {key: _shallow(value) for key, value in vars(module).items() if key not in _REGISTERED}
    return held | {key: part for name in _REGISTERED for key, part in vars(module)[name].items()}


def _shallow(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, set)):
        return list(value)
    plain = hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, nn.Module, type))
    return value if callable(value) or not plain else dict(vars(value))


def _changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {key for key, value in after.items() if key not in before or not _same(before[key], value)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and _same(list(one.values()), list(other.values()))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, (int, float, str)) and one == other)


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


def _source_of(error: BaseException) -> str:
    """File and line of the innermost frame outside of torch and of this package."""
    place, frame = "unknown line", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith("<") and file != __file__:
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def definition_of(module: nn.Module) -> str:
    """File and line where the module's forward is defined."""
    try:
        code = inspect.unwrap(type(module).forward).__code__
    except AttributeError:
        return "unknown line"
    return f"{code.co_filename}:{code.co_firstlineno}"


def _check_same(graph: fx.Graph, other: fx.Graph) -> None:
    """Refuse graphs that differ, naming the first submodule whose own nodes do."""
    reason = "train() and eval() take different ways"
    one, two = _by_owner(graph), _by_owner(other)
    for place in sorted({*one, *two}, reverse=True):  # the traced module itself, "", last
        for a, b in zip_longest(one.get(place, ()), two.get(place, ())):
            if a is None or b is None or (a.op, a.target) != (b.op, b.target):
                raise ObstacleError(f"{reason}, first at {(a or b).name!r}", place)
    for a, b in zip(graph.nodes, other.nodes, strict=True):
        if (a.op, a.target, str(a.args), str(a.kwargs)) != (b.op, b.target, str(b.args), str(b.kwargs)):
            raise ObstacleError(f"{reason}, first at {a.name!r}", _owner(a))


def _by_owner(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    owned: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        owned.setdefault(_owner(node), []).append(node)
    return owned


def _owner(node: fx.Node) -> str:
    """The submodule whose forward made the node; empty for the traced module itself."""
    stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module" and stack and stack[-1] == node.target:
        stack.pop()
    return stack[-1] if stack else ""


def _check_constants(graph: fx.Graph, root: nn.Module, other: nn.Module) -> None:
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        one, two = (part.__dict__.get(name) for part in (root, other))
        if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
            continue
        if one.shape != two.shape or not bool(((one == two) | (one != one)).all()):
            raise ObstacleError(f"train() and eval() use different constants ({name})", _owner(node))
