"""Which parts of a model are graphs and which stay Python, proven.

The whole model is tried first. What cannot be a graph stays Python and its children are tried on their own,
down to the single Conv2d. Every graph found runs beside the module that it stands for, on the inputs that the
module gets in the runs of ``trials``: outputs, inputs changed in place and buffers must be equal. Only then
the module becomes its graph, in place, so that whoever holds it holds the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any, cast

import torch
from torch import fx, nn

from ..comparing import check_equal
from ..errors import FxBasisError, InputError
from ..forms import BasisConv2d
from ..nests import cloned
from ..running import COMPILED, ExampleInputs, as_arguments, become, is_compiled
from ..snapshots import Snapshot, buffer_values
from .attributes import attributes_of
from .blaming import definition_of
from .calls import defaults_of, given_arguments, kind_of_call, left_defaults, wrapped
from .capturing import capture
from .graphs import ObstacleError, TracedModule, as_graph
from .trials import run_trials, telling_parameters

__all__ = ["Part", "become_graphs", "find_parts"]


@dataclass(frozen=True)
class Part:
    """A submodule with convolutions that is one graph, or stays Python.

    Attributes:
        name: qualified; empty for the model itself.
        graph: whether it is a ``torch.fx.GraphModule``.
        reason: why it stays Python, with source file and line; of a graph, why it is that of eval() alone
            and its Python runs in train(); empty where the graph serves in both.
        given: the arguments of its forward that are inputs of the graph; the others keep their defaults.
        calls: the kinds of calls that the graph serves (``calls.kind_of_call``); for others, which leave an
            argument out or give another class of one, its Python runs. Empty without a proof: then all.
    """

    name: str
    graph: bool
    reason: str = ""
    given: tuple[str, ...] = ()
    calls: tuple[str, ...] = field(default=(), repr=False)


def find_parts(model: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Part, ...]:
    """Turn what can be a graph into one, in place; without inputs nothing is proven."""
    try:
        with telling_parameters(model):
            return _found_parts(model, example_inputs)
    except InputError:  # on the inputs, or on these parameters
        return _found_parts(model, example_inputs)


def _found_parts(model: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Part, ...]:
    search = _Search(model, example_inputs)
    expected = None
    waiting = [("", model)]
    while waiting:
        captured = search.captured(waiting)
        if example_inputs is None:
            failures: dict[str, str] = {}
        else:
            failures, outputs = _prove(model, example_inputs, captured)
            expected = expected or outputs
        waiting = [child for name in failures for child in search.stays(name, failures[name])]
        for name in captured.keys() - failures:
            search.proven[name] = captured[name]
            calls = tuple(sorted(captured[name][1]._calls))
            search.parts[name] = replace(search.parts[name], calls=calls)
    _install(model, search, example_inputs, expected)
    return tuple(search.parts[name] for name in _names(model) if name in search.parts)


def become_graphs(model: nn.Module, parts: Iterable[Part]) -> tuple[Part, ...]:
    """Turn these parts into graphs again, as a trace with inputs found them; returns them.

    Raises:
        ObstacleError: when one of them cannot be a graph here.
    """
    found = []
    for part in parts:
        module = model.get_submodule(part.name)
        if isinstance(module, nn.Conv2d):
            raise ObstacleError(f"{part.name or 'the model'} is a convolution, which is no graph")
        graph = None if isinstance(module, fx.GraphModule) else _graph_of(module, part.given)
        found.append((module, graph, part))
    for module, graph, part in found:
        if graph is not None:
            graph.serve(part.calls)
            _become_graph(module, graph)
    return tuple(replace(part, reason=getattr(module, "_eval_only", "")) for module, _, part in found)


class _Search:
    """What was found so far: parts by name, and the graphs that are proven."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs | None) -> None:
        self.model = model
        self.inputs = inputs
        self.given: dict[int, list[str]] | None = None
        self.parts: dict[str, Part] = {}
        self.proven: dict[str, tuple[nn.Module, TracedModule]] = {}
        self.seen: set[int] = set()

    def captured(self, waiting: list[tuple[str, nn.Module]]) -> dict[str, tuple[nn.Module, TracedModule]]:
        """The graphs of the waiting modules, or of their children where they have none."""
        found: dict[str, tuple[nn.Module, TracedModule]] = {}
        waiting = list(waiting)
        while waiting:
            name, module = waiting.pop(0)
            try:
                given = self._arguments(name, module)
                traced = _graph_of(module, given)
            except ObstacleError as obstacle:
                waiting += self.stays(name, str(obstacle))
                continue
            found[name] = (module, traced)
            self.parts[name] = Part(name, True, traced._eval_only, tuple(given))
            for node in traced.graph.find_nodes(op="call_module"):  # leaves: what stays Python, or has hooks
                waiting += self._new([f"{name}.{node.target}".lstrip(".")])
        return found

    def stays(self, name: str, reason: str) -> list[tuple[str, nn.Module]]:
        """Note that a module stays Python; returns its children, to be tried."""
        module = self.model.get_submodule(name)
        self.parts.pop(name, None)
        if reason != _NOT_CALLED:
            self.parts[name] = Part(name, False, reason)
        if type(module).__getattr__ is not nn.Module.__getattr__ and not is_compiled(module):
            return []  # it may answer for a part of it, also for what only a graph has
        return self._new(_children(name, module))

    def _new(self, names: Iterable[str]) -> list[tuple[str, nn.Module]]:
        """Those of the named submodules that hold convolutions and were not tried yet."""
        found: list[tuple[str, nn.Module]] = []
        for name in names:
            module = self.model.get_submodule(name)
            if id(module) in self.seen or not _holds_convs(module) or isinstance(module, _SINGLE):
                continue
            self.seen.add(id(module))
            if isinstance(module, fx.GraphModule):
                self.parts[name] = Part(name, True)
            elif type(module).forward is nn.Module.forward:  # a ModuleList is never called
                found += self._new(_children(name, module))
            else:
                found.append((name, module))
        return found

    def _arguments(self, name: str, module: nn.Module) -> Collection[str]:
        """The arguments that calls of the module give; refuses what is not called, or not to be traced."""
        if is_compiled(module):
            raise ObstacleError("torch.compile made it, and runs the module in it")
        if not callable(type(module).forward):
            raise ObstacleError("its forward is no method of its class, but made at each call")
        if self.inputs is None:
            if name and left_defaults(module, ()):
                raise ObstacleError("which of its arguments are given is unknown; pass example inputs")
            return ()
        if not name:
            args, kwargs = as_arguments(self.inputs)
            return given_arguments(module, args, kwargs)
        self.given = _given_arguments(self.model, self.inputs) if self.given is None else self.given
        if id(module) not in self.given:
            raise ObstacleError(_NOT_CALLED)
        return self.given[id(module)]


