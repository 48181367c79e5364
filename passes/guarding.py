"""A tracer that refuses what fx would record wrongly, and blames the submodule that does it."""

from __future__ import annotations

import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection
from itertools import chain
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from torch import fx, nn

from ..carrying import has_hooks
from ..contexts import open_contexts
from ..nests import tensors_of
from .blaming import blamed_on, caller, frames_of_module, is_the_models, model_frame
from .codes import asks_for_types, catches_at, compares_arguments, compares_by_is, compares_results
from .graphs import ObstacleError
from .patching import patched
from .proxies import Attribute, Guarded, Held, Mode

__all__ = ["ContextError", "GuardedTracer"]

_MAY_BE_NONE = ("grad", "grad_fn", "_base", "_grad", "_grad_fn")
_ANSWERING = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_MAY_BE_THE_SAME = ("to", "float", "half", "double", "bfloat16", "int", "long", "type", "contiguous")


class ContextError(ObstacleError):
    """A context that a graph would drop, in whichever mode it was seen."""


class GuardedTracer(fx.Tracer):
    """fx's tracer with Conv2d, hooked modules, ScriptModules and the given names as leaves."""

    def __init__(self, leaves: Collection[str] = ()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves
        self.held: dict[int, str] = {}
        self.contained: set[int] = set()
        self.members: dict[int, tuple[Any, ...]] = {}
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

    def note_attribute(self, attribute: Attribute, asking: FrameType) -> None:
        """Keep it where the code has an ``is``, of which a graph sees nothing: then no node comes of it."""
        frame = asking if is_the_models(asking.f_code.co_filename) else model_frame()
        if frame is not None and compares_by_is(frame.f_code, of_none=attribute.attr in _MAY_BE_NONE):
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
        tensors = (*root.named_buffers(), *root.named_parameters())
        self.held = {id(tensor): name for name, tensor in tensors}
        contained = {id(tensor) for module in root.modules() for tensor in _contained(module)}
        self.contained = contained - self.held.keys()
        self.members = {id(module): _members(module) for module in root.modules()}
        with patched(self):
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
        self._check_code()
        if any(_members(part) != self.members.get(id(part)) for part in m.modules()):
            self.refuse(f"it calls {place} with parameters or hooks that are not its own")
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

    def class_of(self, node: fx.Node | None) -> Any:
        """The class of a value at run time, where it is sure."""
        if node is None or node.op != "call_module":
            return None
        module = self.root.get_submodule(str(node.target))
        if self._stays_python(module, str(node.target)) or isinstance(module, nn.Identity):
            return None
        returned = inspect.signature(type(module).forward).return_annotation
        return torch.Tensor if returned in (torch.Tensor, "Tensor") else None

    def _check_code(self) -> None:
        """Refuse to go on in code that catches errors, or asks what a graph sees nothing of."""
        for frame in frames_of_module():
            if catches_at(frame.f_code, frame.f_lineno):
                self.refuse("it catches errors of what it computes, which a graph would not")
            if asks_for_types(frame.f_code):
                self.refuse("it needs the type() of a value that is known only at run time")
            if compares_arguments(frame.f_code):
                self.refuse("it compares an argument by 'is', which a graph keeps")

    def _check_answer(self, node: fx.Node) -> None:
        """Of an answer that the code may ask for by ``is`` a graph sees nothing: then nothing comes of it."""
        frame, method = model_frame(), str(node.target) if node.op == "call_method" else ""
        if frame is None:
            return
        if method in _MAY_BE_THE_SAME and compares_by_is(frame.f_code, of_none=False):
            self.refuse(f"it may compare what {method} gives back by 'is', which a graph keeps")
        asks = node.target in _ANSWERING or (method and not hasattr(torch.Tensor, method))
        if asks and compares_results(frame.f_code):
            reason = f"it compares the answer of {node.name!r} by 'is', which a graph keeps ({caller()})"
            self.answers.append((node, ObstacleError(reason, self.scope.module_path)))

    def _refuse_compared(self, what: str) -> None:
        """Refuse to go on where the code that asks compares what it computes by ``is``."""
        frame = model_frame()
        if frame is not None and compares_results(frame.f_code):
            self.refuse(f"it may compare {what} by 'is', which a graph keeps")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A buffer is read at each call, as parameters are; fx would keep what was computed from it."""
        if isinstance(attr_val, torch.Tensor) and id(attr_val) in self.held:
            return self.held_proxy(self.held[id(attr_val)], attr_val)
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
            raise ContextError("it opens a context (no_grad, autocast, checkpoint) that no graph keeps")
        node = super().create_node(*args, **kwargs)
        if node.op in ("call_function", "call_method"):
            self._check_code()
            self._check_answer(node)
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
        if id(a) in self.contained:
            self.refuse("it reads a tensor that is in a container, which may hold another one")
        return super().create_arg(a)


def _contained(module: nn.Module) -> list[torch.Tensor]:
    """The tensors in lists, dicts and the like that a module has."""
    registered = ("_parameters", "_buffers", "_modules")
    held = (value for key, value in vars(module).items() if key not in registered)
    return [tensor for value in held if not isinstance(value, torch.Tensor) for tensor in tensors_of(value)]


def _members(module: nn.Module) -> tuple[Any, ...]:
    """What a call of a module depends on that other code can exchange."""
    if isinstance(module, torch.jit.ScriptModule):
        return ()
    return has_hooks(module), *map(id, (*module._parameters.values(), *module._buffers.values()))
