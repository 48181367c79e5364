"""The tensors of a model in one safetensors file.

They have the names of the state_dict, those of a form the path of its module, whatever hooks make of the
state_dict; a tensor of several names stands under the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import PlanError, UsageError
from .files import write_through
from .forms import BasisConv2d
from .passes.numbering import conv_layers
from .recipe import Plan
from .running import load_values

__all__ = ["StoredState", "save_state"]


def save_state(model: nn.Module, path: Path) -> None:
    """Write the tensors of a model, whole or not at all."""
    tensors, _ = _distinct(model)
    plain = {
        key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    write_through(path, lambda temporary: save_file(plain, temporary))


class StoredState:
    """What ``save_state`` wrote.

    Raises:
        PlanError: when the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise PlanError(f"{path} is damaged ({error}); save the model again") from error

    def load_as_the_original(self, model: nn.Module, plan: Plan) -> None:
        """Load all but the forms, and these folded, as ``load_state_dict`` of the model itself does it.

        So its own hooks, conversions and extra state are those of any checkpoint.

        Raises:
            PlanError: when the model does not take them.
        """
        steps = [f"{layer.name}.{step.name}." for layer in plan.compressed for step in layer.steps]
        forms = tuple(step.lstrip(".") for step in steps)
        rest = {key: part for key, part in self.tensors.items() if not key.startswith(forms)}
        _, names = _distinct(model)
        state = rest | {key: rest[name] for key, name in names.items() if name in rest}
        state |= self._folded(model, plan)
        try:
            load_values(model, state)
        except Exception as error:  # of a hook too
            self._check_shapes(model.state_dict(keep_vars=True))
            raise PlanError(
                f"{self.path}: load_state_dict of {type(model).__name__} fails ({type(error).__name__}: "
                f"{error}); use the model that was compressed"
            ) from error

    def load_forms(self, model: nn.Module) -> None:
        """Compare names, shapes and dtypes of the rewritten model, then load the forms.

        Raises:
            PlanError: when they are those of another model.
        """
        state, _ = _distinct(model)
        missing, unknown = sorted(set(state) - set(self.tensors)), sorted(set(self.tensors) - set(state))
        if missing or unknown:
            raise PlanError(
                f"{self.path} lacks {missing[:3]} and has {unknown[:3]} beyond what {type(model).__name__} "
                "has; use the model that was compressed"
            )
        self._check_shapes(state)
        self._fill(_factors(model), type(model).__name__)

    def _folded(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """What the forms of the plan fold to, by the names of the convolutions' own weights and biases."""
        state, layers = model.state_dict(keep_vars=True), conv_layers(model)
        folded: dict[int, Tensor] = {}
        for layer in plan.compressed:
            conv = cast(nn.Conv2d, layers[layer.name])
            form = BasisConv2d.empty_like(conv, layer)
            self._fill(_of_form(layer.name, form), type(model).__name__)
            made = {"weight": form.weight, "bias": form.bias}
            folded |= {id(conv._parameters.get(key)): part for key, part in made.items() if part is not None}
        return {key: folded[id(value)] for key, value in state.items() if id(value) in folded}

    def _fill(self, factors: Mapping[str, Tensor], kind: str) -> None:
        missing = sorted(set(factors) - set(self.tensors))
        if missing:
            raise PlanError(
                f"{self.path} lacks {missing[:3]} of the compressed {kind}; use the model that was compressed"
            )
        self._check_shapes(factors)
        with torch.no_grad():
            for key, tensor in factors.items():
                tensor.copy_(self.tensors[key])

    def _check_shapes(self, state: Mapping[str, Tensor]) -> None:
        for key in (key for key in state if key in self.tensors):
            stored, own = self.tensors[key], state[key]
            if (stored.shape, stored.dtype) != (own.shape, own.dtype):
                raise PlanError(
                    f"{self.path}: {key} is {tuple(stored.shape)} {stored.dtype}, the model has "
                    f"{tuple(own.shape)} {own.dtype}; use the model that was compressed, "
                    f"in that dtype (model.to(...))"
                )


def _factors(model: nn.Module) -> dict[str, Tensor]:
    """What the forms of a model hold, by the paths of their modules."""
    found: dict[str, Tensor] = {}
    for name, form in conv_layers(model).items():
        found |= _of_form(name, form) if isinstance(form, BasisConv2d) else {}
    return found


def _of_form(name: str, form: BasisConv2d) -> dict[str, Tensor]:
    return {f"{name}.{key}".lstrip("."): tensor for key, tensor in form.state_dict(keep_vars=True).items()}


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once; and for every other name that the state_dict has for it, the one it has there."""
    factors = _factors(model)
    own = {id(tensor) for tensor in factors.values()}
    state = model.state_dict(keep_vars=True)
    rest = {key: value for key, value in state.items() if id(value) not in own and key not in factors}
    for key, value in rest.items():
        _check_storable(key, value)
    first: dict[int, str] = {}
    names = {key: first.setdefault(id(tensor), key) for key, tensor in (factors | rest).items()}
    return {key: (factors | rest)[key] for key in first.values()}, names


def _check_storable(key: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise UsageError(
            f"{key} is a {type(value).__name__}, which safetensors cannot hold; "
            "keep it in a buffer, or use torch.save"
        )
    if value.layout is not torch.strided:
        raise UsageError(
            f"{key} has the layout {value.layout}, which safetensors cannot hold; make it dense, or use "
            "torch.save"
        )
