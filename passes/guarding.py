"""A tracer that refuses what fx would record wrongly, and blames the submodule that does it."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from types import CodeType
from typing import Any, NoReturn, cast

import torch
from torch import fx, nn
from torch.fx.proxy import ParameterProxy
from torch.utils._python_dispatch import TorchDispatchMode

from ..carrying import has_hooks
from ..contexts import open_contexts
from ..nests import tensors_of
from .blaming import blamed_on, caller, is_the_models
from .graphs import ObstacleError

__all__ = ["ContextError", "GuardedTracer", "Mode"]

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
        self.asked: set[str] = set()
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
            reason = f"it compares {attribute.attr} of a value by 'is', which a graph keeps ({caller()})"
            self.attributes.append((attribute, ObstacleError(reason, self.scope.module_path)))

    def text_of(self, node: fx.Node) -> str:
        """A text in place of the value's, whose way is followed: only an assert's message may have it."""
        text = f"<{node.name}, text {len(self.texts)}>"
        reason = f"it needs the text of a value that is known only at run time ({caller()})"
        self.texts[text] = ObstacleError(reason, self.scope.module_path)
        return text

    def refuse(self, reason: str) -> NoReturn:
        """Refuse to trace on; kept, since the model may catch it and go another way."""
        self.refused = self.refused or ObstacleError(f"{reason} ({caller()})", self.scope.module_path)
        raise self.refused

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module; what it computes from its own tensors beside it is refused."""
        tensors = (*root.named_parameters(), *root.named_buffers())
        held = {id(tensor): name for name, tensor in tensors}
        with _Computed(self, held), _asked(self, held):
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
                    return self.held_proxy(name, held)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def held_proxy(self, name: str, held: torch.Tensor) -> fx.Proxy:
        """A parameter or buffer as it is at run time."""
        proxy = functools.partial(_Held, self, name=name, held=held)
        return self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=proxy)

    def refuse_computed(self) -> NoReturn:
        """Refuse what is computed of parameters and buffers beside the graph."""
        self.refuse("it computes from its parameters or buffers, which a graph would not do again")

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
    """Stands for ``training`` of the module ``name``, and notes when the forward of another asks for it."""

    def __init__(self, tracer: GuardedTracer, name: str, training: bool) -> None:
        self.tracer, self.name, self.training = tracer, name, training

    def __bool__(self) -> bool:
        root = self.tracer.root
        if root.get_submodule(self.tracer.scope.module_path) is not root.get_submodule(self.name):
            self.tracer.asked.add(self.name)
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

    def __init__(self, tracer: GuardedTracer, held: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer, self.held = tracer, held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(id(tensor) in self.held for tensor in tensors_of((args, kwargs))):
            self.tracer.refuse_computed()
        return func(*args, **(kwargs or {}))


@contextmanager
def _asked(tracer: GuardedTracer, held: Mapping[int, str]) -> Iterator[None]:
    """Answer for the dtype and device of such tensors with that at run time; refuse their values."""

    def replaced(name: str) -> Any:
        own = getattr(torch._C.TensorBase, name)

        def kind(tensor: torch.Tensor) -> Any:
            path = held.get(id(tensor))
            if path is None or not is_the_models(sys._getframe(1).f_code.co_filename):
                return own.__get__(tensor)
            return getattr(tracer.held_proxy(path, tensor), name)

        def values(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return tracer.refuse_computed() if id(tensor) in held else own(tensor, *args, **kwargs)

        return property(kind) if inspect.isdatadescriptor(own) else values

    names = ("dtype", "device", "tolist", "numpy")  # of a class of C, before which that of Python comes
    for name, answer in {name: replaced(name) for name in names}.items():
        setattr(torch.Tensor, name, answer)
    try:
        yield
    finally:
        for name in names:
            delattr(torch.Tensor, name)


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
    return is_the_models(frame.f_code.co_filename)
