"""``trace``: a copy of the model as one ``torch.fx.GraphModule``, proven equal; otherwise as it was.

Symbolic tracing runs the model's Python once and keeps what it saw. So a graph is accepted only if

1. tracing in train() and in eval() gives the same graph; a part without convolutions in which they
   differ (stochastic depth, functional dropout) becomes a leaf, which decides at run time;
2. no context such as ``torch.no_grad``, ``torch.autocast`` or a checkpoint was open where a node was made,
   and no random number was drawn: fx drops the one and keeps the other as a constant;
3. on the example inputs, outputs (their types too) and buffers after the run equal the original's, in
   eval() and in train().

A model that fails one of these stays Python, as a copy, with a warning that says why. Its convolutions
are then rewritten by exchanging modules, with the same form modules.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from typing import Any

from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from ..comparing import check_equal
from ..errors import FxBasisError, FxBasisWarning, InputError, LayerError
from ..forms import BasisConv2d
from ..running import ExampleInputs, as_arguments, buffers_kept, copy_model, run
from .capturing import ObstacleError, TracedModule, graph_of_both_modes, keep_constants

__all__ = ["trace", "trace_for"]

GIVEN = "fxbasis_given"
_METHODS = ("__call__", "__getattr__", "_apply", "eval", "load_state_dict", "state_dict", "train")


def trace(model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """A traced copy of the model, in the same mode, with the same ``state_dict`` keys.

    Args:
        model: any nn.Module; it is not touched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them the copy
            is proven equal on them; without them only the first two checks of this module are made.

    Returns:
        A ``torch.fx.GraphModule`` where the whole model can be traced and is proven equal; otherwise a copy
        that stays Python, with an ``FxBasisWarning`` that says why.

    Raises:
        TraceError: when the model cannot be copied.
        LayerError: when a lazy convolution has no weight yet.
        InputError: when the model fails on the example inputs.

    >>> import torch
    >>> trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8)).graph.find_nodes(
    ...     op="call_module", target="0")
    [_0]
    """
    return trace_for(model, example_inputs)


def trace_for(
    model: nn.Module, example_inputs: ExampleInputs | None = None, given: Collection[str] = ()
) -> nn.Module:
    """``trace``; without inputs, for calls that give the arguments of forward named in ``given``."""
    refuse_lazy(model)
    copied = copy_model(model)
    if isinstance(copied, (fx.GraphModule, nn.Conv2d, BasisConv2d)):
        return copied
    try:
        return _traced(copied, example_inputs, given)
    except ObstacleError as obstacle:
        reason = " ".join(str(obstacle).split())
        warnings.warn(
            f"{type(model).__name__} stays Python, its convolutions are exchanged as modules: {reason}",
            FxBasisWarning,
            stacklevel=3,
        )
        return copied


def refuse_lazy(model: nn.Module) -> None:
    """Refuse lazy modules whose weight has no shape yet."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if any(isinstance(parameter, UninitializedParameter) for parameter in module._parameters.values()):
            raise LayerError(
                f"{name} ({type(module).__name__}) has no weight yet; run one forward pass of the model first"
            )


def _traced(copied: nn.Module, example_inputs: ExampleInputs | None, given: Collection[str]) -> TracedModule:
    _check_class(copied)
    buffers = [name for name, _ in copied.named_buffers()]
    before = None if example_inputs is None else _behaviour(copied, example_inputs, buffers)
    given = _given(copied, example_inputs) or given
    graph, root = graph_of_both_modes(copied, _defaults(copied, given))
    keep_constants(graph, root, copied)
    try:
        traced = TracedModule(copied, graph, type(copied).__name__, type(copied))
    except Exception as error:  # a name that is a keyword of Python, a default that fx would flatten
        raise ObstacleError(f"its graph is no Python code: {type(error).__name__}: {error}") from error
    setattr(traced, GIVEN, tuple(given))
    if example_inputs is not None:
        _prove(before, traced, example_inputs, buffers)
    return traced


def _check_class(model: nn.Module) -> None:
    """A GraphModule has nn.Module's own methods, and attributes of its own."""
    if "forward" in model.__dict__:
        raise ObstacleError("its forward was replaced on the instance")
    own = [name for name in _METHODS if getattr(type(model), name) is not getattr(nn.Module, name)]
    if own:
        raise ObstacleError(f"its class has its own {own[0]}")
    reserved = {*vars(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}
    taken = reserved & {*vars(model), *model._modules, *model._parameters, *model._buffers}
    if taken:
        raise ObstacleError(f"its attribute {min(taken)} has another meaning in a graph")


def _behaviour(model: nn.Module, example_inputs: ExampleInputs, buffers: list[str]) -> list[Any]:
    """Output, and buffers afterwards, in eval() and in train(); None where train() does not run."""
    found: list[Any] = []
    for training in (False, True):
        with buffers_kept(model):
            try:
                output = run(model, example_inputs, training=training)
            except InputError:
                if not training:
                    raise
                found.append(None)
            else:
                found.append((output, [model.get_buffer(name).clone() for name in buffers]))
    return found


def _prove(before: Any, traced: nn.Module, example_inputs: ExampleInputs, buffers: list[str]) -> None:
    try:
        after = _behaviour(traced, example_inputs, buffers)
        for mode, expected, actual in zip(("eval()", "train()"), before, after, strict=True):
            if expected is None:
                continue
            if actual is None:
                raise ObstacleError(f"its graph does not run in {mode}")
            check_equal(expected[0], actual[0], f"its graph in {mode}", "it is kept as it is")
            check_equal(expected[1], actual[1], f"buffers after its graph in {mode}", "it is kept as it is")
    except FxBasisError as error:
        raise ObstacleError(str(error)) from error


def _given(model: nn.Module, example_inputs: ExampleInputs | None) -> list[str]:
    """Arguments of forward that the example inputs give."""
    if example_inputs is None:
        return []
    args, kwargs = as_arguments(example_inputs)
    return list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _defaults(model: nn.Module, given: Collection[str]) -> dict[str, Any]:
    """Arguments of forward that are left at their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty and name not in given
    }
