"""Values that are not known while a model is traced: what Python asks of them goes to the tracer.

``tracer`` is a ``guarding.GuardedTracer`` everywhere.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import torch
from torch import fx
from torch.fx.proxy import ParameterProxy

from .blaming import is_the_models

__all__ = ["Attribute", "Guarded", "Held", "Mode"]

_OF_PROXIES = ("tracer", "node", "root", "attr", "_node")


class Guarded(fx.Proxy):
    """A value that is not known: what would need it is refused, also where the model catches the error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array_"):
            self._refuse("the array")
        found = Attribute(self, name)
        if inspect.isdatadescriptor(getattr(torch.Tensor, name, None)):
            cast(Any, self.tracer).note_attribute(found, sys._getframe(1).f_code)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:  # a graph has no such step
            cast(Any, self.tracer).refuse(f"it sets {name} of a value that is known only at run time")
        super().__setattr__(name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What ``isinstance`` asks for where the type does not answer; another may come at run time."""
        known = vars(self)
        node = vars(known.get("root", self)).get("node")  # an attribute's is made late: that which it is of
        if node is not None and _asked_by_model() and known["tracer"].comes_from_python(node):
            self._refuse("the class")
        return type(self)

    def _refuse(self, what: str) -> Any:
        cast(Any, self.tracer).refuse(f"it needs {what} of a value that is known only at run time")

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
        return cast(str, cast(Any, self.tracer).text_of(self.node))

    def __format__(self, spec: str) -> str:
        return cast(str, cast(Any, self.tracer).text_of(self.node))

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self._refuse("the array")


class Attribute(fx.proxy.Attribute, Guarded):
    """An attribute of such a value; its node is made where the graph needs it."""

    _node: fx.Node | None


class Mode:
    """Stands for ``training`` of the module ``name``, and notes when the forward of another asks for it."""

    def __init__(self, tracer: Any, name: str, training: bool) -> None:
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


class Held(Guarded, ParameterProxy):
    """A parameter or buffer, whose shape is known while tracing."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, held: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        vars(self).update(param=held, name=name)


def _asked_by_model() -> bool:
    """Whether the code that asks is neither of torch nor of this package."""
    frame = sys._getframe(2)
    if frame.f_code.co_name == "is_tensor" and frame.f_back is not None:
        frame = frame.f_back
    return is_the_models(frame.f_code.co_filename)
