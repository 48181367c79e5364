"""Symbolic tracing that notices what fx would change in silence.

Symbolic tracing runs the model's Python once and keeps what it saw. Here it is run in several ways, on
copies: in train() and in eval(), with parts in another mode than the whole, with and without gradients and
autocast. A submodule becomes a *leaf*, which stays Python and decides at run time, when in its own forward

- fx fails (control flow on a value, ``len``, ``int``, iteration, a look-up), also where that is caught,
- a context such as ``torch.no_grad``, ``torch.autocast`` or a checkpoint is open, which a graph drops,
- a random number is drawn, or a generator made without a seed, which a graph keeps as a constant,
- an attribute of the module, of its class, or a variable of a function is set, or changed is what they hold,
  however deep: containers, arrays, iterators, generators, objects; a graph does not do that,
- the class of a value is asked for, which is not known, or ``is`` of what may be another at each call,
- an error is caught of what is computed, or parameters are exchanged, hooked or asked for their gradients,
- its own train() or eval() sets an attribute, which a graph would have read once for all,
- a tensor made from constants is changed in place, which a graph would do again at each call,
- the ways differ.

With one submodule all others of its class become leaves, so that a deep model is not traced once for each.
When this happens in the forward of the traced module itself, there is no graph: ``ObstacleError``. When it
happens there in train() alone, the graph is that of eval(), and in train() the module's Python is to run.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from ..contexts import contexts, rare_contexts
from ..copying import copy_model
from ..running import seeded
from .blaming import blamed_on
from .entropy import counted_entropy
from .graphs import CONSTANT, ObstacleError, renew_constants
from .guarding import ContextError, GuardedTracer
from .proxies import Mode
from .states import Picture

__all__ = ["Capture", "capture"]


@dataclass(frozen=True)
class _Way:
    """Modes of the traced module and of those in it, and contexts.

    Each of gradients and autocast is on and off in eval() and in train(), together and apart, so that a
    context that the model opens is not always the one that is open already. Where modes are watched, the
    modules are noted that others ask for their mode; it is changed by itself then, of one of them ``turned``.
    There inference mode and another dtype of autocast are tried, too.
    """

    training: bool
    inside: bool
    gradients: bool
    autocast: bool
    watched: bool = False
    turned: str = ""

    def mode_of(self, name: str) -> bool:
        """Whether the module of this name is in train()."""
        return (self.inside if name else self.training) is not (bool(name) and name == self.turned)

    @property
    def what(self) -> str:
        """What differs from eval() throughout."""
        if self.turned:
            return f"train() and eval() of {self.turned}"
        if self.watched:
            return "gradients, inference mode or autocast on and off, or a mode asked for by 'is',"
        return "train() and eval()"


_EVAL = _Way(False, False, gradients=True, autocast=False)
_WATCHED = _Way(False, False, gradients=False, autocast=True, watched=True)
_EVAL_AROUND_TRAIN = _Way(False, True, gradients=True, autocast=True)
_TRAIN = _Way(True, True, gradients=True, autocast=True)
_TRAIN_AROUND_EVAL = _Way(True, False, gradients=False, autocast=False)


@dataclass(frozen=True)
class Capture:
    """The graph, its constants by name, the submodules whose forward ran, and why it is of eval() alone.

    And the submodules that others asked for their mode.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    entered: frozenset[str]
    asked: frozenset[str]
    eval_only: str = ""


