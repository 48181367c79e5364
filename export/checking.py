"""Inputs that were not traced, ONNX Runtime sessions, and outputs compared with eager PyTorch's."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..comparing import Difference, difference
from ..copying import copy_to_run
from ..errors import ExportError, FxBasisWarning, InputError, TraceError, VerificationError
from ..nests import map_tensors, tensors_of
from ..running import ExampleInputs, as_arguments, batch_size, run, with_batch

MOST_THREADS = 256
"""More than this is taken for a mistake: each thread takes memory before the first run."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Inputs that were not traced, and what eager PyTorch makes of them."""

    batch: int
    inputs: dict[str, torch.Tensor]
    expected: list[torch.Tensor]


def untraced_check(model: nn.Module, example_inputs: ExampleInputs, batch: int, sign: float) -> Check:
    """A check on ``batch`` samples of other values, with a mean of that sign."""
    inputs = renewed(resized(example_inputs, batch), sign)
    try:
        output = run(frozen_copy(model), inputs)
    except InputError as error:
        raise ExportError(
            f"with other values, in a batch of {batch}, {error}; if another batch size is what fails, pass "
            "dynamic_batch=False"
        ) from error
    return Check(batch, named_inputs(model, inputs), [t.detach().cpu() for t in tensors_of(output)])


def resized(example_inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """The inputs with ``batch`` samples; tensors whose dimension 0 is not the batch stay as they are."""
    size = batch_size(example_inputs)

    def resize(tensor: torch.Tensor) -> Any:
        return with_batch(tensor, batch) if tensor.ndim and len(tensor) == size else tensor

    return cast(ExampleInputs, map_tensors(resize, example_inputs))


def renewed(example_inputs: ExampleInputs, sign: float) -> ExampleInputs:
    """Other values: seeded noise of ``sign`` times the mean, of the same deviation; integers permuted.

    A branch on the data, which tracing freezes in silence, then often goes the other way. Bools are kept.
    """
    generator = torch.Generator().manual_seed(int(sign) + 1)

    def renew(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool or tensor.numel() < 2:
            return tensor
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            return tensor.flatten()[order].reshape(tensor.shape)
        mean, deviation = float(tensor.double().mean()), float(tensor.double().std())
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return (sign * mean + (deviation or 1.0) * noise).to(tensor)

    return cast(ExampleInputs, map_tensors(renew, example_inputs))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode (``copy_to_run``), without a call of the model's own ``train()``."""
    try:
        frozen = copy_to_run(model)
    except TraceError as error:
        raise ExportError(f"cannot export: {error}") from error
    for module in frozen.modules():
        module.training = False
    return frozen


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What the elements of the tensors take.

    >>> bytes_of([torch.zeros(3), torch.zeros(2, dtype=torch.half)])
    16
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bound_arguments(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Positional and keyword arguments in the order of ``forward``'s parameters, and all of them by name."""
    args, kwargs = as_arguments(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs, {f"input_{i}": value for i, value in enumerate(args)} | kwargs
    return bound.args, bound.kwargs, dict(bound.arguments)


def named_inputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    """The input tensors by ``forward``'s parameter names, in the order of the exported graph's inputs."""
    return named_tensors(bound_arguments(model, example_inputs)[2])


def named_tensors(nest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of the nest under its path, in order.

    >>> list(named_tensors({"x": torch.zeros(1), "features": [torch.zeros(1), {"p3": torch.zeros(1)}]}))
    ['x', 'features_0', 'features_1_p3']
    """
    named: dict[str, torch.Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(nest)[0]:
        if isinstance(leaf, torch.Tensor):
            name = "_".join(str(dataclasses.astuple(cast(Any, key))[0]) for key in path)
            while name in named:
                name += "_"
            named[name] = leaf
    return named


def check_threads(threads: Any) -> None:
    """Refuse a number of threads that is none, and warn of more than there are processors."""
    if type(threads) is not int or threads < 1:  # True is an int
        raise ExportError(f"threads={threads!r} cannot be measured; pass a whole number of at least 1")
    processors = os.cpu_count() or 1
    if threads > MOST_THREADS:
        raise ExportError(
            f"threads={threads} is more than {MOST_THREADS}; this machine has {processors} processors"
        )
    if threads > processors:
        warnings.warn(
            f"threads={threads} on a machine with {processors} processors measures their competition",
            FxBasisWarning,
            stacklevel=4,
        )


def open_session(model: Path | bytes, threads: int, **entries: str) -> Any:
    """An ONNX Runtime session on the CPU: all graph optimisations, sequential, ``threads`` threads.

    Args:
        model: an ONNX file, or the bytes of one.
        threads: that work within one node.
        entries: of the session's configuration, without ``session.`` before them.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # failures are raised, so the runtime need not print them too
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feed(session: Any, named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arrays for the session's inputs: by name, or in order where the names differ.

    Raises:
        InputError: when the graph has inputs that the tensors do not fill.
    """
    pairs = paired([value.name for value in session.get_inputs()], list(named))
    return {name: named[ours].numpy(force=True) for name, ours in pairs.items()}


def paired(graph: list[str], ours: list[str]) -> dict[str, str]:
    """Our name for each input of the graph, which may lack inputs that the model does not use."""
    if set(graph) <= set(ours):
        return {name: name for name in graph}
    if len(graph) != len(ours):
        raise InputError(f"the ONNX graph takes {graph} and the inputs are {ours}; pass one tensor for each")
    return dict(zip(graph, ours, strict=True))


def compared(session: Any, check: Check, allowed: float) -> Difference:
    """The difference between the session's outputs and the expected ones, refused above ``allowed``."""
    actual = [torch.as_tensor(output) for output in session.run(None, feed(session, check.inputs))]
    wanted, got = ([(tuple(t.shape), t.dtype) for t in tensors] for tensors in (check.expected, actual))
    if wanted != got:
        raise VerificationError(f"on a batch of {check.batch} the outputs are {got} instead of {wanted}")
    found = difference(check.expected, actual)
    if not found.relative <= allowed:
        raise VerificationError(
            f"on a batch of {check.batch} the outputs differ by {found.relative:.1e} of their largest "
            f"magnitude (tolerance {allowed:.0e})"
        )
    return found
