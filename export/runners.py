"""What is timed: one call of a model, in ONNX Runtime or in eager PyTorch, with its inputs in memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..arguments import as_path
from ..errors import ExportError, InputError
from ..nests import tensors_of
from ..running import ExampleInputs, as_arguments, describe, run, seeded
from .checking import bytes_of, feed, frozen_copy, named_inputs, named_tensors, open_session
from .exporting import export_onnx

__all__ = ["ModelOrPath", "Runner", "eager_state", "runner_of"]

ModelOrPath: TypeAlias = nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Runner:
    """The call, the runtime's name and version, and the bytes of file or of parameters and buffers."""

    call: Callable[[], Any]
    runtime: str
    size_bytes: int


def runner_of(
    entry: ModelOrPath, inputs: ExampleInputs, threads: int, runtime: str, stack: contextlib.ExitStack
) -> Runner:
    """One call of the entry on the inputs; a module is exported to a file that lasts as long as the stack.

    Raises:
        ExportError: for what is neither module nor ONNX file, or cannot be exported or loaded.
        InputError: when the inputs do not fit.
    """
    if isinstance(entry, nn.Module):
        if runtime == "eager":
            return _eager_runner(entry, inputs)
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "model.onnx")
        export_onnx(entry, inputs, path, dynamic_batch=False)
        return _session_runner(path, inputs, threads, entry)
    if not isinstance(entry, (str, os.PathLike)):
        raise ExportError(f"a {type(entry).__name__} cannot be measured; pass a module or an .onnx path")
    path = as_path(entry, ExportError)
    if runtime == "eager":
        raise ExportError(f"{path} cannot run in eager PyTorch; pass the module, or runtime='onnxruntime'")
    if not path.is_file():
        raise ExportError(f"{path} is not a file; export_onnx(model, example_inputs, path) writes one")
    return _session_runner(path, inputs, threads)


def _session_runner(
    path: Path, inputs: ExampleInputs, threads: int, model: nn.Module | None = None
) -> Runner:
    import onnxruntime

    try:
        session = open_session(path, threads)
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot load {path} ({str(error)[:200]}); write the file again with export_onnx"
        ) from error
    arrays = feed(
        session, named_inputs(model, inputs) if model is not None else _file_inputs(session, inputs)
    )

    def call() -> Any:
        return session.run(None, arrays)

    try:
        call()
    except Exception as error:
        takes = ", ".join(f"{value.name} {value.shape} {value.type}" for value in session.get_inputs())
        raise InputError(
            f"{path.name} takes {takes} and the example inputs are {describe(inputs)}; pass inputs of that "
            "shape and dtype, or export the model with these ones"
        ) from error
    return Runner(call, f"onnxruntime {onnxruntime.__version__}", _size_on_disk(path))


def _file_inputs(session: Any, inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    """Tensors under the names that a dict gives them, which must be the graph's; else numbered in order."""
    args, kwargs = as_arguments(inputs)
    if not kwargs:
        return {f"#{i}": tensor for i, tensor in enumerate(tensors_of(args))}
    named, names = named_tensors(kwargs), [value.name for value in session.get_inputs()]
    if set(named) != set(names):
        raise InputError(
            f"the ONNX graph takes {names} and the example inputs are named {list(named)}; pass a dict with "
            "these names, or a tuple in this order"
        )
    return named


def _size_on_disk(path: Path) -> int:
    """Bytes of the ONNX file and of the files that its weights lie in."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    parts = {path, *(path.parent / entry.value for entry in entries if entry.key == "location")}
    return sum(part.stat().st_size for part in parts)


@contextlib.contextmanager
def eager_state(threads: int) -> Iterator[None]:
    """Inference mode, ``threads`` CPU threads and a fixed random state; all put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), seeded():
            yield
    finally:
        torch.set_num_threads(before)


def _eager_runner(model: nn.Module, inputs: ExampleInputs) -> Runner:
    """Runs a copy that shares the parameters: what a forward caches under inference mode dies with it."""
    frozen = frozen_copy(model)
    run(frozen, inputs)
    args, kwargs = as_arguments(inputs)
    tensors = [*frozen.parameters(), *frozen.buffers()]
    devices = {t.device.type for t in [*tensors, *tensors_of(inputs)]} - {"cpu"}

    def call() -> Any:
        output = frozen(*args, **kwargs)
        if devices:
            torch.accelerator.synchronize()
        return output

    where = "".join(f" on {device}" for device in sorted(devices))
    return Runner(call, f"torch {torch.__version__} eager{where}", bytes_of(tensors))
