"""All batches side by side: who is visited when and with what, and that nothing is left behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis.lockstep import lockstep
from fxbasis.running import run

Seen = list[tuple[str, dict[int, Tensor]]]


class Branches(nn.Module):
    """A stem, then by the sign of the input's mean a, or b and a, and a head called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.stem(x))
        y = self.a(y) if x.mean() > 0 else self.a(self.b(y))
        return self.head(F.relu(self.head(y)))


def net() -> tuple[Branches, dict[str, nn.Module]]:
    torch.manual_seed(0)
    model = Branches()
    return model, dict(model.named_children())


def visits(model: nn.Module, layers: dict[str, nn.Module], batches: list[Any]) -> Seen:
    seen: Seen = []
    lockstep(model, layers, batches, lambda name, found: seen.append((name, dict(found))))
    return seen


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == threads


def same(found: dict[int, Tensor], expected: dict[int, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[i], expected[i]) for i in found)


def test_visits_are_in_order_with_the_input_of_every_batch() -> None:
    model, layers = net()
    del layers["drop"]
    batches = [torch.rand(size, 3) for size in (4, 2, 1)]
    seen = visits(model, layers, batches)
    assert [name for name, _ in seen] == ["stem", "a", "head", "head"]
    stems = {i: model.stem(x).detach() for i, x in enumerate(batches)}
    assert same(seen[0][1], dict(enumerate(batches)))
    assert same(seen[1][1], stems)
    assert same(seen[2][1], {i: model.a(x).detach() for i, x in stems.items()})


def test_batches_that_take_different_ways_meet_again() -> None:
    model, layers = net()
    batches = [torch.rand(2, 3), -torch.rand(2, 3), torch.rand(2, 3)]
    seen = visits(model, layers, batches)
    assert [(name, sorted(found)) for name, found in seen] == [
        ("stem", [0, 1, 2]),
        ("drop", [0, 1, 2]),
        ("a", [0, 2]),
        ("head", [0, 2]),
        ("head", [0, 2]),
        ("b", [1]),
        ("a", [1]),
        ("head", [1]),
        ("head", [1]),
    ]


def test_what_a_visit_changes_holds_for_the_call_and_after_it() -> None:
    model, layers = net()
    batches, kept = [torch.rand(2, 3), torch.rand(2, 3)], {}

    def visit(name: str, found: dict[int, Tensor]) -> None:
        if name == "stem":
            layers[name].weight.data.mul_(2.0)
            assert len(layers[name](found[0])) == 2  # a visitor may call the layer
        kept[name] = found

    lockstep(model, layers, batches, visit)
    assert same(kept["a"], {i: model.stem(x).detach() for i, x in enumerate(batches)})


class Keywords(nn.Module):
    """Changes its input in place and passes it on by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.layer(input=x.mul_(scale))


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_inputs_of_several_tensors_are_copied(kind: str) -> None:
    x, scale, model = torch.rand(2, 3), torch.tensor(3.0), Keywords()
    before = x.clone()
    if kind == "tuple":
        model.forward = lambda x, scale: Keywords.forward(model, x, scale=scale)  # type: ignore[method-assign]
    inputs = {"x": x, "scale": scale} if kind == "dict" else (x, scale)
    seen = visits(model, {"layer": model.layer}, [inputs, inputs])
    assert same(seen[0][1], {0: 3 * before, 1: 3 * before})
    assert torch.equal(x, before)


def snapshot(model: nn.Module) -> list[Any]:
    return [
        (m.training, len(m._forward_pre_hooks), m._forward_pre_hooks_with_kwargs) for m in model.modules()
    ]


def test_the_model_is_left_as_it_was() -> None:
    model, layers = net()
    model.train().head.eval()
    layers["a"].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    before, batches, state = snapshot(model), [torch.rand(2, 3)], torch.get_rng_state()
    seen = {}
    lockstep(model, layers, batches, lambda name, found: seen.update({name: found, "draw": torch.rand(1)}))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen["a"][0], run(model.stem, batches[0]) + 1)  # a hook of the user's comes first
    assert snapshot(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("batch", [torch.rand(2, 4), [torch.rand(2, 3)], {"y": torch.rand(2, 3)}])
@pytest.mark.parametrize("place", [0, 1])
def test_an_error_of_the_model_is_raised_here(batch: Any, place: int) -> None:
    model, layers = net()
    before, batches = snapshot(model), [torch.rand(2, 3), torch.rand(2, 3)]
    batches.insert(place, batch)
    with pytest.raises(Exception, match=r"shapes cannot be multiplied|is a list|unexpected keyword"):
        visits(model, layers, batches)
    assert snapshot(model) == before


class Stubborn(nn.Module):
    """Catches whatever is raised in it, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            try:
                x = self.layer(x)
            except BaseException:
                x = x + 1
        return x


@pytest.mark.parametrize("kind", [Branches, Stubborn])
def test_an_error_of_the_visitor_is_raised_and_ends_all(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    layers, before = dict(model.named_children()), snapshot(model)

    def visit(name: str, found: dict[int, Tensor]) -> None:
        raise KeyError("visitor")

    with pytest.raises(KeyError, match="visitor"):
        lockstep(model, layers, [torch.rand(2, 3)] * 3, visit)
    assert snapshot(model) == before


def test_no_layers_and_no_batches_visit_nothing() -> None:
    model, layers = net()
    assert visits(model, {}, [torch.rand(2, 3)]) == []
    assert visits(model, layers, []) == []
