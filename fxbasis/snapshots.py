"""What a module holds, kept and brought back: a run may change its buffers, attributes and random states."""

from __future__ import annotations

import copy
import random
import types
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import nn

__all__ = ["Snapshot", "buffer_values"]

_MODULE_KEYS = frozenset(vars(nn.Module())) | {"forward"}
_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, types.FunctionType, torch.fx.Graph}
)


class Snapshot:
    """The buffers and plain attributes of a module and the random states, to be brought back.

    Until then the modules work on copies of their attributes, so that what is brought back was never touched.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._attributes = _lend_copies(modules)
        self._members = [(members, dict(members)) for module in modules for members in _members_of(module)]
        self._buffers = [
            (module._buffers, name, buffer, buffer.clone())
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
        for members, names in self._members:  # what a forward adds, or puts where None was
            members.clear()
            members.update(names)
        with torch.no_grad():
            for buffers, name, buffer, values in self._buffers:
                buffers[name] = buffer.copy_(values)
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


def _lend_copies(modules: list[nn.Module]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Give every module copies of its attributes; returns the attributes of each, and what they held."""
    members = [part for module in modules for held in _members_of(module) for part in held.values()]
    memo: dict[int, Any] = {id(part): part for part in (*modules, *members)}
    lent = []
    for module in modules:
        held = vars(module)
        before = {key: value for key, value in held.items() if key not in _MODULE_KEYS}
        held.update({key: _copied(value, memo) for key, value in before.items() if not _plain(value)})
        lent.append((held, before))
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
