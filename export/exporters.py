"""The two exporters of PyTorch behind one interface: a job in, a file out, and no noise on the console."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.jit._trace import TracerWarning
from torch.utils import _pytree as pytree

from ..comparing import tolerance
from ..errors import ExportError
from ..nests import tensors_of
from ..running import ExampleInputs
from .checking import Check, bound_arguments, bytes_of, frozen_copy, named_tensors

ONNX_TOLERANCE = 1e-4
"""Largest accepted relative difference between ONNX Runtime and eager PyTorch in float32."""

EXTERNAL_DATA_BYTES = 1_800_000_000
"""Above this many bytes of weights they go to ``<name>.data`` beside the file: protobuf ends at 2 GB."""

Exporter: TypeAlias = Literal["dynamo", "torchscript"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What both exporters need; ``dynamic`` names the inputs whose dimension 0 is the batch."""

    model: nn.Module
    traced: ExampleInputs
    dynamic: frozenset[str]
    output_names: list[str]
    checks: list[Check]
    opset: int | None
    frozen: list[str] = dataclasses.field(default_factory=list)

    @property
    def external(self) -> bool:
        """Whether the weights are too many for one file."""
        return bytes_of([*self.model.parameters(), *self.model.buffers()]) > EXTERNAL_DATA_BYTES

    @property
    def tolerance(self) -> float:
        """Largest accepted relative difference, by the dtypes of outputs and parameters."""
        return max(ONNX_TOLERANCE, tolerance([self.checks[0].expected, *self.model.parameters()]))


def _export_dynamo(job: Job, file: Path) -> None:
    model = frozen_copy(job.model)
    args, kwargs, _ = bound_arguments(model, job.traced)
    if args and not kwargs and isinstance(args[-1], dict):
        args = (*args, {})  # torch.onnx takes a dict in the last place for keyword arguments
    shapes = _dynamic_shapes(job, model) if job.dynamic else None
    program = torch.onnx.export(
        model,
        args,
        kwargs=kwargs,
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=job.opset,
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    _name_outputs(program.model.graph, job.output_names)
    _name_inputs(program.model.graph, list(job.checks[0].inputs))
    program.save(str(file), external_data=job.external)


def _dynamic_shapes(job: Job, model: nn.Module) -> Any:
    arguments = bound_arguments(model, job.traced)[2]
    leaves, spec = pytree.tree_flatten(arguments)
    names = iter(named_tensors(arguments))
    tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    free = [is_tensor and next(names) in job.dynamic for is_tensor in tensors]
    return pytree.tree_unflatten([{0: "batch"} if is_free else None for is_free in free], spec)


def _name_outputs(graph: Any, names: list[str]) -> None:
    """Rename the outputs, with ``_`` appended to a name in use: the exporter itself would use it twice."""
    outputs = {id(value) for value in graph.outputs}
    taken = {value.name for node in graph for value in node.outputs if id(value) not in outputs}
    taken |= {value.name for value in graph.inputs} | set(graph.initializers)
    if len(names) != len(graph.outputs):
        return
    for value, name in zip(graph.outputs, names, strict=True):
        if value.producer() is not None:
            while name in taken:
                name += "_"
            value.name = name
            taken.add(name)


def _name_inputs(graph: Any, names: list[str]) -> None:
    """Give an input that is also returned its own name back, to which the exporter appends ``_orig``."""
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    for value in graph.inputs:
        name = value.name.removesuffix("_orig")
        if value.name not in names and name in names and name not in taken:
            value.name = name


class _Flat(nn.Module):
    """The model as a function of its input tensors alone, to a tuple of tensors: what tracing can name."""

    def __init__(self, model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = pytree.tree_flatten(arguments)
        self.training = False

    def train(self, mode: bool = True) -> _Flat:
        """Nothing: the exporter would call the model's own ``train()``, which may write to its weights."""
        return self

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(tensors_of(self.model(*args, **kwargs)))


def _export_torchscript(job: Job, file: Path) -> None:
    model = frozen_copy(job.model)
    args, kwargs, arguments = bound_arguments(model, job.traced)
    named = named_tensors(arguments)
    axes = {name: {0: "batch"} for name in job.dynamic}
    for i, name in enumerate(job.output_names):
        if job.dynamic and all(c.expected[i].shape[:1] == (c.batch,) for c in job.checks):
            axes[name] = {0: "batch"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracerWarning)
        torch.onnx.export(
            _Flat(model, (args, kwargs)),
            tuple(named.values()),
            str(file),
            dynamo=False,
            input_names=list(named),
            output_names=job.output_names,
            dynamic_axes=axes,
            opset_version=job.opset,
            verbose=False,
        )
    job.frozen.extend(_frozen_values(caught))
    if job.external:
        _gather_weights(file)


def _frozen_values(caught: list[warnings.WarningMessage]) -> list[str]:
    """Places in the model where Python computed with values of tensors, which tracing keeps as they were."""
    lines = {f"{w.filename}:{w.lineno}" for w in caught if issubclass(w.category, TracerWarning)}
    return sorted(line for line in lines if "/torch/" not in line)


def _gather_weights(file: Path) -> None:
    """Rewrite the file, and the many beside it, as one file and one ``.data`` file."""
    import onnx

    proto = onnx.load(str(file))
    for part in file.parent.iterdir():
        part.unlink()
    onnx.save_model(proto, str(file), save_as_external_data=True, location=f"{file.name}.data")


EXPORTERS: dict[Exporter, Callable[[Job, Path], None]] = {
    "dynamo": _export_dynamo,
    "torchscript": _export_torchscript,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' prints, log lines and warnings; everything is put back afterwards."""
    disabled, sink = logging.root.manager.disable, io.StringIO()
    with (
        _no_standard_output(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _no_standard_output() -> Iterator[None]:
    """Hush C++ as well: a failing TorchScript export prints its whole graph, past ``sys.stdout``."""
    with contextlib.suppress(AttributeError, ValueError):  # None under pythonw, or closed
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
