"""A GraphModule that keeps everything of the module that it was traced from.

A plain GraphModule keeps only what its nodes name, and forgets the class. ``TracedModule`` is a graph and of
the model's class at once: only ``forward`` is the graph's. Every submodule, parameter, buffer, attribute and
hook stays, in the original order, and so do methods, properties and ``isinstance``: a parent that asks its
child for an attribute, or calls another of its methods, gets what it got before. Where train() and eval()
take different ways, the graph is that of eval(), and in train() the forward of the model's class runs; so it
does for kinds of calls on which the graph was not proven, and after an attribute was set that its code reads.
"""

from __future__ import annotations

import functools
import sys
import types
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import fx, nn

from ..errors import TraceError, UsageError
from .attributes import Attributes, Places, places_of, unchanged
from .calls import defaults_of, kind_of_call

__all__ = ["CONSTANT", "ObstacleError", "TracedModule", "as_graph", "renew_constants"]

CONSTANT = "_tensor_constant"
"""How fx begins the names of tensors that forward makes."""
_SPECIALISED = "has been specialized to have value"
_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
_OWN = ("__call__", "__deepcopy__", "__delattr__", "__getattr__", "__getattribute__", "__setattr__")
_GROWING = ("append", "extend", "insert", "pop", "__delitem__", "__iadd__", "__imul__")


class ObstacleError(Exception):
    """Why a module stays Python; ``place`` is the submodule at fault, None where that is not known."""

    def __init__(self, reason: str, place: str | None = None) -> None:
        super().__init__(" ".join(reason.split()))
        self.place = place


