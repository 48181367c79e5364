"""BatchNorm recalibration: running statistics of the compressed network's own activations.

A compressed convolution changes the mean and the variance of what follows it; the running statistics still
describe the original. One pass over some training inputs, without labels, measures them anew, as in the
update of BatchNorm for averaged weights (Izmailov et al. 2018, arXiv 1803.05407).

Recalibrate after all layers are replaced. It repairs weak fits by many points of accuracy and can cost good
ones some tenths: choose by a loss on the calibration inputs, not by habit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .calibration_data import batches_of, checked, naming_batch
from .copying import check_module
from .errors import InputError
from .running import call, in_mode, seeded

__all__ = ["recalibrate_batchnorm_"]


def recalibrate_batchnorm_(model: nn.Module, calibration: Iterable[Any]) -> int:
    """Replace the running statistics of every BatchNorm by their average over the batches, in place.

    Only those BatchNorms are in training mode meanwhile, every other module (dropout) is in eval mode; no
    gradient is computed. Modes, momenta and the random state are as before afterwards. A BatchNorm without
    running statistics, or one that no batch reaches, is left as it is.

    Args:
        model: changed in place; where it fails on a batch, the old statistics are put back.
        calibration: batches, each a tensor, a dict of keyword arguments, or a tuple or list that begins with
            the input. Every batch counts alike: the mean is the mean of the batches' means, the variance
            the mean of their unbiased variances. 1,000 to 2,000 images are enough.

    Returns:
        How many BatchNorms have new statistics.

    Raises:
        InputError: for batches that the model cannot use, an iterator, or no batch at all.

    >>> norm = nn.BatchNorm1d(1).eval()
    >>> recalibrate_batchnorm_(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    1
    >>> norm.running_mean, norm.running_var, norm.momentum
    (tensor([4.]), tensor([2.]), 0.1)
    """
    check_module(model)
    checked(calibration)
    norms = _tracking(model)
    with torch.no_grad(), seeded(), in_mode(model, training=False), _averaging(norms):
        for number, inputs in enumerate(batches_of(calibration) if norms else (), start=1):
            with naming_batch(number):
                call(model, inputs)
        _check_finite(model, norms)
        reached = [norm for norm in norms if int(norm.num_batches_tracked or 0)]
    return len(reached)


def _check_finite(model: nn.Module, norms: list[_BatchNorm]) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    for norm in norms:
        if not all(bool(norm.get_buffer(name).isfinite().all()) for name in ("running_mean", "running_var")):
            raise InputError(
                f"{names[id(norm)] or 'the model'}: its new statistics are NaN or infinite; take such inputs "
                "out of the calibration data, or repair the model"
            )


def _tracking(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms with running statistics that a forward pass in training mode renews."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats and norm.running_mean is not None]


@contextmanager
def _averaging(norms: list[_BatchNorm]) -> Iterator[None]:
    """Statistics from nothing, each batch with the same weight; the old ones come back where none is new."""
    before = [(norm.momentum, _statistics(norm)) for norm in norms]
    finished = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: a cumulative average
        yield
        finished = True
    finally:
        for norm, (momentum, statistics) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not finished or not int(norm.num_batches_tracked or 0):
                for name, value in statistics.items():
                    norm.get_buffer(name).copy_(value)


def _statistics(norm: _BatchNorm) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}
