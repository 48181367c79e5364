"""A graph serves while the attributes that it kept are what they were; after that the model's Python runs."""

import copy
import functools
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from behaviour import X, assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import compress, export_onnx, fold, load, parts_of, profile, save

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.skip = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((8, 1, 1), 0.5))
        self.scale = 1.0

    exported = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.scale
        y = y if self.gamma is None else y * self.gamma
        return y if self.skip is None or self.exported else y + self.skip(x)

    def forward_alone(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Net(nn.Module):
    """Reads flags, functions, sizes and parts of its own and of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.more = Block(), nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])
        self.act, self.sizes, self.dropped, self.epoch = torch.relu, {"a": [1, 2]}, None, 0
        self.last, self.leaky = F.relu6, functools.partial(F.leaky_relu, negative_slope=0.1)
        self.config, self.kept = SimpleNamespace(gain=2.0, more=OrderedDict(b=1.0)), slice(0, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.block(x)) * self.sizes["a"][1] * self.config.gain * self.config.more["b"]
        for part in self.more:
            y = part(y)
        y = self.leaky(self.last(y[:, self.kept]) - 3) * getattr(self, "temperature", 1.0)
        return self.post(y if self.dropped is None else y[:, : self.dropped])

    def post(self, y: Tensor) -> Tensor:
        return y + 1


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
    "a flag of the class": lambda model: setattr(model.block, "exported", True),
    "an attribute that was not there": lambda model: setattr(model, "temperature", 3.0),
    "another forward of a block": lambda model: setattr(model.block, "forward", model.block.forward_alone),
    "a forward of a convolution": lambda model: setattr(model.block.conv, "forward", lambda x: x[:, :1] + 1),
    "a function of torch.nn": lambda model: setattr(model, "last", F.hardtanh),
    "a function with arguments": lambda model: setattr(
        model, "leaky", functools.partial(F.leaky_relu, negative_slope=0.9)
    ),
    "a method": lambda model: setattr(model, "post", MethodType(lambda _, y: y - 1, model)),
    "an object": lambda model: setattr(model, "config", SimpleNamespace(gain=3.0, more={"b": 1.0})),
    "an attribute of an object": lambda model: setattr(model.config, "gain", 3.0),
    "an entry inside of an object": lambda model: model.config.more.update(b=3.0),
    "a slice": lambda model: setattr(model, "kept", slice(2, 8)),
    "a parameter that is gone": lambda model: setattr(model.block, "gamma", None),
    "a hook on a block": lambda model: model.block.register_forward_hook(lambda _, given, y: y - 1),
    "a hook on a convolution": lambda model: model.block.conv.register_forward_pre_hook(
        lambda _, given: given[0] + 1
    ),
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
    later.name_of_the_run = "third"  # which no code reads
    assert graph_runs(later)
    later.block.scale = 3.0
    assert not graph_runs(later)
    later.block.scale = 1.0
    assert graph_runs(later)
    handle = later.block.register_forward_hook(lambda *_: None)
    assert not graph_runs(later)
    handle.remove()
    assert graph_runs(later)


def test_a_flag_of_the_class_itself_is_seen() -> None:
    class Flagged(Block):
        pass

    torch.manual_seed(0)
    model = Flagged().eval()
    later: Any = compress(model, X, size=0.5)
    assert graph_runs(later)
    Flagged.exported = True
    assert not graph_runs(later)


class Twice(nn.Module):
    """Calls its convolution once, or, after the flag of its class is set, twice."""

    twice = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.conv(y) if self.twice else y


def test_work_and_files_are_those_of_what_runs(tmp_path: Path) -> None:
    import onnxruntime

    model = Twice().eval()
    later = compress(model, X, layers="re:.*", size=1.0)
    once = profile(later, X).counted
    for each in (model, later):
        each.twice = True
    found = profile(later, X)
    assert (found.counted, found.macs) == (2 * once, 2 * once)
    export_onnx(later, X, tmp_path / "later.onnx")
    run = onnxruntime.InferenceSession(tmp_path / "later.onnx").run
    assert_same(model(X), torch.from_numpy(run(None, {"x": X.numpy()})[0]))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "bias", "weight"])
def test_what_the_steps_say_cannot_be_set(name: str) -> None:
    later: Any = compress(net(), X, size=0.5)
    message = (
        rf"conv 1 \(block.conv\).*{name} is read off the steps.*fold the model, set it, and compress again"
    )
    with pytest.raises(AttributeError, match=message):
        setattr(later.block.conv, name, None)
