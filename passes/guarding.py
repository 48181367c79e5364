"""A tracer that refuses what fx would record wrongly, and blames the submodule that does it."""

from __future__ import annotations

import dis
import functools
import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import fx, nn
from torch.fx.proxy import ParameterProxy
from torch.utils._python_dispatch import TorchDispatchMode

from ..carrying import has_hooks
from ..contexts import open_contexts
from ..errors import FxBasisError
from ..nests import tensors_of
from .entropy import entropy_drawn
from .graphs import ObstacleError

__all__ = ["ContextError", "GuardedTracer", "Mode", "blamed_on", "definition_of"]

_PACKAGE = tuple(str(Path(inspect.getfile(kind)).parent) for kind in (ObstacleError, FxBasisError))
_MAY_BE_NONE = ("grad", "grad_fn", "_base", "_grad", "_grad_fn")
_OF_PROXIES = ("tracer", "node", "root", "attr", "_node")


class ContextError(ObstacleError):
    """A context that a graph would drop, in whichever mode it was seen."""


class _Guarded(fx.Proxy):
    """A value that is not known: what would need it is refused, also where the model catches the error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array_"):
            self._refuse("the array")
        found = _Attribute(self, name)
        if inspect.isdatadescriptor(getattr(torch.Tensor, name, None)):
            cast(GuardedTracer, self.tracer).note_attribute(found, sys._getframe(1).f_code)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:  # a graph has no such step
            cast(GuardedTracer, self.tracer).refuse(
                f"it sets {name} of a value that is known only at run time"
            )
        super().__setattr__(name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What ``isinstance`` asks for where the type does not answer; of an argument another may come."""
        node = vars(self).get("node")  # an attribute has none until it is needed
        if node is not None and node.op == "placeholder" and _asked_by_model():
            self._refuse("the class")
        return type(self)

    def _refuse(self, what: str) -> Any:
        cast(GuardedTracer, self.tracer).refuse(f"it needs {what} of a value that is known only at run time")

    def __hash__(self) -> int:
        return cast(int, self._refuse("the hash"))

    def __len__(self) -> int:
        return cast(int, self._refuse("the length"))

    def __index__(self) -> int:
        return cast(int, self._refuse("the number"))

    def __int__(self) -> int:
        return cast(int, self._refuse("the number"))

    def __float__(self) -> float:
        return cast(float, self._refuse("the number"))

    def __str__(self) -> str:
        return cast(GuardedTracer, self.tracer).text_of(self.node)

    def __format__(self, spec: str) -> str:
        return cast(GuardedTracer, self.tracer).text_of(self.node)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self._refuse("the array")


class _Attribute(fx.proxy.Attribute, _Guarded):
    """An attribute of such a value; its node is made where the graph needs it."""

    _node: fx.Node | None


