"""Least squares from sums: what is added up in float64 over batches, and solved once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RIDGE", "Sums", "ridge_solve"]

RIDGE = 1e-6
"""Over the diagonal of the normal equations, scaled to ones."""
CONSTANT = 1e-12
"""The part of its mean square that the variance of a feature must have."""


def ridge_solve(gram: Tensor, cross: Tensor, start: Tensor, whole: Tensor | None = None) -> Tensor:
    """X (g, o, n) of X gram = cross, in float64, each unknown scaled to the same size before the ridge.

    The ridge draws towards ``start``: what the sums do not tell stays as it was, and the squared error, up
    to rounding, never grows.

    Args:
        gram: (g, n, n), of the features. cross: (g, o, n). start: (g, o, n).
        whole: (g, n), squares of the features before their mean was taken off; a feature that has next to
            nothing left of them is a constant and keeps its weight.

    >>> gram, cross = 2 * torch.eye(2)[None].double(), torch.ones(1, 1, 2).double()
    >>> ridge_solve(gram, cross, torch.zeros_like(cross)).shape
    torch.Size([1, 1, 2])
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    least = CONSTANT * (squares if whole is None else whole)
    scale = squares.maximum(least).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    scale = torch.where(squares > least, scale, 0.0)
    normal = gram * scale[:, :, None] * scale[:, None]
    normal = normal + RIDGE * torch.eye(gram.shape[1], dtype=gram.dtype)
    missing = (cross - start @ gram) * scale[:, None]
    solved: Tensor = torch.linalg.solve(normal, missing.mT).mT * scale[:, None]
    return start + solved


class Sums:
    """Of features x (n) and targets y (o), group by group: their sums and products."""

    def __init__(self, groups: int, features: int, targets: int) -> None:
        self.count = 0
        self.x = torch.zeros(groups, features, dtype=torch.float64)
        self.y = torch.zeros(groups, targets, dtype=torch.float64)
        self.gram = torch.zeros(groups, features, features, dtype=torch.float64)
        self.cross = torch.zeros(groups, targets, features, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Features (g, N, n) and targets (g, N, o) of N positions more."""
        x, y = x.to("cpu", torch.float64), y.to("cpu", torch.float64)
        self.count += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.gram += x.mT @ x
        self.cross += y.mT @ x

    def solve(self, start: Tensor, *, with_mean: bool) -> tuple[Tensor, Tensor]:
        """The weight (g, o, n) and the constant (g, o) of y ~ weight x + constant; 0 unless ``with_mean``."""
        if not with_mean:
            return ridge_solve(self.gram, self.cross, start), torch.zeros_like(self.y)
        x, y = self.x / self.count, self.y / self.count
        gram = self.gram - self.count * x[:, :, None] * x[:, None]
        cross = self.cross - self.count * y[:, :, None] * x[:, None]
        weight = ridge_solve(gram, cross, start, self.gram.diagonal(dim1=1, dim2=2))
        return weight, y - (weight @ x[:, :, None])[..., 0]
