"""Values that are not known while a model is traced: what Python asks of them goes to the tracer.

``tracer`` is a ``guarding.GuardedTracer`` everywhere.
"""

from __future__ import annotations

import inspect
import operator
import sys
from typing import Any, cast

import torch
from torch import fx
from torch.fx.proxy import ParameterProxy

from .blaming import is_the_models
from .codes import asks_for_classes

__all__ = ["Attribute", "Guarded", "Held", "Mode"]

_OF_PROXIES = ("tracer", "node", "root", "attr", "_node")


class Guarded(fx.Proxy):
    """A value that is not known: what would need it is refused, also where the model catches the error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array_"):
            self._refuse("the array")
        found = Attribute(self, name)
        if inspect.isdatadescriptor(getattr(torch.Tensor, name, None)):
            cast(Any, self.tracer).note_attribute(found, sys._getframe(1))
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:  # a graph has no such step
            cast(Any, self.tracer).refuse(f"it sets {name} of a value that is known only at run time")
        super().__setattr__(name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What ``isinstance`` asks for where the type does not answer."""
        known = vars(self)
        if not ("node" in known or "root" in known) or not _asked_by_model():
            return type(self)
        return known["tracer"].class_of(known.get("node")) or self._refuse("the class")

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


def _in_place(name: str) -> Any:
    """``x += y`` as a step that changes x; fx would record ``x + y``."""

    def changed(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return changed


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(Guarded, f"__i{_name}__", _in_place(f"i{_name}"))


class Attribute(fx.proxy.Attribute, Guarded):
    """An attribute of such a value; its node is made where the graph needs it."""

    _node: fx.Node | None


class Mode:
    """Stands for ``training`` of the module ``name``, and notes when the forward of another asks for it."""

    def __init__(self, tracer: Any, name: str, training: bool) -> None:
        self.tracer, self.name, self.training = tracer, name, training

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return bool

    def asked(self) -> bool:
        """The mode, noted."""
        root = self.tracer.root
        if root.get_submodule(self.tracer.scope.module_path) is not root.get_submodule(self.name):
            self.tracer.asked.add(self.name)
        return self.training


def _as_bool(name: str) -> Any:
    return lambda mode, *others: getattr(mode.asked(), f"__{name}__")(*others)


def _computed(name: str) -> tuple[Any, Any]:
    compute = getattr(operator, f"__{name}__")
    return lambda mode, other: compute(mode.asked(), other), lambda mode, other: compute(other, mode.asked())


for _name in ("bool", "eq", "ne", "hash", "index", "int", "float", "str", "repr", "format", "invert", "neg"):
    setattr(Mode, f"__{_name}__", _as_bool(_name))
for _name in ("and", "or", "xor", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _left, _right = _computed(_name)
    setattr(Mode, f"__{_name}__", _left)
    setattr(Mode, f"__r{_name}__", _right)


class Held(Guarded, ParameterProxy):
    """A parameter or buffer, whose shape is known while tracing."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, held: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        vars(self).update(param=held, name=name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(vars(self).get("param", self)) if _asked_by_model() else type(self)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor; fx's takes no dimension."""
        return self.param.size() if dim is None else self.param.size(dim)


def _asked_by_model() -> bool:
    """Whether the code that asks is neither of torch nor of this package."""
    frame = sys._getframe(2)
    if frame.f_code.co_name == "is_tensor" and frame.f_back is not None:
        frame = frame.f_back
    return is_the_models(frame.f_code.co_filename) and asks_for_classes(frame.f_code)
