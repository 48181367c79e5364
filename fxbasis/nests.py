"""Nests of tuples, lists, dicts and objects, as models take and give them: their tensors, copies of them."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["ATOMS", "cloned", "leaves_of", "map_tensors", "parts_of_object", "tensors_in", "tensors_of"]

ATOMS = frozenset({type(None), bool, int, float, str})


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nest of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if type(value) in ATOMS:
        return []
    if type(value) in (list, tuple, dict, OrderedDict):  # by pytree 10 us each, and runs have thousands
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for part in parts for tensor in tensors_of(part)]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def leaves_of(value: Any, inside: tuple[int, ...] = ()) -> tuple[list[Any], Any]:
    """The leaves of a nest, objects with attributes opened too, and its structure with all types."""
    leaves, spec = pytree.tree_flatten(value)
    flat: list[Any] = []
    specs: list[Any] = [spec]
    for leaf in leaves:
        parts = parts_of_object(leaf)
        if parts is None or id(leaf) in inside:
            flat.append(leaf)
            continue
        inner, inner_spec = leaves_of(parts, (*inside, id(leaf)))
        flat += inner
        specs.append((type(leaf), inner_spec))
    return flat, tuple(specs)


def parts_of_object(leaf: Any) -> dict[str, Any] | None:
    """What an output object holds; None for tensors, plain values, classes, functions and modules."""
    if isinstance(leaf, (torch.Tensor, nn.Module, type)) or callable(leaf):
        return None
    if dataclasses.is_dataclass(leaf):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    return dict(vars(leaf)) if hasattr(leaf, "__dict__") else None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nest, those in the attributes of objects too."""
    return [leaf for leaf in leaves_of(value)[0] if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same nest with ``function`` applied to every tensor in it."""
    return pytree.tree_map_only(torch.Tensor, function, value)


def cloned(value: Any) -> Any:
    """A copy of inputs: of the tensors in a nest, and of objects that hold some."""
    return pytree.tree_map(_copied, value)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.clone()
    parts = parts_of_object(leaf)
    if not parts or not tensors_of(list(parts.values())):
        return leaf
    made = copy.copy(leaf)
    for name, part in parts.items():
        object.__setattr__(made, name, cloned(part))
    return made
