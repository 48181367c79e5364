"""How far the outputs of two models are apart, without labels, and the Fisher metric of that distance.

Of every floating tensor that a model returns: of a matrix (B, classes) the Kullback-Leibler divergence of its
softmax; of any other half the squared difference over the mean square of the expected values. Their sum, in
nats for each image, is the *change* that sensitivities, plans and reports speak of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .nests import tensors_of

__all__ = ["divergence", "probe"]

_REMEDY = (
    "is not defined; pass evaluate=, a function that scores a model, or a plan of "
    'fxbasis.plan(..., estimator="output")'
)


def divergence(expected: Any, actual: Any) -> Tensor:
    """The change of each image, (B,) float64.

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.], dtype=torch.float64)

    Raises:
        InputError: when the outputs are no batch of floating tensors, or not of the same shapes.
    """
    first, second = _leaves(expected), _leaves(actual)
    shapes, others = ([tuple(leaf.shape) for leaf in leaves] for leaves in (first, second))
    if shapes != others:
        raise InputError(f"the outputs have shapes {shapes} and {others}, so their change {_REMEDY}")
    pairs = zip(first, second, strict=True)
    return sum(_change(a.detach().double(), b.double()) for a, b in pairs)  # type: ignore[return-value]


def _change(expected: Tensor, actual: Tensor) -> Tensor:
    if _is_logits(expected):
        log_p, log_q = expected.log_softmax(1), actual.log_softmax(1)
        parts = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        return parts.sum(1).clamp(min=0.0)
    return 0.5 * (actual - expected).square().flatten(1).mean(1) / _scale(expected)


def _scale(expected: Tensor) -> Tensor:
    return expected.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def probe(output: Any, generator: torch.Generator, expected: Any = None) -> Tensor:
    """A scalar whose gradient at each image is random, with the Hessian of the change as its covariance.

    Of the change from ``expected``, by default the output itself.

    So the change caused by a small shift d of something inside is half the mean square of <gradient, d>.
    Of logits with probabilities p the vector is the sum over k of eps_k sqrt(p_k) (e_k - p), eps = +-1, whose
    covariance is diag(p) - p p^T.
    """
    leaves = _leaves(output)
    pairs = zip(leaves, leaves if expected is None else _leaves(expected), strict=True)
    return sum(_probe(*pair, generator) for pair in pairs)  # type: ignore[return-value]


def _probe(leaf: Tensor, expected: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.device, torch.float64) * 2 - 1
    value = leaf.detach().double()
    if _is_logits(leaf):
        p = value.softmax(1)
        weights = signs * p.sqrt()
        vector = weights - p * weights.sum(1, keepdim=True)
    else:
        vector = signs / (_scale(expected.detach().double()) * leaf[0].numel()).sqrt()
    largest = torch.finfo(leaf.dtype).max
    return (vector.clamp(-largest, largest).to(leaf.dtype) * leaf).sum()


def _is_logits(leaf: Tensor) -> bool:
    return leaf.ndim == 2 and leaf.shape[1] > 1


def _leaves(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tensors_of(output) if leaf.is_floating_point() and leaf.ndim > 1]
    if not leaves or len({len(leaf) for leaf in leaves}) > 1 or _by_image(output):
        kind = type(output).__name__
        raise InputError(f"the model returns {kind}, no batch of floating tensors, so its change {_REMEDY}")
    return leaves


def _by_image(output: Any) -> bool:
    """Whether there is a list of dicts in it, as detectors return: one dict for each image."""
    if not isinstance(output, (list, tuple, dict)):
        return False
    parts = list(output.values() if isinstance(output, dict) else output)
    dicts = [isinstance(part, dict) for part in parts]
    return (not isinstance(output, dict) and bool(parts) and all(dicts)) or any(map(_by_image, parts))
