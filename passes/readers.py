"""Who else uses the weight or bias of a convolution, as far as the model tells without a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..copying import memory_of
from ..forms import BasisConv2d
from ..nests import ATOMS, parts_of_object

__all__ = ["PAST", "makes_alike", "readers_in"]

PAST = "its forward is called, past the module; call the module itself to compress it"

_LIKE_THE_OTHER = ("type_as", "to", "view_as", "expand_as", "reshape_as")
_KIND = ("shape", "dtype", "device", "ndim", "size", "dim", "is_floating_point")
_OF_MODULES = frozenset(vars(nn.Module()))


def readers_in(model: nn.Module, layers: Mapping[str, nn.Conv2d | BasisConv2d]) -> dict[str, str]:
    """Without a run: for each layer whose weight or bias another module or node uses too, what that is."""
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in (*module._parameters.items(), *_held_plainly(module)):
            if parameter is not None:
                owners.setdefault(memory_of(parameter), []).append(f"{path}.{key}".lstrip("."))
    read: dict[str, str] = {}
    for name, layer in layers.items():
        inside = name and f"{name}."
        for parameter in layer.parameters():
            others = [owner for owner in owners.get(memory_of(parameter), ()) if not owner.startswith(inside)]
            if others:
                read[name] = f"its parameter is also {others[0]}"
    for node in model.graph.find_nodes(op="get_attr") if isinstance(model, fx.GraphModule) else ():
        owner, _, key = str(node.target).rpartition(".")
        users = [user for user in node.users if not _asks_for_kind(user, node)]
        if owner in layers and users:
            past = all(_is_forward(user, layers[owner]) for user in users)
            read[owner] = PAST if past else f"its {key} is also read by node {users[0].name}"
    return read


def _is_forward(user: fx.Node, conv: nn.Conv2d | BasisConv2d) -> bool:
    """Whether a node is written as by the forward of this convolution, all seven arguments in order."""
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return user.target is torch.conv2d and user.args[3:] == options


def _held_plainly(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters in plain attributes, lists and objects, such as those of a regulariser or an optimizer."""
    for key, value in vars(module).items():
        if key not in _OF_MODULES and type(value) not in ATOMS and not isinstance(value, fx.Graph):
            for parameter in _parameters_in(value, {id(module)}):
                yield f"{key} (a plain attribute)", parameter


def _parameters_in(value: Any, seen: set[int]) -> Iterator[nn.Parameter]:
    if isinstance(value, nn.Parameter):
        yield value
    elif type(value) not in ATOMS and id(value) not in seen and not isinstance(value, (Tensor, nn.Module)):
        seen.add(id(value))
        parts = value.values() if isinstance(value, Mapping) else value
        if not isinstance(value, (Mapping, list, tuple, set)):
            parts = (parts_of_object(value) or {}).values()
        for part in parts:
            yield from _parameters_in(part, seen)


def _asks_for_kind(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node takes only shape, dtype or device of another."""
    first = node in user.args[:1]
    name = user.args[1] if user.target is getattr else getattr(user.target, "__name__", user.target)
    return str(name) in _KIND or makes_alike(str(name), first)


def makes_alike(name: str, first: bool) -> bool:
    """Whether a function of this name takes only the kind of a tensor, of its first or another one."""
    return name.endswith("_like") or name.startswith("new_") or (name in _LIKE_THE_OTHER and not first)
