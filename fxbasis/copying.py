"""Deep copies of models that hold together: what a copy calls is the copy.

``copy.deepcopy`` takes functions and weak references as they are. A hook, or a forward put on an instance,
that has the model in its closure would so read the original's weights, and write into the original.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from .errors import TraceError
from .running import ATOMS, tensors_of

__all__ = ["KEEPS_PARAMETERS", "Model", "copy_model", "copy_to_run"]

KEEPS_PARAMETERS = "fxbasis_keeps_parameters"
_EMPTY = (OrderedDict, dict, set)  # each module holds a dozen of them for hooks, slow to deepcopy
Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, *, share_parameters: bool = False) -> Model:
    """A deep copy; with ``share_parameters`` only structure and buffers are copied.

    Computed tensors that modules hold (the weight that old-style weight_norm or pruning made, a cached
    output), which deepcopy refuses, are copied without their history.

    Raises:
        TraceError: when something that the model holds cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}; pass a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is a ScriptModule, which is closed; pass the nn.Module it was made of")
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
    parts = [part for module in model.modules() for part in vars(module).values() if type(part) not in ATOMS]
    memo |= {id(part): part.copy() for part in parts if type(part) in _EMPTY and not part}
    held = tensors_of([part for part in parts if id(part) not in memo])
    memo |= {id(tensor): tensor.detach().clone() for tensor in held if tensor.grad_fn is not None}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be deep-copied ({error}); take what cannot be copied "
            "(a generator, a lock, an open file) off the model first"
        ) from error
    _rebind(copied, memo)
    return copied


def copy_to_run(model: Model) -> Model:
    """A copy for a run; it shares the parameters where ``trace`` has seen that forward does not change them.

    Raises:
        TraceError: when something that the model holds cannot be copied.
    """
    return copy_model(model, share_parameters=getattr(model, KEEPS_PARAMETERS, False) is True)


def _rebind(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Turn attributes and hooks, and what lists and dicts hold, that lead to the original to the copy."""
    for module in copied.modules():
        attributes = vars(module)
        for held in (attributes, *attributes.values()):
            entries = (
                held.items() if isinstance(held, dict) else enumerate(held) if type(held) is list else ()
            )
            for key, value in list(entries):
                if type(value) in (FunctionType, weakref.ref):
                    held[key] = _rebound(value, memo)


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """What stands in the copy for a value of the original, also inside of closures and bound methods."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, memo[id(owner)]) if id(owner := value.__self__) in memo else value
    if type(value) is weakref.ref:
        return weakref.ref(memo[id(value())]) if id(value()) in memo else value
    if type(value) is not FunctionType or not value.__closure__:
        return value
    cells = tuple(CellType() for _ in value.__closure__)
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__, made.__qualname__ = value.__kwdefaults__, value.__qualname__
    made.__dict__.update(value.__dict__)
    memo[id(value)] = made  # before its cells: it may call itself
    before = [_content(cell) for cell in value.__closure__]
    after = [_rebound(content, memo) for content in before]
    if all(one is other for one, other in zip(before, after, strict=True)):
        memo[id(value)] = value
    for cell, content in zip(cells, after, strict=True):
        if content is not _EMPTY_CELL:
            cell.cell_contents = content
    return memo[id(value)]


_EMPTY_CELL = object()


def _content(cell: CellType) -> Any:
    with suppress(ValueError):
        return cell.cell_contents
    return _EMPTY_CELL
