"""Numeric comparison of two outputs, with the tolerances that fxbasis promises.

The relative difference is the largest absolute difference over the largest magnitude of the expected
output. Tolerances: float64 1e-12, float32 1e-5, float16 5e-3, bfloat16 2e-2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .errors import VerificationError
from .nests import leaves_of

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between two outputs: ``absolute``, and ``relative`` to the largest magnitude."""

    absolute: float
    relative: float


def _tensor_difference(expected: torch.Tensor, actual: torch.Tensor, what: str) -> Difference:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise VerificationError(
            f"{what}: an output of shape {tuple(expected.shape)} {expected.dtype} became "
            f"{tuple(actual.shape)} {actual.dtype}; leave the layers of this output alone"
        )
    if expected.is_meta or actual.is_meta:
        raise VerificationError(f"{what}: the outputs are on the meta device; load the weights first")
    if expected.numel() == 0 or torch.equal(expected, actual):
        return Difference(0.0, 0.0)
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.detach().to(dtype), actual.detach().to(dtype)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = (a - b).abs().masked_fill(same, 0.0)
    if not bool(gap.isfinite().all()):
        return Difference(float("inf"), float("inf"))
    finite = a.abs().nan_to_num(posinf=0.0)
    absolute = float(gap.max())
    return Difference(absolute, absolute / max(float(finite.max()), torch.finfo(torch.float32).tiny))


def difference(expected: Any, actual: Any, what: str = "comparison") -> Difference:
    """The largest difference over all tensors of two outputs of the same structure.

    >>> difference(torch.ones(2), torch.tensor([1.0, 1.5]))
    Difference(absolute=0.5, relative=0.5)

    Raises:
        VerificationError: when containers, types, shapes or dtypes differ.
    """
    (left, left_spec), (right, right_spec) = leaves_of(expected), leaves_of(actual)
    if left_spec != right_spec:
        raise VerificationError(
            f"{what}: an output of type {type(expected).__name__} became {type(actual).__name__} "
            "or changed its structure; leave the model as it is"
        )
    worst = Difference(0.0, 0.0)
    for a, b in zip(left, right, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            found = _tensor_difference(a, b, what)
            worst = Difference(max(worst.absolute, found.absolute), max(worst.relative, found.relative))
        elif type(a) is not type(b) or (isinstance(a, (int, float, str, bool)) and a != b):
            raise VerificationError(f"{what}: the output {a!r} became {b!r}; leave the model as it is")
    return worst


def tolerance(value: Any) -> float:
    """The tolerance for the coarsest floating dtype among the tensors of ``value``."""
    leaves, _ = leaves_of(value)
    dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return max((TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=1e-5)


def check_equal(
    expected: Any, actual: Any, what: str, remedy: str, size: Callable[[], float] | None = None
) -> Difference:
    """The difference of two outputs, refused when it exceeds the tolerance of their dtype.

    Args:
        expected, actual: the outputs.
        what, remedy: how the error begins and ends.
        size: where the outputs differ by more, another magnitude to refer to if it is larger: that of what
            was summed, when the sums cancel.

    Raises:
        VerificationError: naming ``what``, the figure, the tolerance, and ending with ``remedy``.
    """
    found, allowed = difference(expected, actual, what), tolerance(expected)
    if size is not None and not found.relative <= allowed:
        found = Difference(found.absolute, min(found.relative, found.absolute / size()))
    if not found.relative <= allowed:
        raise VerificationError(
            f"{what}: outputs differ by {found.relative:.2e} of their largest magnitude "
            f"(tolerance {allowed:.1e}); {remedy}"
        )
    return found
