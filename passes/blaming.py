"""Which submodule and which line of the model is at fault when it cannot be a graph."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from ..errors import FxBasisError
from .entropy import entropy_drawn
from .graphs import ObstacleError

__all__ = ["blamed_on", "caller", "definition_of", "frames_of_module", "is_the_models", "model_frame"]

_PACKAGE = tuple(str(Path(inspect.getfile(kind)).parent) for kind in (ObstacleError, FxBasisError))


@contextmanager
def blamed_on(place: str) -> Iterator[None]:
    """What goes wrong inside is an obstacle in the submodule ``place``, unless it names another."""
    before = _random_state()
    try:
        yield
    except ObstacleError as obstacle:
        if obstacle.place is None:
            raise type(obstacle)(f"{obstacle} ({source_of(obstacle)})", place) from obstacle
        raise
    except Exception as error:
        said = str(error).partition(". ")[0]  # fx goes on with general advice
        raise ObstacleError(f"{type(error).__name__}: {said} ({source_of(error)})", place) from error
    if not _same_state(before, _random_state()):
        raise ObstacleError("it draws random numbers that a graph would keep as constants", place)


def _random_state() -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Of torch, of Python and NumPy, and how much entropy was asked for, as by new generators."""
    position = np.random.get_state(legacy=False)["state"]["pos"]
    return torch.get_rng_state(), (random.getstate(), position, entropy_drawn())


def _same_state(one: tuple[torch.Tensor, Any], other: tuple[torch.Tensor, Any]) -> bool:
    return one[1] == other[1] and torch.equal(one[0], other[0])


def source_of(error: BaseException) -> str:
    """File and line of the innermost frame outside of torch and of this package."""
    place, frame = "unknown line", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if is_the_models(file):
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def model_frame() -> FrameType | None:
    """The innermost caller outside of torch and of this package; else that of a module of torch."""
    frame, of_torch = cast("FrameType | None", sys._getframe(1)), None
    while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:  # whose caller is no model
        if is_the_models(frame.f_code.co_filename):
            return frame
        if "/torch/nn/" in frame.f_code.co_filename:
            of_torch = of_torch or frame
        frame = frame.f_back
    return of_torch


def frames_of_module() -> Iterator[FrameType]:
    """The frames of the model's code inside of the module that is being traced, the innermost first."""
    frame = model_frame()
    while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
        if is_the_models(frame.f_code.co_filename):
            yield frame
        elif frame.f_code.co_name == "call_module":  # of the tracer: what calls the module is outside
            return
        frame = frame.f_back


def caller() -> str:
    """File and line of the model's code that asks."""
    frame = model_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "unknown line"


def is_the_models(file: str) -> bool:
    """Whether a file is neither of torch nor of this package."""
    return "/torch/" not in file and not file.startswith(("<", *_PACKAGE))


def definition_of(module: nn.Module) -> str:
    """File and line where the module's forward is defined."""
    try:
        code = inspect.unwrap(type(module).forward).__code__
    except AttributeError:
        return "unknown line"
    return f"{code.co_filename}:{code.co_firstlineno}"
