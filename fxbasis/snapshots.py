"""What a module holds, kept and brought back: a run may change its buffers, attributes and random states."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.fx
from torch import nn

__all__ = ["Snapshot", "buffer_values"]

_Held: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
_MODULE_KEYS = frozenset(vars(nn.Module())) | {"forward"}
_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, types.FunctionType, torch.fx.Graph}
)


class Snapshot:
    """The buffers and plain attributes of modules and the random states, to be brought back.

    Until then the modules work on copies of their attributes, so that what is brought back was never touched.

    Args:
        modules: all that a run may change, such as ``model.modules()``.
        since: an earlier one of the same modules that is brought back before anything runs: attributes need
            no copies then, and its copies of buffers serve where these have not changed.
    """

    def __init__(self, modules: Iterable[nn.Module], since: Snapshot | None = None) -> None:
        modules = list(modules)
        self._attributes = _lend_copies(modules) if since is None else _attributes(modules)
        self._scripted = [vars(module) for module in modules if isinstance(module, torch.jit.ScriptModule)]
        members = [held for module in modules for held in (*_members_of(module), *_hooks_of(module))]
        self._members = [(held, dict(held)) for held in members if held]
        self._empty = [held for held in members if not held]  # most: a module has a dozen dicts for hooks
        known = {} if since is None else {id(buffer): values for _, _, buffer, values in since._buffers}
        self._buffers: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = [
            (module._buffers, name, buffer, _values(buffer, known.get(id(buffer))))
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Bring back attributes, every buffer, object and values, and the random states."""
        for held, before in self._attributes:
            for key in held.keys() - before.keys() - _MODULE_KEYS:
                del held[key]
            held.update(before)
        for held in self._scripted:  # which keeps the forward of what it was lent
            held.pop("forward", None)
        for held in self._empty:  # what a forward adds
            held.clear()
        for held, names in self._members:  # or puts where None was
            held.clear()
            held.update(names)
        with torch.no_grad():
            for buffers, name, buffer, values in self._buffers:
                _put_back(buffer, values)
                buffers[name] = buffer
        python, numpy, cpu = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def buffer_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the values of all buffers by name, those that are not in the state_dict too."""
    return {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}


def _members_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    if isinstance(module, torch.jit.ScriptModule):
        return ()
    return module._buffers, module._parameters, module._modules


def _values(buffer: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
    """A copy of the buffer: the known one where that still is the same."""
    return known if known is not None and _equal(buffer, known) else buffer.clone()


def _put_back(buffer: torch.Tensor, values: torch.Tensor) -> None:
    """Write the values where they changed; an expanded buffer cannot be written, nor one of another shape."""
    if buffer.is_meta or _equal(buffer, values):
        return
    if buffer.shape == values.shape and 0 not in buffer.stride():
        buffer.copy_(values)
    else:
        buffer.data = values.clone()


def _equal(buffer: torch.Tensor, values: torch.Tensor) -> bool:
    if buffer.is_meta or buffer.layout is not torch.strided:
        return False
    return (buffer.shape, buffer.dtype) == (values.shape, values.dtype) and torch.equal(buffer, values)


def _attributes(modules: Iterable[nn.Module]) -> list[_Held]:
    """The attributes of each module, and what they hold now."""
    held = (vars(module) for module in modules)
    return [(own, {key: value for key, value in own.items() if key not in _MODULE_KEYS}) for own in held]


def _hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
    return [held for key, held in vars(module).items() if "_hooks" in key and isinstance(held, dict)]


def _lend_copies(modules: list[nn.Module]) -> list[_Held]:
    """Give every module copies of its attributes; returns the attributes of each, and what they held."""
    members = [part for module in modules for held in _members_of(module) for part in held.values()]
    memo: dict[int, Any] = {id(part): part for part in (*modules, *members)}
    lent = _attributes(modules)
    for own, before in lent:
        own.update({key: _copied(value, memo) for key, value in before.items() if not _plain(value)})
    return lent


def _plain(value: Any) -> bool:
    """Whether nothing in it can be changed in place; many attributes are such, and a deep copy takes long."""
    kind = type(value)
    return kind in _PLAIN or isinstance(value, nn.Module) or (kind is tuple and {*map(type, value)} <= _PLAIN)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; of what has none, such as a list of results with gradients, a flat one; or itself."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        try:
            return copy.copy(value)
        except Exception:
            return value