class _Blank(nn.Module):
    """Stands before the model's class, so that a graph is built without running its ``__init__``."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class TracedModule(fx.GraphModule, _Blank):
    """The base of every traced class: ``TracedModule`` first, then the model's own class."""

    _eval_only: str = ""
    _calls: frozenset[str] = frozenset()
    _attributes: Attributes = MappingProxyType({})
    _places: Places
    _proven_forward: Any = None

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "TracedModule") -> None:
        super().__init__(root, graph, class_name)
        for key, value in root.__dict__.items():
            if key in _STATE or "_hook" in key or key not in self.__dict__:
                self.__dict__[key] = value
        cast(Any, type(self))._places = places_of(self, self._attributes)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave out what the model's class does for its subclasses, such as keeping a register of them."""

    def recompile(self) -> Any:
        """Make forward from the graph; for what it does not serve, that of the model's class runs."""
        code, kind = super().recompile(), cast(Any, type(self))
        python = _model_class(kind).forward
        kind._proven_forward = _in_eval(kind.forward, python) if self._eval_only else kind.forward
        kind.forward = _where_proven(kind._proven_forward, python)
        kind._places = places_of(self, self._attributes)
        return code

    def _is_as_traced(self) -> bool:
        """Whether its attributes are those that the graph kept, and its parts those of the last pass."""
        return unchanged(cast(Any, type(self))._places)

    def runs_graph(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the graph runs for this call, or the forward of the model's class."""
        in_mode = not (self._eval_only and self.training)
        return in_mode and _is_proven(self, defaults_of(_model_class(type(self)).forward), args, kwargs)

    def serve(self, calls: Collection[str]) -> None:
        """Run the graph for these kinds of calls, the model's own forward for others; for all without any."""
        kinds = cast(Any, type(self)).__mro__
        kinds[kinds.index(TracedModule) - 1]._calls = frozenset(calls)  # which copies have too
        if calls:
            _drop_asserts(self.graph)
        self.recompile()

    def __reduce__(self) -> Any:
        if self._eval_only:
            raise TraceError(
                f"{type(self).__name__} cannot be pickled: its graph is that of eval() ({self._eval_only}); "
                "use fxbasis.save, or its state_dict"
            )
        rebuild, arguments = super().__reduce__()
        kind = _model_class(type(self))
        if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
            return rebuild, arguments  # a class that cannot be found again: a plain GraphModule
        return _restored, (kind, rebuild, arguments, self._calls, dict(self._attributes))

    def _deepcopy_init(self) -> Any:
        name = type(self).__name__

        def init(copied: TracedModule, root: nn.Module, graph: fx.Graph) -> None:
            TracedModule.__init__(copied, root, graph, name)

        return init


def _model_class(kind: type) -> Any:
    return kind.__mro__[kind.__mro__.index(_Blank) + 1]


def _restored(
    kind: type[nn.Module],
    rebuild: Any,
    arguments: tuple[Any, ...],
    calls: frozenset[str],
    attributes: Attributes,
) -> TracedModule:
    """From a pickle: the graph as fx makes it, on everything that the module held, in the model's class."""
    plain, root = rebuild(*arguments), nn.Module()
    graph = plain.graph
    vars(root).update({key: part for key, part in arguments[0].items() if not key.startswith(CONSTANT)})
    names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    made = {name: getattr(plain, name) for name in names if name.startswith(CONSTANT)}
    vars(root).update(made)  # fx has traced the graph's code, and made their copies anew
    renew_constants(graph, made)
    restored = _traced_class(kind, attributes)(root, graph, kind.__name__)
    restored.serve(calls)
    return restored


def renew_constants(graph: fx.Graph, names: Collection[str]) -> None:
    """Copy the tensors of these names at each call: forward makes them anew, and may give them away."""
    for node in graph.find_nodes(op="get_attr"):
        if node.target in names:
            with graph.inserting_after(node):
                fresh = graph.call_function(torch.clone, (node,))
            fresh.meta = dict(node.meta)
            node.replace_all_uses_with(fresh, lambda user, made=fresh: user is not made)


def _drop_asserts(graph: fx.Graph) -> None:
    """Drop what fx asserts of arguments left at their defaults: other calls do not come to the graph."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and _SPECIALISED in str(node.args[-1:]):
            (asked, *_), _ = node.args, graph.erase_node(node)
            if isinstance(asked, fx.Node) and asked.op == "call_function" and not asked.users:
                graph.erase_node(asked)


def _in_eval(graph: Any, python: Any) -> Any:
    """The forward that takes the graph in eval(), of which alone it is, and the model's own in train()."""

    @functools.wraps(graph)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (python if self.training else graph)(self, *args, **kwargs)

    return forward


def _where_proven(graph: Any, python: Any) -> Any:
    """The forward that takes the graph for proxies, and for calls and attributes as it was proven on them."""
    defaults = defaults_of(python)

    @functools.wraps(graph)
    def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:
        proxies = any(isinstance(part, fx.Proxy) for part in (*args, *kwargs.values()))
        if proxies or _is_proven(self, defaults, args, kwargs):
            return graph(self, *args, **kwargs)
        return python(self, *args, **kwargs)

    return forward


def _is_proven(traced: TracedModule, defaults: Mapping[str, Any], args: Any, kwargs: Any) -> bool:
    """Whether the graph was proven on calls of this kind, and nothing was set since (Dynamo cannot ask)."""
    known = not traced._calls or kind_of_call(defaults, args, kwargs) in traced._calls
    return known and (torch.compiler.is_dynamo_compiling() or traced._is_as_traced())


def as_graph(
    module: nn.Module,
    graph: fx.Graph,
    constants: Mapping[str, Any],
    attributes: Attributes,
    eval_only: str = "",
) -> TracedModule:
    """A graph on the submodules and tensors of ``module``, and on constants that its forward makes.

    Constants become plain attributes, which ``to`` leaves as they are, as forward would make them.
    ``attributes`` are those that the graph keeps; ``eval_only`` is why it does not serve in train().

    Raises:
        ObstacleError: when the class or the graph cannot be a GraphModule.
    """
    _check_class(module)
    vars(module).update(constants)
    try:
        return _traced_class(type(module), attributes, eval_only)(module, graph, type(module).__name__)
    except Exception as error:  # a name that is a keyword of Python, a default that fx would flatten
        raise ObstacleError(f"its graph is no Python code: {type(error).__name__}: {error}") from error
    finally:
        for key in constants:
            vars(module).pop(key, None)


def _traced_class(
    model_class: type[nn.Module], attributes: Attributes, eval_only: str = ""
) -> type[TracedModule]:
    sequential = issubclass(model_class, nn.Sequential)
    body = {name: _refusing(name) for name in _GROWING if sequential}
    body |= {"__getitem__": _part_of} if sequential else {}
    body |= {"__module__": model_class.__module__, "_eval_only": eval_only, "_attributes": attributes}
    return types.new_class(
        model_class.__name__, (TracedModule, model_class), exec_body=lambda space: space.update(body)
    )


def _refusing(name: str) -> Any:
    def refused(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise UsageError(
            f"{type(self).__name__}.{name}: a traced Sequential is fixed; change the model, not its graph"
        )

    return refused


def _part_of(self: nn.Sequential, index: slice | int) -> nn.Module:
    """A slice is a plain Sequential of the same parts: the graph is of all of them."""
    if isinstance(index, slice):
        return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
    found: nn.Module = nn.Sequential.__getitem__(self, index)
    return found


def _check_class(module: nn.Module) -> None:
    """A GraphModule has nn.Module's own methods, and attributes of its own."""
    if "forward" in module.__dict__:
        raise ObstacleError("its forward was replaced on the instance")
    own = [name for name in _OWN if getattr(type(module), name, None) is not getattr(nn.Module, name, None)]
    if own:
        raise ObstacleError(f"its class has its own {own[0]}")
    if type(type(module)) not in (type, ABCMeta):
        raise ObstacleError(f"its class has the metaclass {type(type(module)).__name__}")
    reserved = {*vars(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}
    classes = [owner for owner in type(module).__mro__ if not owner.__module__.startswith("torch.")]
    held = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    taken = {name for name in reserved & held.union(*map(vars, classes)) if not name.startswith("__")}
    if taken:
        raise ObstacleError(f"its attribute {min(taken)} has another meaning in a graph")
