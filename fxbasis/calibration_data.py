"""Calibration data: what an iterable of batches gives a model, and what cannot be read.

A batch is a tensor, a dict of keyword arguments, or a tuple or list that begins with the input, which is then
a tensor, a dict or a tuple of positional arguments; the rest of it (labels) is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import InputError
from .running import ExampleInputs, as_arguments, batch_size, seeded

__all__ = ["batches_of", "checked", "inputs_of", "naming_batch"]


def batches_of(calibration: Iterable[Any]) -> Iterator[ExampleInputs]:
    """What a model is given of each batch, checked; what is drawn for a batch is the same at each pass.

    Raises:
        InputError: naming the batch that cannot be read, is empty or gives no inputs; and as ``checked``.
    """
    with seeded():
        batches, number = iter(checked(calibration)), 0
    while True:
        number += 1
        try:
            with seeded(number):
                batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(
                f"batch {number} of the calibration data cannot be read ({type(error).__name__}: {error}); "
                "repair it, or leave it out"
            ) from error
        inputs = inputs_of(batch)
        if batch_size(inputs) == 0:
            raise InputError(f"batch {number} of the calibration data has no sample; leave it out")
        yield inputs


@contextmanager
def naming_batch(number: int) -> Iterator[None]:
    """Say of a failing run of the model that its inputs are this batch, not the example inputs."""
    try:
        yield
    except InputError as error:
        batch = f"batch {number} of the calibration data"
        raise InputError(str(error).replace("the example inputs", batch)) from error


def inputs_of(batch: Any) -> ExampleInputs:
    """What a model is given of one batch.

    >>> images, labels = torch.zeros(8, 3, 4, 4), torch.zeros(8)
    >>> inputs_of((images, labels)) is images
    True

    Raises:
        InputError: for a batch that does not begin with a tensor, a dict or a tuple.
    """
    if isinstance(batch, (tuple, list)) and not batch:
        raise InputError(f"a batch is an empty {type(batch).__name__}; pass (input, labels) or the input")
    inputs: ExampleInputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    try:
        as_arguments(inputs)
    except InputError as error:
        raise InputError(
            f"a batch gives the model a {type(inputs).__name__}; pass batches that are, or begin with, "
            "a tensor, a dict of keyword arguments or a tuple of positional arguments"
        ) from error
    return inputs


def checked(calibration: Iterable[Any]) -> Iterable[Any]:
    """The same iterable, when it has batches and can be read more than once; the RNG is not touched.

    >>> len(checked([torch.zeros(2, 3), torch.zeros(2, 3)]))
    2

    Raises:
        InputError: for one batch in place of many, an iterator, or nothing at all.
    """
    kind = type(calibration).__name__
    if isinstance(calibration, (torch.Tensor, dict, str)) or not isinstance(calibration, Iterable):
        raise InputError(f"the calibration data is a {kind}; pass a list of batches, or a DataLoader")
    if isinstance(calibration, Iterator):
        raise InputError(
            f"the calibration data is a {kind}, which can be read only once; pass a list or a DataLoader"
        )
    if _is_empty(calibration):
        raise InputError(f"the calibration data ({kind}) has no batch; pass at least one")
    return calibration


def _is_empty(calibration: Any) -> bool:
    """By its length where it knows it: the first batch of a DataLoader starts all its workers."""
    try:
        return len(calibration) == 0
    except TypeError:
        with seeded():
            return not any(True for _ in calibration)
