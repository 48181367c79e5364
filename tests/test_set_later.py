"""A graph serves while the attributes that it kept are what they were; after that the model's Python runs."""

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import X, assert_same
from torch import Tensor, nn

from fxbasis import compress, fold, load, parts_of, save

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.skip = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.scale
        return y if self.skip is None else y + self.skip(x)


class Net(nn.Module):
    """Reads flags, functions, sizes and parts of its own and of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.more = Block(), nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])
        self.act, self.sizes, self.dropped, self.epoch = torch.relu, {"a": [1, 2]}, None, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.block(x)) * self.sizes["a"][1]
        for part in self.more:
            y = part(y)
        return y if self.dropped is None else y[:, : self.dropped]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


REPLACED = Block()
CHANGES: dict[str, Callable[[Any], object]] = {
    "a flag of a block": lambda model: setattr(model.block, "scale", 2.0),
    "a function": lambda model: setattr(model, "act", torch.tanh),
    "a number where none was": lambda model: setattr(model, "dropped", 4),
    "an entry of a container": lambda model: model.sizes["a"].__setitem__(1, 5),
    "a convolution that is gone": lambda model: setattr(model.block, "skip", None),
    "a block that is exchanged": lambda model: setattr(model, "block", REPLACED),
    "a part more": lambda model: model.more.append(nn.Tanh()),
}
STAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compressed": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "folded": fold,
    "loaded": lambda model: load(net(), save(model, Path(tempfile.mkdtemp()) / "saved")),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_set_later_is_seen(change: str, stage: str) -> None:
    model = net()
    later = STAGES[stage](compress(model, X, layers="re:.*", size=1.0))
    assert parts_of(later)[0].graph
    before = model(X)
    assert_same(before, later(X))
    CHANGES[change](model)
    CHANGES[change](later)
    assert not model(X).equal(before)
    assert_same(model(X), later(X))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_set_before_loading_is_seen(change: str, tmp_path: Path) -> None:
    model = net()
    save(compress(model, X, layers="re:.*", size=1.0), tmp_path / "saved")
    loaded = load(model, tmp_path / "saved")
    CHANGES[change](model)
    CHANGES[change](loaded)
    assert_same(model(X), loaded(X))


def graph_runs(model: Any) -> bool:
    return bool(model._is_as_traced())


@pytest.mark.parametrize("stage", STAGES)
def test_the_graph_runs_as_long_as_nothing_is_set(stage: str) -> None:
    later: Any = STAGES[stage](compress(net(), X, layers="re:.*", size=0.5))
    later.train()
    later.to(torch.float64).requires_grad_(False)
    later.block.conv.register_forward_hook(lambda *_: None)
    assert graph_runs(later)
    later.name_of_the_run = "third"  # which no code reads
    assert graph_runs(later)
    later.block.scale = 3.0
    assert not graph_runs(later)
    later.block.scale = 1.0
    assert graph_runs(later)
