"""What a convolution has besides its numbers, given to what takes its place: hooks and attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

from .kernels import weight_hooks
from .recipe import LAYER

__all__ = ["carry_attributes", "carry_hooks", "has_hooks", "hooks_of"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own."""
    return any(getattr(module, name, None) for name in _HOOKS)


def hooks_of(module: nn.Module) -> list[Any]:
    """The functions that a call of the module runs beside its own."""
    return [
        hook for name in _HOOKS for hook in (getattr(module, name, None) or {}).values() if callable(hook)
    ]


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the forward and backward hooks of ``source``, which it replaces, without weight hooks.

    In the same dicts where that can be: the handles that a model keeps of its hooks lead to them.
    """
    made = weight_hooks(source)
    for name in _HOOKS:
        hooks = getattr(source, name)
        rest = {key: hook for key, hook in hooks.items() if key not in made}
        setattr(target, name, hooks if len(rest) == len(hooks) else type(hooks)(rest))
    target._is_full_backward_hook = source._is_full_backward_hook


def carry_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the attributes that somebody set on ``source`` and its class does not answer."""
    for key, value in vars(source).items():
        if key != LAYER and key not in vars(target) and not hasattr(type(target), key):
            vars(target)[key] = value
