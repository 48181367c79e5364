"""The rank of a matrix under white noise, by variational Bayes, from its singular values alone.

An L x M matrix, L <= M, is modelled as B A^T plus independent Gaussian noise of variance s2, with
Gaussian priors on A and B whose variances are learned too. The global minimum of the free energy is known
in closed form (Nakajima, Sugiyama, Babacan, Tomioka 2013, "Global analytic solution of fully-observed
variational Bayesian matrix factorization", JMLR 14). With a = L / M and x = gamma^2 / (M s2) for the
singular value gamma, a component is kept where x exceeds

    x_bar = (1 + t_bar) (1 + a / t_bar),    t_bar the zero of log(1 + t) / t + a log(1 + t / a) / t - 1,

about 2.5129 sqrt(a). Twice the free energy is M times the sum, over the singular values, of

    x - log x + [x > x_bar] (log(1 + t) + a log(1 + t / a) - t),
    t = (x - 1 - a + sqrt((x - 1 - a)^2 - 4 a)) / 2

and a constant; where the noise is not given, s2 is its minimum between the bounds of the paper.

Trained weights are no low rank plus white noise: the ranks found for them are low, and unequal layers
are treated as equal. Take them as a suggestion.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.optimize
import torch
from torch import Tensor

from .errors import InputError, SelectionError

__all__ = ["evbmf_rank"]

_FLOOR = 1e-16  # of the mean square: below, the noise of a matrix is its rounding
_GRID = 256


def _threshold(ratio: float) -> float:
    """x_bar, above which a component lowers the free energy; ``ratio`` is a = L / M."""

    def gain(t: float) -> float:
        return math.log1p(t) / t + ratio * math.log1p(t / ratio) / t - 1.0

    guess = 2.5129 * math.sqrt(ratio)
    t = float(scipy.optimize.brentq(gain, guess / 10, guess * 10))
    return (1.0 + t) * (1.0 + ratio / t)


def _component(x: npt.NDArray[np.float64], ratio: float) -> npt.NDArray[np.float64]:
    """What keeping a component of strength x > (1 + sqrt(a))^2 adds to the free energy, over M / 2."""
    half = x - 1.0 - ratio
    t = 0.5 * (half + np.sqrt(np.maximum(half**2 - 4.0 * ratio, 0.0)))
    return np.log1p(t) + ratio * np.log1p(t / ratio) - t


def _free_energy(noise: float, squares: npt.NDArray[np.float64], ratio: float, threshold: float) -> float:
    """The free energy of the noise (times M), over M / 2 and but for a constant; squares are gamma^2 / M."""
    x = squares / noise
    kept = x[x > threshold]
    return float(x.sum() + len(x) * math.log(noise) + _component(kept, ratio).sum())


def _noise(squares: npt.NDArray[np.float64], ratio: float, threshold: float) -> float:
    """The variance s2 of least free energy: the best of a grid, refined between its neighbours."""
    head = math.ceil(len(squares) / (1.0 + ratio)) - 1
    upper = float(squares.mean())
    lower = max(float(squares[head]) / threshold, float(squares[head:].mean()), _FLOOR * upper)
    if lower >= upper * (1 - 1e-12):
        return upper

    def energy(log_noise: float) -> float:
        return _free_energy(math.exp(log_noise), squares, ratio, threshold)

    grid = np.linspace(math.log(lower), math.log(upper), _GRID)
    best = int(np.argmin([energy(point) for point in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)])
    found = scipy.optimize.minimize_scalar(energy, bounds=bounds, method="bounded")
    return math.exp(min((float(found.x), float(grid[best])), key=energy))


def evbmf_rank(singular: Tensor, rows: int, columns: int, noise: float | None = None) -> int:
    """How many singular values stand out of the noise, 0 to min(rows, columns).

    Args:
        singular: (min(rows, columns),), in any order, of any floating dtype and device.
        rows: of the matrix; it may have more rows than columns or fewer.
        columns: of the matrix.
        noise: the variance of the noise of one entry; estimated where it is not given.

    >>> matrix = torch.randn(40, 3) @ torch.randn(3, 90) + 0.1 * torch.randn(40, 90)
    >>> evbmf_rank(torch.linalg.svdvals(matrix), 40, 90)
    3

    Raises:
        InputError: for singular values that are not those of such a matrix.
        SelectionError: for a noise below 0.
    """
    values = singular.detach().to("cpu", torch.float64)
    small, large = sorted((rows, columns))
    if values.shape != (small,) or small < 1:
        raise InputError(
            f"singular values of shape {tuple(values.shape)} are not those of a {rows} x {columns} matrix; "
            f"pass all {small} of them"
        )
    if not (values.isfinite().all() and (values >= 0).all()):
        raise InputError("singular values must be finite and at least 0; pass those of torch.linalg.svdvals")
    if noise is not None and not noise >= 0:
        raise SelectionError(f"noise={noise!r} is no variance; pass 0 or more, or None to estimate it")
    top, ratio = float(values.max()), small / large
    if top == 0.0:
        return 0
    squares = (values / top).sort(descending=True).values.square().numpy() / large
    threshold = _threshold(ratio)
    variance = _noise(squares, ratio, threshold) if noise is None else noise / top**2
    return int((squares > variance * threshold).sum())