_NOT_CALLED = "it is not called itself"
_SINGLE = (nn.Conv2d, BasisConv2d, torch.jit.ScriptModule)


def _children(name: str, module: nn.Module) -> Iterator[str]:
    if is_compiled(module):  # a GraphModule directly in it would break its deepcopy
        name, module = f"{name}.{COMPILED}".lstrip("."), module.get_submodule(COMPILED)
    return (f"{name}.{key}".lstrip(".") for key, _ in module.named_children())


def _holds_convs(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def _names(model: nn.Module) -> Iterator[str]:
    return (name for name, _ in model.named_modules(remove_duplicate=False))


def _graph_of(module: nn.Module, given: Collection[str]) -> TracedModule:
    """The graph of one module, for calls that give these arguments."""
    defaults = left_defaults(module, given)
    try:
        _check_defaults(defaults)
        captured = capture(module, defaults)
        kept = attributes_of(module, captured.entered)
        return as_graph(module, captured.graph, captured.constants, kept, captured.eval_only)
    except ObstacleError as obstacle:
        line = "" if ".py:" in str(obstacle) else f" ({definition_of(module)})"
        raise ObstacleError(f"{obstacle}{line}") from obstacle


def _check_defaults(defaults: Mapping[str, Any]) -> None:
    for name, value in defaults.items():
        if isinstance(value, tuple):
            raise ObstacleError(f"the default of its argument {name} is a tuple, which torch.fx takes apart")
        if isinstance(value, (list, dict, set)):
            kind = type(value).__name__
            raise ObstacleError(f"the default of its argument {name} is a {kind}, which may change")


def _prove(
    model: nn.Module, inputs: ExampleInputs, captured: Mapping[str, tuple[nn.Module, TracedModule]]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Why each of the graphs is refused that is, and what the model itself did."""
    failures: dict[str, str] = {}
    calls: dict[str, dict[str, bool]] = {}

    def beside(name: str, module: nn.Module, traced: TracedModule) -> Any:
        defaults = defaults_of(type(module).forward)

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            known, kind = calls.setdefault(name, {}), kind_of_call(defaults, args, kwargs)
            if name in failures or known.get(kind) is False:
                return original(*args, **kwargs)
            output, reason = _compared(original, module, traced, args, kwargs)
            if reason and (not known or kind in known):
                failures[name] = f"{reason} ({definition_of(module)})"
            known[kind] = not reason
            return output

        return module, forward

    with wrapped(beside(name, *found) for name, found in captured.items()):
        outputs = run_trials(model, inputs)
    for name, (_, traced) in captured.items():
        if name in calls:
            traced.serve([kind for kind, proven in calls[name].items() if proven])
    return failures | {name: _NOT_CALLED for name in captured if name not in calls}, outputs


def _compared(
    original: Callable[..., Any], module: nn.Module, traced: TracedModule, args: Any, kwargs: Any
) -> tuple[Any, str]:
    """The original's output, and why its graph does something else; the graph leaves no trace."""
    given, named = cloned((args, kwargs))
    before = Snapshot(module.modules())
    output = original(*args, **kwargs)
    after, expected = Snapshot(module.modules(), since=before), buffer_values(module)
    before.restore()
    own = Snapshot([traced])  # whose submodules are those of the module
    traced.training = module.training
    what, remedy = f"its graph in {'train' if module.training else 'eval'}()", "it is kept as it is"
    try:
        with redirect_stderr(StringIO()):  # a GraphModule prints its code when it fails
            found = type(traced)._proven_forward(traced, *given, **named)
        check_equal((output, args, kwargs), (found, given, named), what, remedy)
        buffers = buffer_values(traced)
        check_equal(expected, {name: buffers[name] for name in expected}, f"buffers after {what}", remedy)
    except FxBasisError as error:
        return output, str(error)
    except Exception as error:
        return output, f"{what} fails: {type(error).__name__}: {error}"
    finally:
        own.restore()
        after.restore()
    return output, ""


def _given_arguments(model: nn.Module, inputs: ExampleInputs) -> dict[int, list[str]]:
    """For each module that is called with convolutions in it: the arguments of forward that calls give."""
    found: dict[int, list[str]] = {}

    def note(module: nn.Module) -> Any:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            known = found.setdefault(id(module), [])
            known += [name for name in given_arguments(module, args, kwargs) if name not in known]
            return original(*args, **kwargs)

        return module, forward

    held = [module for module in model.modules() if _holds_convs(module) and not isinstance(module, _SINGLE)]
    with wrapped(note(module) for module in held):
        run_trials(model, inputs, example_only=True)
    return found


def _become_graph(module: nn.Module, traced: TracedModule) -> None:
    traced.training = module.training
    become(module, traced)
    traced.graph.owning_module = cast(fx.GraphModule, module)


def _install(
    model: nn.Module, search: _Search, inputs: ExampleInputs | None, expected: dict[str, Any] | None
) -> None:
    """Put the graphs into the model; where it is no graph itself, prove it again as a whole."""
    kept = {name: (module.__class__, module.__dict__) for name, (module, _) in search.proven.items()}
    for module, traced in search.proven.values():
        _become_graph(module, traced)
    if inputs is None or set(search.proven) <= {""}:
        return
    reason = _changed_as_a_whole(model, inputs, expected or {})
    if not reason:
        return
    for name, (module, _) in search.proven.items():  # its Python looks into its parts: which of them?
        module.__class__, module.__dict__ = kept[name]
    for name, (module, traced) in search.proven.items():
        _become_graph(module, traced)
        reason = _changed_as_a_whole(model, inputs, expected or {})
        if reason:
            module.__class__, module.__dict__ = kept[name]
            search.parts[name] = Part(name, False, f"as a graph it changes the model around it: {reason}")


def _changed_as_a_whole(model: nn.Module, inputs: ExampleInputs, expected: dict[str, Any]) -> str:
    try:
        check_equal(expected, run_trials(model, inputs), "the model with its graphs", "they are kept apart")
    except FxBasisError as error:
        return str(error)
    return ""
