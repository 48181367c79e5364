"""difference, tolerance and check_equal: the figures, and every refusal."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fxbasis.comparing import (
    TOLERANCES,
    Difference,
    check_equal,
    difference,
    tolerance,
)
from fxbasis.errors import VerificationError

NAN, INF = float("nan"), float("inf")
Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Boxes:
    scores: Tensor
    label: str = "box"


@dataclass
class Crates:
    scores: Tensor
    label: str = "box"


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


EQUAL = {
    "tensor": t(1, 2),
    "nested": {"a": [t(1), (t(2), None)], "b": 3},
    "namedtuple": Pair(t(1), t(2)),
    "dataclass": Boxes(t(1, 2)),
    "dataclass in a list": [Boxes(t(1)), Boxes(t(2))],
    "nan": t(NAN, 1),
    "infinite": t(INF, -INF, 1),
    "all nan": t(NAN),
    "empty": torch.zeros(0, 3),
    "integers": torch.tensor([1, 2]),
    "booleans": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "zeros": torch.zeros(3),
    "scalars": (1, 2.5, "text", True, None),
    "nothing": None,
}


@pytest.mark.parametrize("key", EQUAL)
def test_a_value_does_not_differ_from_itself(key: str) -> None:
    assert difference(EQUAL[key], EQUAL[key]) == Difference(0.0, 0.0)


MEASURED = {
    "relative to the largest magnitude": (t(1, -4), t(1.5, -4), Difference(0.5, 0.125)),
    "of the expected": (t(4), t(5), Difference(1.0, 0.25)),
    "the worst of several": ([t(1), t(10)], [t(1.5), t(12)], Difference(2.0, 0.5)),
    "in a dataclass": (Boxes(t(2)), Boxes(t(3)), Difference(1.0, 0.5)),
    "of integers": (torch.tensor([4]), torch.tensor([3]), Difference(1.0, 0.25)),
    "of booleans": (torch.tensor([True]), torch.tensor([False]), Difference(1.0, 1.0)),
    "of complex numbers": (torch.tensor([3 + 4j]), torch.tensor([0j]), Difference(5.0, 1.0)),
    "a new nan": (t(1, 1), t(1, NAN), Difference(INF, INF)),
    "a lost nan": (t(1, NAN), t(1, 1), Difference(INF, INF)),
    "a new infinity": (t(1), t(INF), Difference(INF, INF)),
    "a lost infinity": (t(INF), t(1), Difference(INF, INF)),
    "the other infinity": (t(INF), t(-INF), Difference(INF, INF)),
    "beside an infinity": (t(INF, 2), t(INF, 3), Difference(1.0, 0.5)),
    "beside a nan": (t(NAN, 2), t(NAN, 3), Difference(1.0, 0.5)),
}


@pytest.mark.parametrize("key", MEASURED)
def test_difference(key: str) -> None:
    expected, actual, answer = MEASURED[key]
    assert difference(expected, actual) == answer


def test_a_difference_from_zero_is_never_small() -> None:
    assert difference(torch.zeros(2), t(0, 1e-10)).relative > 1


def test_gradients_do_not_matter() -> None:
    assert difference(t(1).requires_grad_(), t(1)) == Difference(0.0, 0.0)


REFUSED = {
    "shape": (
        t(1, 2),
        t(1),
        r"an output of shape \(2,\) torch.float32 became \(1,\) torch.float32; leave the layers",
    ),
    "dtype": (
        t(1),
        t(1).double(),
        r"shape \(1,\) torch.float32 became \(1,\) torch.float64; leave the layers",
    ),
    "container": (
        (t(1),),
        [t(1)],
        "an output of type tuple became list or changed its structure; leave the model",
    ),
    "named tuple to tuple": (Pair(t(1), t(2)), (t(1), t(2)), "an output of type Pair became tuple"),
    "length": ([t(1)], [t(1), t(1)], "type list became list or changed its structure"),
    "keys": ({"a": t(1)}, {"b": t(1)}, "type dict became dict or changed its structure"),
    "dataclass": (Boxes(t(1)), Crates(t(1)), "an output of type Boxes became Crates"),
    "dataclass inside": ([Boxes(t(1))], [Crates(t(1))], "changed its structure"),
    "tensor to number": (t(1), 1.0, r"the output tensor\(\[1.\]\) became 1.0; leave the model"),
    "number": (1, 2, "the output 1 became 2; leave the model as it is"),
    "text": ("a", "b", "the output 'a' became 'b'"),
    "flag": (True, False, "the output True became False"),
    "flag to number": (True, 1, "the output True became 1"),
    "field of a dataclass": (Boxes(t(1), "a"), Boxes(t(1), "b"), "the output 'a' became 'b'"),
    "none": (None, t(1), "leave the model"),
    "no data": (
        t(1),
        torch.zeros(1, device="meta"),
        "the outputs are on the meta device; load the weights first",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_another_structure_is_refused(key: str) -> None:
    expected, actual, message = REFUSED[key]
    with pytest.raises(VerificationError, match=f"^here: .*{message}"):
        difference(expected, actual, "here")


def test_tolerances_are_those_promised() -> None:
    promised = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
    assert promised == TOLERANCES


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        *((torch.zeros(1, dtype=dtype), allowed) for dtype, allowed in TOLERANCES.items()),
        ([t(1).double(), t(1).half()], 5e-3),
        (Boxes(t(1).bfloat16()), 2e-2),
        ((t(1).double(), torch.tensor([1])), 1e-12),
        (torch.tensor([1]), 1e-5),
        (None, 1e-5),
    ],
    ids=[
        "float64",
        "float32",
        "half",
        "bfloat16",
        "coarsest",
        "in a dataclass",
        "integers aside",
        "integers",
        "none",
    ],
)
def test_tolerance_is_that_of_the_coarsest_dtype(value: Any, allowed: float) -> None:
    assert tolerance(value) == allowed


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_check_equal_draws_the_line_at_the_tolerance(dtype: torch.dtype) -> None:
    one, step = torch.ones(1, dtype=dtype), torch.finfo(dtype).eps
    steps = int(TOLERANCES[dtype] / step)
    found = check_equal(one, one + steps * step, "here", "do that")
    assert found.relative == steps * step <= TOLERANCES[dtype]
    message = rf"^here: outputs differ by .* \(tolerance {TOLERANCES[dtype]:.1e}\); do that$"
    with pytest.raises(VerificationError, match=message):
        check_equal(one, one + (steps + 1) * step, "here", "do that")


def test_check_equal_refuses_a_new_nan() -> None:
    with pytest.raises(VerificationError, match="here: outputs differ by inf"):
        check_equal(t(1, 1), t(1, NAN), "here", "do that")


class Instances:
    """What a detector returns: an object of a class of its own."""

    def __init__(self, *scores: float) -> None:
        self.fields = {"scores": t(*scores)}
        self.owner = self


def test_difference_looks_into_objects_of_any_class() -> None:
    assert difference([Instances(1, 2)], [Instances(1, 2.5)]) == Difference(0.5, 0.25)
    with pytest.raises(VerificationError, match="changed its structure"):
        difference(Instances(1), Boxes(t(1)))
