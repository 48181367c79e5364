"""Loading into a fresh model: its own state_dict hooks and extra state, its options, its names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import X
from hard_modules import Base
from torch import Tensor, nn

from fxbasis import PlanError, compress, fold, load, save

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")


class Counts(Base):
    """Keeps a number in the extra state."""

    steps = 0

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (1 + self.steps)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


class Scales(Base):
    """Keeps an attribute that it sets from a buffer when it is loaded."""

    value = 1.0

    def prepare(self) -> None:
        self.register_buffer("scale", torch.ones(()))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.value = float(self.scale)

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.value


class Grows(Base):
    """Has a buffer that is made when it is loaded."""

    def prepare(self) -> None:
        self.register_buffer("bank", None)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.bank = torch.zeros_like(state[f"{prefix}bank"])
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.bank.shape[0]


class Converts(Base):
    """Its checkpoints have another name for a convolution, and a hook reads its weight."""

    def prepare(self) -> None:
        self._register_state_dict_hook(lambda module, state, *_: renamed(state, "conv.", "stem."))
        self.register_load_state_dict_pre_hook(lambda module, state, *_: renamed(state, "stem.", "conv."))
        self.register_load_state_dict_pre_hook(lambda module, state, *_: state["conv.weight"].clone())


def renamed(state: Any, old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)


class LeavesOut(Base):
    """Its checkpoints hold only what is trained."""

    def prepare(self) -> None:
        self.conv.requires_grad_(False)
        self._register_state_dict_hook(self._trained)

    @staticmethod
    def _trained(module: nn.Module, state: Any, *_: Any) -> None:
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        for name in frozen:
            state.pop(name, None)


def changed(model: nn.Module) -> None:
    if isinstance(model, Counts):
        model.steps = 4
    if isinstance(model, Scales):
        model.value = float(model.scale.fill_(3.0))
    if isinstance(model, Grows):
        model.bank = torch.zeros(5)


@pytest.mark.parametrize("kind", [Counts, Scales, Grows, Converts, LeavesOut])
def test_loaded_is_bit_equal_where_a_model_loads_in_its_own_way(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    changed(model)
    small = compress(model, X, layers="re:.*", size=3)
    loaded = load(kind().eval(), save(small, tmp_path / "small"))
    assert torch.equal(loaded(X), small(X))
    torch.testing.assert_close(fold(loaded)(X), small(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"padding_mode": "reflect"}]
)
def test_a_model_with_other_options_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    def make(**others: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, **({"padding": 1} | others)), nn.ReLU()).eval()

    folder = save(compress(make(), X, layers="re:.*", size=3), tmp_path / "small")
    load(make(), folder)
    with pytest.raises(
        PlanError, match=r"conv 1 \(0\).*padding mode are .*use the model that was compressed"
    ):
        load(make(**options), folder)


def test_a_model_whose_loading_fails_is_told(tmp_path: Path) -> None:
    class Fails(Base):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise KeyError("head.weight")

    small = compress(Base().eval(), X, layers="re:.*", size=3)
    with pytest.raises(PlanError, match=r"load_state_dict of Fails fails \(KeyError: 'head.weight'\)"):
        load(Fails(), save(small, tmp_path / "small"))