def capture(model: nn.Module, defaults: Mapping[str, Any]) -> Capture:
    """Trace a module symbolically; ``defaults`` are arguments of forward with the value that they keep.

    Raises:
        ObstacleError: when the module's own forward cannot be a graph.
    """
    leaves = _switching(model)
    if "" in leaves:
        raise ObstacleError("its train() or eval() sets attributes, which a graph would not read", "")
    while True:
        in_eval, subject = False, _Subject(model)
        try:
            found = subject.trace(leaves, defaults, _EVAL)
            _check_mutations(found.graph)
            watched = subject.trace(leaves, defaults, _WATCHED)
            _check_same(found, watched, _WATCHED.what)
            for way in _others(watched.asked):
                in_eval = way.training  # then those in eval() came out the same
                _check_same(found, subject.trace(leaves, defaults, way), way.what)
            break
        except ObstacleError as obstacle:
            if obstacle.place and obstacle.place not in leaves:
                leaves.update(_alike(model, obstacle.place))
            elif in_eval and not isinstance(obstacle, ContextError):
                found = replace(found, eval_only=str(obstacle))
                break
            else:
                raise
        finally:
            subject.let_go()
    constants = found.constants.items()
    renew_constants(found.graph, {name for name, value in constants if isinstance(value, torch.Tensor)})
    return found


def _others(asked: Collection[str]) -> list[_Way]:
    """The other ways, those in eval() first; each of the modules asked for its mode in the other one, too."""
    around = (_EVAL, _EVAL_AROUND_TRAIN, _TRAIN)
    turned = [replace(way, turned=name) for name in sorted(asked) for way in around]
    ways = (_EVAL_AROUND_TRAIN, _TRAIN, _TRAIN_AROUND_EVAL, *turned)
    return sorted(ways, key=lambda way: way.training)


def _alike(model: nn.Module, place: str) -> list[str]:
    """The names of all submodules of the same class; for a class of torch, such as Sequential, of one."""
    kind = type(model.get_submodule(place))
    if kind.__module__.startswith("torch."):
        return [place]
    return [
        name for name, module in model.named_modules(remove_duplicate=False) if name and type(module) is kind
    ]


