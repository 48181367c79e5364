"""What it means that a model behaves as another one does: outputs and buffers, in eval() and in train()."""

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxbasis import FxBasisWarning
from fxbasis.forms import BasisConv2d

TOLERANCE = 1e-5
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X3 = torch.randn(3, 3, 10, 6, generator=torch.Generator().manual_seed(2))


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The result, and the messages of fxbasis' own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [str(entry.message) for entry in caught if issubclass(entry.category, FxBasisWarning)]


def seed_all() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def assert_same(expected: Any, actual: Any) -> None:
    """Same types all the way down, same tensors to the tolerance."""
    assert type(expected) is type(actual)
    if isinstance(expected, Tensor):
        assert expected.shape == actual.shape
        assert expected.dtype == actual.dtype
        assert (expected - actual).abs().max() <= TOLERANCE * expected.abs().max()
    elif isinstance(expected, dict):
        assert list(expected) == list(actual)
        assert_same(list(expected.values()), list(actual.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_same(one, other)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(expected, field.name), getattr(actual, field.name))
    else:
        assert expected == actual


def assert_behaves_as(model: nn.Module, other: nn.Module, *inputs: Any) -> None:
    """Outputs and buffers of both, twice in eval() and twice in train(), from the same random state."""
    model, other = copy.deepcopy(model), copy.deepcopy(other)
    for training in (False, False, True, True):
        for given in inputs:
            results = []
            for one in (model, other):
                seed_all()
                one.train(training)
                results.append(one(copy.deepcopy(given)))
            assert_same(*results)
            assert_same(dict(model.named_buffers()), dict(_own_buffers(other, model)))


def _own_buffers(module: nn.Module, like: nn.Module) -> list[tuple[str, Tensor]]:
    names = {name for name, _ in like.named_buffers()}
    return [(name, buffer) for name, buffer in module.named_buffers() if name in names]


def forms_in(model: nn.Module) -> int:
    return sum(isinstance(module, BasisConv2d) for module in model.modules())
