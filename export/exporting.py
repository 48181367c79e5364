"""Export to ONNX, and proof that the file computes what the model computes.

Two exporters are tried in turn: ``dynamo`` (torch.export), then ``torchscript`` (tracing). A file is
accepted when the ONNX checker passes it, every batch axis asked for is symbolic, and ONNX Runtime equals
eager PyTorch in eval mode on two seeded inputs that were not traced: one like the example, and one of the
opposite mean and, when the batch is dynamic, of another batch size. The difference is the largest absolute
one over the largest magnitude of that output tensor; `ONNX_TOLERANCE` bounds it (half: `fxbasis.comparing`).
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..arguments import as_path, check_flags
from ..comparing import Difference
from ..errors import ExportError, FxBasisError, FxBasisWarning, InputError, VerificationError
from ..nests import tensors_in, tensors_of
from ..running import ExampleInputs, batch_size, run, seeded
from .checking import (
    compared,
    frozen_copy,
    named_inputs,
    named_tensors,
    open_session,
    paired,
    resized,
    untraced_check,
)
from .exporters import EXPORTERS, ONNX_TOLERANCE, Exporter, Job, quiet
from .lowering import with_measured_lowerings

__all__ = ["ONNX_TOLERANCE", "OnnxFile", "export_onnx"]

OLDEST_OPSET = 7
"""The oldest ONNX operator set that PyTorch writes and ONNX Runtime reads."""


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """A checked ONNX file.

    ``size_bytes`` covers all files of the model; ``opset`` is the one written in the file; ``difference`` is
    the worst one found between ONNX Runtime and eager PyTorch over ``checked_batches``.
    """

    path: Path
    size_bytes: int
    exporter: Exporter
    opset: int
    dynamic_batch: bool
    difference: Difference
    tolerance: float
    checked_batches: tuple[int, ...]

    def __str__(self) -> str:
        batches = " and ".join(map(str, self.checked_batches))
        return (
            f"{self.path}: {self.size_bytes / 1e6:.2f} MB, opset {self.opset}, {self.exporter} exporter, "
            f"{'dynamic' if self.dynamic_batch else 'static'} batch; ONNX Runtime differs from eager by "
            f"{self.difference.relative:.1e} (tolerance {self.tolerance:.0e}) on batches of {batches}"
        )


def export_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
) -> OnnxFile:
    """Write ``model``, as it is in eval mode, to an ONNX file that was compared with it in ONNX Runtime.

    The model, its modes and buffers, and the random state stay as they are. The file is written whole or
    not at all. Its inputs carry the names of ``forward``'s parameters; a nest of tensors is flattened in
    order (``features_0``, ``features_1``); outputs carry the keys of a returned dict
    (``_`` is appended to a name in use), else ``output``, or ``output_0``, ``output_1``. Compositions of the
    reduced form become gathers or convolutions, each what is measured to be faster here, on one thread.

    Args:
        model: any module; only its eval-mode path for these inputs is exported.
        example_inputs: a tensor ``(N, ...)``, a tuple of positional arguments, or a dict of keyword
            arguments. What is not a tensor becomes a constant of the graph.
        path: the file to write, in a folder that exists; a file that is there is replaced.
        dynamic_batch: leave dimension 0 free in every input tensor that has the size of the first one's.
        opset: the ONNX operator set; ``None`` takes the exporter's own choice.

    Raises:
        InputError: when the model fails on the example inputs.
        ExportError: when the model cannot be copied, both exporters fail or write a file that is not equal
            to the model (both reasons are given), or the path cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export_onnx(torch.nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8), Path(folder, "conv.onnx"))
    >>> file.exporter, file.checked_batches, file.difference.relative <= ONNX_TOLERANCE
    ('dynamo', (1, 3), True)
    """
    target = _target(path)
    check_flags(dynamic_batch=dynamic_batch)
    _check_opset(opset)
    job = _prepare(model, example_inputs, dynamic_batch, opset)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            file, exporter, written_opset, found = _first_equal(job, Path(folder), target.name)
            size = _publish(file, target)
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror or error}; give a path in a folder that has room "
            "and that you may write to"
        ) from error
    if exporter == "torchscript" and job.frozen:
        warnings.warn(
            f"{target}: tracing froze what Python computed from values of tensors "
            f"({', '.join(job.frozen[:3])}); inputs that would go another way there get wrong outputs",
            FxBasisWarning,
            stacklevel=2,
        )
    batches = tuple(dict.fromkeys(check.batch for check in job.checks))
    return OnnxFile(target, size, exporter, written_opset, dynamic_batch, found, job.tolerance, batches)


def _target(path: str | os.PathLike[str]) -> Path:
    target = as_path(path, ExportError)
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give a file name, such as {target / 'model.onnx'}")
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {target}: {target.parent} is not a folder; make that folder first")
    return target


def _check_opset(opset: Any) -> None:
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if opset is not None and (type(opset) is not int or not OLDEST_OPSET <= opset <= newest):
        raise ExportError(
            f"opset={opset!r} cannot be written; pass a whole number from {OLDEST_OPSET} to {newest}, or None"
        )


def _prepare(model: nn.Module, example_inputs: ExampleInputs, dynamic_batch: bool, opset: int | None) -> Job:
    size = batch_size(example_inputs)
    if not tensors_of(example_inputs) or size < 1:
        raise InputError("example_inputs hold no sample; pass tensors with a batch of at least 1")
    # Every exporter specialises a batch axis of size 1: trace with 2.
    traced = resized(example_inputs, 2) if dynamic_batch and size == 1 else example_inputs
    output = run(frozen_copy(model), example_inputs)
    _check_output(output)
    outputs = named_tensors(output if isinstance(output, Mapping) else {"output": output})
    if not outputs:
        raise ExportError("the model returns no tensor; let it return one, or a nest of them")
    other = size if not dynamic_batch else 2 if size == 3 else 3
    checks = [untraced_check(model, example_inputs, n, sign) for n, sign in ((size, 1.0), (other, -1.0))]
    inputs = named_inputs(model, traced)
    dynamic = [n for n, t in inputs.items() if dynamic_batch and t.ndim and len(t) == batch_size(traced)]
    names = [f"{name}_" if name in inputs else name for name in outputs]
    lowered = with_measured_lowerings(model, example_inputs)
    return Job(lowered, traced, frozenset(dynamic), names, checks, opset)


def _check_output(output: Any) -> None:
    """Refuse tensors in objects that the exporters do not open."""
    for leaf in pytree.tree_leaves(output):
        if tensors_in(dict(leaf) if isinstance(leaf, Mapping) else leaf) and not torch.is_tensor(leaf):
            kind = type(leaf).__name__
            raise ExportError(
                f"the model returns tensors in a {kind}, which the exporters do not open; "
                "return a tuple, list or dict, or tell a dataclass to torch.export.register_dataclass"
            )


def _first_equal(job: Job, folder: Path, name: str) -> tuple[Path, Exporter, int, Difference]:
    """The file, exporter, opset and difference of the first exporter whose file passes every check."""
    failures: dict[str, Exception] = {}
    for exporter, export in EXPORTERS.items():
        file = folder / exporter / name
        file.parent.mkdir()
        try:
            with quiet(), seeded(), torch.no_grad():
                export(job, file)
                return file, exporter, *_verified(job, file)
        except Exception as error:
            failures[exporter] = error
    reasons = "; ".join(f"{exporter}: {_brief(error)}" for exporter, error in failures.items())
    raise ExportError(
        f"{type(job.model).__name__} could not be exported to ONNX ({reasons}); {_remedy(job)}"
    ) from failures["dynamo"]


def _brief(error: BaseException) -> str:
    """One line: our own words, or the beginning of the root cause."""
    if isinstance(error, FxBasisError):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.;:')}"


def _remedy(job: Job) -> str:
    dtypes = {t.dtype for t in [*job.model.parameters(), *tensors_of(job.traced)]}
    if dtypes & {torch.float64, torch.bfloat16}:
        return "ONNX Runtime lacks kernels for float64 and bfloat16: export model.float() with float inputs"
    remedies = ["pass opset=None"] if job.opset is not None else []
    remedies += ["pass dynamic_batch=False if one batch size is enough"] if job.dynamic else []
    return ", or ".join([*remedies, "replace the code that the reasons name"])


def _publish(file: Path, target: Path) -> int:
    """Move the file, weights first, to its place; the bytes of all that was moved."""
    moved: list[Path] = []
    try:
        for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
            os.replace(part, target.with_name(part.name))
            moved.append(target.with_name(part.name))
    except OSError:
        for part in moved:
            part.unlink()
        raise
    return sum(part.stat().st_size for part in moved)


def _verified(job: Job, file: Path) -> tuple[int, Difference]:
    """The opset of the file, and the worst difference over the checks."""
    import onnx

    onnx.checker.check_model(str(file))
    proto = onnx.load(str(file), load_external_data=False)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if job.opset not in (None, opset):
        raise VerificationError(f"the file has opset {opset} instead of {job.opset}")
    ours = paired([value.name for value in proto.graph.input], list(job.checks[0].inputs))
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if ours[value.name] in job.dynamic and dims[0].HasField("dim_value"):
            raise VerificationError(f"input {value.name} has a static batch axis of {dims[0].dim_value}")
    session = open_session(file, torch.get_num_threads())
    found = [compared(session, check, job.tolerance) for check in job.checks]
    return opset, Difference(max(f.absolute for f in found), max(f.relative for f in found))
