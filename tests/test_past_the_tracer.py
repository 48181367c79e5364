"""What forward does past a tracer: the copy must do it too, after training and on other inputs."""

from typing import Any

import asking_modules  # noqa: F401 - fills the table
import pytest
import torch
from behaviour import X, assert_same
from bypassing_modules import CASES, LayerScale, ZeroInitResidual
from hard_modules import Base
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import compress, parts_of, trace

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")


@pytest.mark.parametrize("name", CASES)
def test_the_copy_does_what_the_model_does(name: str) -> None:
    kind, example, use = CASES[name]
    torch.manual_seed(0)
    model = kind().eval()
    copies = [trace(model, example), compress(model, example, layers="re:conv", size=1.0)]
    expected = use(model)
    for copied in copies:
        assert_same(expected, use(copied))


def test_steps_in_place_are_steps_of_the_graph() -> None:
    traced = trace(ZeroInitResidual().eval(), X)
    assert parts_of(traced)[0].graph
    assert "iadd" in str(traced.graph)


def test_parameters_get_their_values_back_after_the_proof() -> None:
    model = LayerScale().eval()
    nn.init.zeros_(model.last.bias)
    traced = trace(model, X)
    assert all(map(torch.equal, model.parameters(), traced.parameters()))


class ModeInAProduct(Base):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.out(x), 0.3 * self.training)


class ModeAsText(Base):
    def prepare(self) -> None:
        self.scales = {"True": 1.0, "False": 2.0}

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.scales[f"{self.training}"]


class ModeAsABool(Base):
    def forward(self, x: Tensor) -> Any:
        assert isinstance(self.training, bool)
        return self.out(x)


@pytest.mark.parametrize(
    ("kind", "reason"), [(ModeInAProduct, "train()"), (ModeAsText, "train()"), (ModeAsABool, "")]
)
def test_a_mode_is_used_as_a_bool(kind: type[nn.Module], reason: str) -> None:
    part = parts_of(trace(kind().eval(), X))[0]
    assert part.graph
    assert part.reason.startswith(reason)


class GrowsItsDefault(Base):
    def forward(self, x: Tensor, seen: list[int] = []) -> Any:  # noqa: B006
        seen.append(1)
        return self.out(x) * len(seen)


def test_a_default_that_may_change_is_named() -> None:
    assert (
        "the default of its argument seen is a list" in parts_of(trace(GrowsItsDefault().eval(), X))[0].reason
    )