def _switching(model: nn.Module) -> set[str]:
    """The names of submodules that get other attributes by a train() or eval() of somebody's own."""
    kinds = {type(module) for module in model.modules()}
    if all(kind.train is nn.Module.train and kind.eval is nn.Module.eval for kind in kinds):
        return set()
    copied = copy_model(model)  # with its own parameters, which train() may change
    own = {name: m for name, m in copied.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    try:
        copied.train()  # somebody's own may return anything
        before = Picture(own)
        copied.eval()
    except Exception:  # one that refuses to be switched does not switch
        return set()
    return {name for name, _ in before.changed()}


class _Subject:
    """A copy of the model that is traced in several ways, and has to come out of each as it went in."""

    def __init__(self, model: nn.Module) -> None:
        self.root = copy_model(model, share_parameters=True)
        named = self.root.named_modules()
        self.own = {name: m for name, m in named if not isinstance(m, torch.jit.ScriptModule)}
        self.held = set(vars(self.root))
        self.before = Picture(self.own)

    def trace(self, leaves: Collection[str], defaults: Mapping[str, Any], way: _Way) -> Capture:
        """The graph of one way."""
        tracer = GuardedTracer(leaves)
        for name, module in self.own.items():
            module.training = way.mode_of(name)
            if way.watched:
                vars(module)["training"] = Mode(tracer, name, module.training)
        around = contexts(gradients=way.gradients, autocast=way.autocast)
        rare = rare_contexts() if way.watched else nullcontext()
        with seeded(1), rare, around, counted_entropy(), warnings.catch_warnings(), blamed_on(""):
            warnings.filterwarnings("ignore", "Was not able to add assertion")  # which is dropped anyway
            graph = tracer.trace(self.root, concrete_args=dict(defaults) or None)
            if tracer.obstacle:
                raise tracer.obstacle
        constants = self._take_constants(graph)
        self._check_unchanged({"", *tracer.entered}, way)
        for node in graph.find_nodes(op="placeholder"):
            name = str(node.target).rpartition("_")[0]
            node.target = name if name in defaults else node.target
        return Capture(graph, constants, frozenset(tracer.entered), frozenset(tracer.asked))

    def let_go(self) -> None:
        """Leave the parameters to the model: tracers and copies hold each other, and would keep them."""
        for module in self.own.values():
            module._parameters.clear()

    def _check_unchanged(self, entered: set[str], way: _Way) -> None:
        """Refuse state that was set, blaming the innermost of the modules that ran and reach it."""
        for name, module in self.own.items():
            mode = module.training.training if isinstance(module.training, Mode) else module.training
            if mode is not way.mode_of(name):
                raise ObstacleError("it sets its attribute training, which a graph would not", name)
            module.training = mode
        found = dict(self.before.changed())
        for name, change in found.items():
            if name in entered or not entered & found.keys():
                raise ObstacleError(f"it {change}, which a graph would not", name)

    def _take_constants(self, graph: fx.Graph) -> dict[str, Any]:
        """What fx put on the copy for the graph, taken off again."""
        names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        made = {name for name in names - self.held if name in vars(self.root)}
        return {name: vars(self.root).pop(name) for name in made}


def _check_mutations(graph: fx.Graph) -> None:
    """Refuse a constant that is changed in place: it would be changed again at each call."""
    for node in graph.find_nodes(op="get_attr"):
        if str(node.target).startswith(CONSTANT):
            for user in node.users:
                if node is user.kwargs.get("out") or (node in user.args[:1] and _in_place(user)):
                    raise ObstacleError("it changes a tensor made from constants in place", _owner(node))


def _in_place(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    if getattr(node.target, "__module__", "") == "_operator":
        return name == "setitem" or (name.startswith("i") and hasattr(operator, f"__{name}__"))
    return name.rstrip("_") + "_" == name or node.kwargs.get("inplace") is True


def _check_same(found: Capture, other: Capture, what: str) -> None:
    """Refuse graphs that differ, naming the submodule in whose own forward they part.

    What only one of them does, the innermost module that both entered does or calls.
    """
    entered = found.entered & other.entered
    reason = f"{what} take different ways, first at"
    one, two = _by_owner(found.graph), _by_owner(other.graph)
    for place in sorted({*one} & {*two}, reverse=True):  # the traced module itself, "", last
        for a, b in zip_longest(one[place], two[place]):
            if a is None or b is None or _own_work(a) != _own_work(b):
                raise ObstacleError(f"{reason} {(a or b).name!r}", place)
    for place in sorted({*one} ^ {*two}):
        node = (one.get(place) or two[place])[0]
        around = [path for path in _stack(node) if path in entered]
        raise ObstacleError(f"{reason} {node.name!r}", around[-1] if around else "")
    for a, b in zip(found.graph.nodes, other.graph.nodes, strict=True):
        if (a.op, a.target, str(a.args), str(a.kwargs)) != (b.op, b.target, str(b.args), str(b.kwargs)):
            raise ObstacleError(f"{reason} {a.name!r}", _owner(a))
    _check_constants(found, other, what)


def _own_work(node: fx.Node) -> tuple[Any, ...]:
    """What the node does, whichever nodes it is given."""
    return node.op, node.target, str(fx.node.map_arg((node.args, node.kwargs), lambda _: None))


def _by_owner(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    owned: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        owned.setdefault(_owner(node), []).append(node)
    return owned


def _owner(node: fx.Node) -> str:
    """The submodule whose forward made the node; empty for the traced module itself."""
    stack = _stack(node)
    if node.op == "call_module" and stack and stack[-1] == node.target:
        stack.pop()
    return stack[-1] if stack else ""


def _stack(node: fx.Node) -> list[str]:
    return [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _check_constants(found: Capture, other: Capture, what: str) -> None:
    for node in found.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        one, two = found.constants.get(name), other.constants.get(name)
        if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
            continue
        if one.shape != two.shape or not bool(((one == two) | (one != one)).all()):
            raise ObstacleError(f"{what} use different constants ({name})", _owner(node))
