"""A tracer that refuses what fx would record wrongly, and blames the submodule that does it."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from types import CodeType
from typing import Any, NoReturn, cast

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..carrying import has_hooks
from ..contexts import open_contexts
from ..nests import tensors_of
from .blaming import blamed_on, caller, is_the_models, model_frame
from .graphs import ObstacleError
from .identities import compares_by_is, compares_results
from .proxies import Attribute, Guarded, Held, Mode

__all__ = ["ContextError", "GuardedTracer"]

_MAY_BE_NONE = ("grad", "grad_fn", "_base", "_grad", "_grad_fn")
_ANSWERING = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_PART_OF = (operator.getitem, getattr, "get", "pop", "__getitem__")


class ContextError(ObstacleError):
    """A context that a graph would drop, in whichever mode it was seen."""


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
        self.attributes: list[tuple[Attribute, ObstacleError]] = []
        self.answers: list[tuple[fx.Node, ObstacleError]] = []

    @property
    def obstacle(self) -> ObstacleError | None:
        """What was refused, a text that is in no assert's message, or what only ``is`` can have asked for."""
        compared = (error for attribute, error in self.attributes if attribute._node is None)
        unread = (error for node, error in self.answers if not node.users)
        return self.refused or next(iter(self.texts.values()), None) or next(chain(compared, unread), None)

    def note_attribute(self, attribute: Attribute, code: CodeType) -> None:
        """Keep it where the code has an ``is``, of which a graph sees nothing: then no node comes of it."""
        if compares_by_is(code, of_none=attribute.attr in _MAY_BE_NONE):
            reason = f"it compares {attribute.attr} of a value by 'is', which a graph keeps ({caller()})"
            self.attributes.append((attribute, ObstacleError(reason, self.scope.module_path)))

    def _note_answer(self, node: fx.Node) -> None:
        """Keep a truth that the code may ask for by ``is``: then nothing is computed from it."""
        frame = model_frame()
        if frame is not None and compares_results(frame.f_code):
            reason = f"it compares the answer of {node.name!r} by 'is', which a graph keeps ({caller()})"
            self.answers.append((node, ObstacleError(reason, self.scope.module_path)))

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
        return Guarded(node, self)

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
            if self._stays_python(m, place):
                self._refuse_compared(f"what {place}, which stays Python, gives back")
            return super().call_module(m, forward, args, kwargs)
        self.entered.add(place)
        with blamed_on(place):
            return super().call_module(m, forward, args, kwargs)

    def _stays_python(self, module: nn.Module, place: str) -> bool:
        """Whether it is a leaf that may answer with anything."""
        scripted = isinstance(module, torch.jit.ScriptModule)
        return scripted or place in self.leaves or (has_hooks(module) and not isinstance(module, nn.Conv2d))

    def comes_from_python(self, node: fx.Node) -> bool:
        """Whether the value is an argument, what a part gives back that stays Python, or part of either."""
        while node.op in ("call_function", "call_method") and node.target in _PART_OF:
            node = node.args[0]  # type: ignore[assignment]
        if node.op != "call_module":
            return node.op == "placeholder"
        return self._stays_python(self.root.get_submodule(str(node.target)), str(node.target))

    def _refuse_compared(self, what: str) -> None:
        """Refuse to go on where the code that asks compares what it computes by ``is``."""
        frame = model_frame()
        if frame is not None and compares_results(frame.f_code):
            self.refuse(f"it may compare {what} by 'is', which a graph keeps")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A buffer is read at each call, as parameters are; fx would keep what was computed from it."""
        if isinstance(attr_val, torch.Tensor):
            for name, held in (*self.root.named_parameters(), *self.root.named_buffers()):
                if held is attr_val:
                    return self.held_proxy(name, held)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def held_proxy(self, name: str, held: torch.Tensor) -> fx.Proxy:
        """A parameter or buffer as it is at run time."""
        proxy = functools.partial(Held, self, name=name, held=held)
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
        if node.target in _ANSWERING:
            self._note_answer(node)
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
