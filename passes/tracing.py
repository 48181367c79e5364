"""``trace``: a copy of the model as ``torch.fx`` graphs, proven equal; what cannot be a graph stays Python.

Symbolic tracing runs the model's Python once and keeps what it saw. So a graph is accepted only if tracing
in train() and in eval() gives the same, nothing that fx drops or freezes was met (``capturing``), and outputs
and buffers equal the original's on the example, on another batch and image size (``parts``, ``trials``).

Where that holds of the whole model, the copy is one GraphModule. Parts of it that have no graph are called as
modules; where the model has none itself, it stays Python and its parts are treated on their own, down to the
single Conv2d. ``compress`` rewrites both with the same form modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import UninitializedParameter

from ..copying import KEEPS_PARAMETERS, check_module, copy_model
from ..errors import FxBasisWarning, LayerError, PlanError, TraceError
from ..forms import BasisConv2d
from ..running import ExampleInputs
from .blaming import definition_of
from .graphs import ObstacleError
from .parts import Part, become_graphs, find_parts

__all__ = ["Part", "parts_of", "python_in_train", "retrace_", "trace"]

PARTS = "fxbasis_parts"


def trace(model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """A traced copy of the model, in the same mode, with the same ``state_dict`` keys.

    Args:
        model: any nn.Module; it is not touched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them the copy
            is proven equal on them; without them only what tracing itself shows is checked.

    Returns:
        A ``torch.fx.GraphModule`` where the whole model can be traced, otherwise a copy whose parts are
        GraphModules where they can be. An ``FxBasisWarning`` says what stays Python; ``parts_of`` lists it.

    Raises:
        TraceError: when the model cannot be copied.
        LayerError: when a lazy convolution has no weight yet.
        InputError: when the model fails on the example inputs.

    >>> import torch
    >>> trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8)).graph.find_nodes(
    ...     op="call_module", target="0")
    [_0]
    """
    refuse_lazy(model)
    copied = copy_model(model)
    if isinstance(copied, (fx.GraphModule, nn.Conv2d, BasisConv2d)) or PARTS in vars(copied):
        return copied
    with _uncalled(model):
        parts = find_parts(copied, example_inputs)
    changed = _changed_parameters(model, copied)
    if changed:  # which graphs would not do, or at each call with what they were traced with
        copied = copy_model(model)
        parts = (Part("", False, f"its forward changes its parameter {changed[0]} ({definition_of(model)})"),)
    vars(copied)[PARTS] = parts  # past a __setattr__ of the class
    vars(copied)[KEEPS_PARAMETERS] = example_inputs is not None and not changed
    message = _message(type(model).__name__, parts)
    if message:
        warnings.warn(message, FxBasisWarning, stacklevel=2)
    return copied


def parts_of(traced: nn.Module) -> tuple[Part, ...]:
    """Which submodules of a traced or compressed model are graphs, and which stay Python and why.

    In the order of definition; of a model that is one graph, itself alone (its name is empty).

    >>> import torch
    >>> parts_of(trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8)))
    (Part(name='', graph=True, reason='', given=('input',)),)
    """
    check_module(traced)
    found: tuple[Part, ...] = vars(traced).get(PARTS, ())
    return found or (Part("", isinstance(traced, fx.GraphModule)),)


def python_in_train(traced: nn.Module) -> bool:
    """Whether any part of a model runs its Python in train(): of one that was not traced, all of it does."""
    if PARTS not in vars(traced):
        return not isinstance(traced, (fx.GraphModule, nn.Conv2d, BasisConv2d))
    return any(not part.graph or bool(part.reason) for part in vars(traced)[PARTS])


def retrace_(model: nn.Module, parts: Collection[Part]) -> None:
    """Make these parts of a copy graphs again, as ``parts_of`` gave them.

    Raises:
        PlanError: when one of them cannot be traced as it was.
    """
    refuse_lazy(model)
    try:
        vars(model)[PARTS] = become_graphs(model, parts)
    except (ObstacleError, AttributeError) as error:
        raise PlanError(
            f"{type(model).__name__} cannot be traced as it was: {error}; use the model that was compressed"
        ) from error


@contextmanager
def _uncalled(model: nn.Module) -> Iterator[None]:
    """Refuse a copy whose runs call modules of the original, which something in it still holds."""
    own = {id(module): name for name, module in model.named_modules()}
    called: list[str] = []

    def note(module: nn.Module, args: object) -> None:
        if id(module) in own:
            called.append(own[id(module)])

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
    if called:
        place = called[0] or "itself"
        raise TraceError(
            f"a deep copy of {type(model).__name__} still calls {place} of the original: "
            "something that it holds is not copied; keep modules as attributes, or in an nn.ModuleList"
        )


def refuse_lazy(model: nn.Module) -> None:
    """Refuse lazy modules whose weight has no shape yet."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if any(isinstance(parameter, UninitializedParameter) for parameter in module._parameters.values()):
            raise LayerError(
                f"{name} ({type(module).__name__}) has no weight yet; run one forward pass of the model first"
            )


def _changed_parameters(model: nn.Module, copied: nn.Module) -> list[str]:
    """The parameters that the runs of the proof, or tracing itself, changed in the copy."""
    found = dict(copied.named_parameters())
    return [
        name
        for name, parameter in model.named_parameters()
        if not (name in found and _same(parameter, found[name]))
    ]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether values, shape and what training keeps with them are the same."""
    if _kept(one) != _kept(other):
        return False
    return one.is_meta or torch.equal(one, other) or bool(((one == other) | (one != one)).all())


def _kept(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.requires_grad, len(tensor._backward_hooks or ())


def _message(kind: str, parts: tuple[Part, ...]) -> str:
    """What stays Python and why, in one line; empty when nothing does."""
    stay = [part for part in parts if not part.graph]
    if not stay:
        return ""
    graphs = [part.name for part in parts if part.graph]
    if stay[0].name:
        others = f" (and {len(stay) - 1} more parts)" if len(stay) > 1 else ""
        return f"{kind} is a graph, in which {stay[0].name} stays Python{others}: {stay[0].reason}"
    inside = (
        f"{len(graphs)} of its parts are graphs" if graphs else "its convolutions are exchanged as modules"
    )
    return f"{kind} stays Python, {inside}: {stay[0].reason}"