class GuardedTracer(fx.Tracer):
    """fx's tracer with Conv2d, hooked modules, ScriptModules and the given names as leaves."""

    def __init__(self, leaves: Collection[str] = ()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves
        self.context: tuple[Any, ...] = ()
        self.refused: ObstacleError | None = None
        self.entered: set[str] = set()
        self.texts: dict[str, ObstacleError] = {}
        self.attributes: list[tuple[_Attribute, ObstacleError]] = []

    @property
    def obstacle(self) -> ObstacleError | None:
        """What was refused, a text that is in no assert's message, or an attribute asked for by ``is``."""
        compared = (error for attribute, error in self.attributes if attribute._node is None)
        return self.refused or next(iter(self.texts.values()), None) or next(compared, None)

    def note_attribute(self, attribute: _Attribute, code: CodeType) -> None:
        """Keep it where the code has an ``is``, of which a graph sees nothing: then no node comes of it."""
        if _has_is(code, of_none=attribute.attr in _MAY_BE_NONE):
            reason = f"it compares {attribute.attr} of a value by 'is', which a graph keeps ({_caller()})"
            self.attributes.append((attribute, ObstacleError(reason, self.scope.module_path)))

    def text_of(self, node: fx.Node) -> str:
        """A text in place of the value's, whose way is followed: only an assert's message may have it."""
        text = f"<{node.name}, text {len(self.texts)}>"
        reason = f"it needs the text of a value that is known only at run time ({_caller()})"
        self.texts[text] = ObstacleError(reason, self.scope.module_path)
        return text

    def refuse(self, reason: str) -> NoReturn:
        """Refuse to trace on; kept, since the model may catch it and go another way."""
        self.refused = self.refused or ObstacleError(f"{reason} ({_caller()})", self.scope.module_path)
        raise self.refused

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module; what it computes from its own tensors beside it is refused."""
        with _Computed(self, root):
            self.context = open_contexts()
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A guarded value."""
        return _Guarded(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refused, as by fx, but for good."""
        return cast(bool, self._noted(super().to_bool, obj))

    def iter(self, obj: fx.Proxy) -> Any:
        """Refused where fx refuses, but for good."""
        return self._noted(super().iter, obj)

    def keys(self, obj: fx.Proxy) -> Any:
        """Refused where fx refuses, but for good."""
        return self._noted(super().keys, obj)

    def _noted(self, function: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        try:
            return function(obj)
        except fx.proxy.TraceError as error:
            said = str(error).partition(". ")[0]  # fx goes on with general advice
            self.refuse(f"TraceError: {said}")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves of fx, convolutions, what is hooked or scripted, and the given names."""
        if module_qualified_name in self.leaves or isinstance(m, (nn.Conv2d, torch.jit.ScriptModule)):
            return True
        return has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Enter a submodule that is no leaf; what goes wrong inside is its own."""
        place = self.path_of_module(m)
        if self.is_leaf_module(m, place):
            return super().call_module(m, forward, args, kwargs)
        self.entered.add(place)
        with blamed_on(place):
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A buffer is read at each call, as parameters are; fx would keep what was computed from it."""
        if isinstance(attr_val, torch.Tensor):
            for name, held in (*self.root.named_parameters(), *self.root.named_buffers()):
                if held is attr_val:
                    proxy = functools.partial(_Held, self, name=name, held=held)
                    return self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=proxy)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refused while a context of the model is open."""
        if open_contexts() != self.context:
            raise ContextError(
                "it opens a context (no_grad, autocast, checkpoint) that a graph does not keep"
            )
        node = super().create_node(*args, **kwargs)
        if node.target is torch._assert:
            self.texts = {text: told for text, told in self.texts.items() if text not in str(node.args[1:])}
        return node

    def create_arg(self, a: Any) -> Any:
        """An OrderedDict stays one; a mode is asked for."""
        if isinstance(a, Mode):
            return bool(a)
        if type(a) is OrderedDict:  # fx would make it a dict
            items = [self.create_arg((key, value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        return super().create_arg(a)


class Mode:
    """Stands for ``training`` of a module, for which no other may ask: a graph would keep the answer."""

    def __init__(self, tracer: GuardedTracer, module: nn.Module, training: bool) -> None:
        self.tracer, self.module, self.training = tracer, module, training

    def __bool__(self) -> bool:
        if self.tracer.root.get_submodule(self.tracer.scope.module_path) is not self.module:
            self.tracer.refuse("it asks whether a module in it is in train()")
        return self.training

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __index__(self) -> int:
        return int(bool(self))


class _Held(_Guarded, ParameterProxy):
    """A parameter or buffer, whose shape is known while tracing."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, held: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        vars(self).update(param=held, name=name)


class _Computed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses results of parameters and buffers that were reached past ``getattr``, by ``parameters()`` say.

    fx sees none of it, and would keep what was computed then as a constant.
    """

    def __init__(self, tracer: GuardedTracer, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.held = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(id(tensor) in self.held for tensor in tensors_of((args, kwargs))):
            self.tracer.refuse("it computes from its parameters or buffers, which a graph would not do again")
        return func(*args, **(kwargs or {}))


@contextmanager
def blamed_on(place: str) -> Iterator[None]:
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
    if not _same_state(before, _random_state()):
        raise ObstacleError("it draws random numbers that a graph would keep as constants", place)


def _random_state() -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Of torch, of Python and NumPy, and how much entropy was asked for, as by new generators."""
    position = np.random.get_state(legacy=False)["state"]["pos"]
    return torch.get_rng_state(), (random.getstate(), position, entropy_drawn())


def _same_state(one: tuple[torch.Tensor, Any], other: tuple[torch.Tensor, Any]) -> bool:
    return one[1] == other[1] and torch.equal(one[0], other[0])


def _source_of(error: BaseException) -> str:
    """File and line of the innermost frame outside of torch and of this package."""
    place, frame = "unknown line", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if _is_the_models(file):
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def _caller() -> str:
    """File and line of the innermost caller outside of torch and of this package, or of a module of torch."""
    frame, of_torch = cast("FrameType | None", sys._getframe(1)), ""
    while frame is not None and frame.f_code is not GuardedTracer.trace.__code__:  # whose caller is no model
        file, place = frame.f_code.co_filename, f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if _is_the_models(file):
            return place
        if "/torch/nn/" in file:
            of_torch = of_torch or place
        frame = frame.f_back
    return of_torch or "unknown line"


def _is_the_models(file: str) -> bool:
    """Whether a file is neither of torch nor of this package."""
    return "/torch/" not in file and not file.startswith(("<", *_PACKAGE))


@functools.cache
def _has_is(code: CodeType, of_none: bool) -> bool:
    """Whether the code compares something by ``is``; with None, only where ``of_none``."""
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    if of_none and any(name.endswith("_NONE") for name, _ in steps):  # a jump
        return True
    with_none = ("LOAD_CONST", None)
    return any(two[0] == "IS_OP" and (of_none or one != with_none) for one, two in pairwise(steps))


def _asked_by_model() -> bool:
    """Whether the code that asks is neither of torch nor of this package."""
    frame = sys._getframe(2)
    if frame.f_code.co_name == "is_tensor" and frame.f_back is not None:
        frame = frame.f_back
    return _is_the_models(frame.f_code.co_filename)


def definition_of(module: nn.Module) -> str:
    """File and line where the module's forward is defined."""
    try:
        code = inspect.unwrap(type(module).forward).__code__
    except AttributeError:
        return "unknown line"
    return f"{code.co_filename}:{code.co_firstlineno}"
