"""One forward pass made safe: what the inputs mean, what is given back, also when the model raises."""

from __future__ import annotations

import random
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxbasis.copying import copy_model
from fxbasis.errors import InputError, LayerError, TraceError
from fxbasis.nests import map_tensors, tensors_of
from fxbasis.running import (
    as_arguments,
    batch_size,
    become,
    describe,
    in_mode,
    load_values,
    run,
    seeded,
    with_batch,
)
from fxbasis.snapshots import Snapshot, buffer_values


class Noisy(nn.Module):
    """Draws from all three random states, counts its calls, and may then raise."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.child = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(()) + random.random() + np.random.rand()
        if self.error:
            raise self.error
        return self.child(x) + noise


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        (torch.ones(1), ((torch.ones(1),), {})),
        ((1, 2), ((1, 2), {})),
        ({"x": 1}, ((), {"x": 1})),
        ((), ((), {})),
    ],
    ids=["tensor", "tuple", "dict", "empty"],
)
def test_example_inputs_are_arguments(example: Any, arguments: Any) -> None:
    assert as_arguments(example) == arguments


@pytest.mark.parametrize("example", [[torch.ones(1)], None, 3, "x", {1: torch.ones(1)}, np.ones(1)], ids=repr)
def test_other_example_inputs_are_refused(example: Any) -> None:
    message = rf"example_inputs is a {type(example).__name__}; pass a tensor, a tuple of .*, or a dict"
    with pytest.raises(InputError, match=message):
        as_arguments(example)


def test_tensors_of_finds_them_in_a_nest() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    found = tensors_of({"x": (a, [b, 3]), "y": {"z": c}, "w": None})
    assert [tensor.numel() for tensor in found] == [1, 2, 3]
    assert tensors_of(3) == []


def test_map_tensors_keeps_the_nest() -> None:
    assert map_tensors(lambda tensor: tensor.sum(), {"x": (torch.ones(2), "s"), "y": 1}) == {
        "x": (2, "s"),
        "y": 1,
    }


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (torch.zeros(1, 3), "(1, 3) float32 cpu"),
        ((torch.zeros(2).half(), {"n": torch.tensor(1)}), "(2,) float16 cpu, () int64 cpu"),
        (torch.zeros(1, device="meta"), "(1,) float32 meta"),
        ((1, "x"), "no tensor"),
    ],
)
def test_describe(example: Any, text: str) -> None:
    assert describe(example) == text


@pytest.mark.parametrize("training", [False, True])
def test_in_mode_gives_each_module_its_own_mode_back(training: bool) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU())).train()
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    with in_mode(model, training):
        assert {module.training for module in model.modules()} == {training}
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), in_mode(model, training):
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_seeded_fixes_all_random_states_and_gives_them_back() -> None:
    before = random_states()
    with seeded():
        drawn = (float(torch.rand(())), random.random(), float(np.random.rand()))
    assert random_states() == before
    with seeded():
        assert (float(torch.rand(())), random.random(), float(np.random.rand())) == drawn
    with seeded(1):
        assert float(torch.rand(())) != drawn[0]
    with pytest.raises(ValueError, match="too thin"), seeded():
        Noisy(ValueError("too thin"))(torch.ones(1))
    assert random_states() == before


def test_run_is_repeatable_and_without_gradients() -> None:
    model, before = Noisy().train(), random_states()
    first, second = (run(model, torch.ones(20, requires_grad=True), training=True) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert bool((first == first.min()).any())  # dropout was on
    assert random_states() == before
    assert bool((run(model, torch.ones(20)) == run(model, torch.ones(20))[0]).all())  # and is off
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [False, True])
def test_run_gives_everything_back_when_the_model_raises(training: bool) -> None:
    model, before = Noisy(ValueError("too thin")), random_states()
    model.train().child.eval()
    message = r"failed on the example inputs \(\(2, 3\) float32 cpu\): ValueError: too thin; pass inputs of"
    with pytest.raises(InputError, match=message) as caught:
        run(model, torch.ones(2, 3), training=training)
    assert isinstance(caught.value.__cause__, ValueError)
    assert (model.training, model.child.training) == (True, False)
    assert random_states() == before
    assert torch.is_grad_enabled()


def test_run_lets_an_error_of_fxbasis_through() -> None:
    with pytest.raises(TraceError, match=r"^as it is$"):
        run(Noisy(TraceError("as it is")), torch.ones(1))


def test_run_lets_a_keyboard_interrupt_through() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Slow().train()
    with pytest.raises(KeyboardInterrupt):
        run(model, torch.ones(1))
    assert model.training


@pytest.mark.parametrize(
    "example",
    [(torch.ones(2), torch.ones(2)), {"x": torch.ones(2), "y": torch.ones(2)}],
    ids=["tuple", "dict"],
)
def test_run_passes_arguments_on(example: Any) -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    assert torch.equal(run(Add(), example), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    "example",
    [
        torch.ones(2, 3, 8, 8).double(),
        torch.ones(2, 1, 8, 8),
        torch.ones(5),
        (torch.ones(1),) * 2,
        {"y": torch.ones(1)},
    ],
    ids=["dtype", "channels", "shape", "too many", "keyword"],
)
def test_run_refuses_inputs_that_the_model_cannot_use(example: Any) -> None:
    with pytest.raises(
        InputError,
        match=r"the model failed on the example inputs .*; pass inputs (of the shape|in float32, or)",
    ):
        run(nn.Conv2d(3, 4, 3), example)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_with_batch_repeats_or_cuts(batch: int) -> None:
    example = {"x": torch.arange(2), "rest": (torch.ones(2, 3), torch.tensor(4.0), "text")}
    found = with_batch(example, batch)
    assert found["x"].tolist() == [0, 1, 0, 1, 0][:batch]
    assert found["rest"][0].shape == (batch, 3)
    assert found["rest"][1:] == (torch.tensor(4.0), "text")
    assert batch_size(found) == batch


def test_with_batch_of_no_samples_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(0, 3\) float32 cpu.* no sample; pass"):
        with_batch(torch.zeros(0, 3), 2)


@pytest.mark.parametrize(
    ("example", "size"),
    [
        (torch.zeros(4, 3), 4),
        ((torch.tensor(1.0), torch.zeros(3, 2)), 3),
        ({"n": 3}, 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_batch_size(example: Any, size: int) -> None:
    assert batch_size(example) == size


def test_copy_model_shares_nothing_or_its_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    apart, sharing = copy_model(model), copy_model(model, share_parameters=True)
    ours = {id(parameter) for parameter in model.parameters()}
    assert not ours & {id(parameter) for parameter in apart.parameters()}
    assert ours == {id(parameter) for parameter in sharing.parameters()}
    for copied in (apart, sharing):
        assert not {id(buffer) for buffer in model.buffers()} & {id(buffer) for buffer in copied.buffers()}
        assert not set(model.modules()) & set(copied.modules())


def test_copy_model_refuses_what_is_no_module() -> None:
    with pytest.raises(TraceError, match=r"the model is a dict; pass an nn.Module"):
        copy_model({"weight": torch.ones(1)})


MAKERS: dict[str, Callable[[nn.Conv2d], Any]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda conv: prune.random_unstructured(conv, "weight", amount=0.5),
    "cached": lambda conv: setattr(conv, "cache", conv.weight * 2),
    "cached in a list": lambda conv: setattr(conv, "cache", {"seen": [conv.weight * 2]}),
    "buffer with a history": lambda conv: conv.register_buffer("cache", conv.weight * 2),
}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("key", MAKERS)
def test_copy_model_copies_computed_tensors_without_their_history(key: str, share: bool) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.ones(1, 3, 4, 4)
    MAKERS[key](model[0])
    expected = model.eval()(x)
    before = dict(vars(model[0]))
    copied = copy_model(model, share_parameters=share)
    assert all(value is before[name] for name, value in vars(model[0]).items())
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        next(copied.parameters()).mul_(2)
    assert torch.equal(copied(x), model(x)) == share


def test_copy_model_says_what_cannot_be_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.lock = Lock()
    with pytest.raises(TraceError, match=r"Sequential cannot be deep-copied .*lock.*; take what cannot"):
        copy_model(model)


def test_snapshot_gives_buffers_and_random_states_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    before = [(id(buffer), buffer.tolist()) for buffer in model.buffers()]
    kept, values = Snapshot(model.modules()), buffer_values(model)
    drawn = torch.rand(1), random.random(), np.random.rand()
    model(torch.randn(2, 3, 4, 4))
    model[0].running_mean = torch.ones(3)
    kept.restore()
    assert [(id(buffer), buffer.tolist()) for buffer in model.buffers()] == before
    assert drawn == (torch.rand(1), random.random(), np.random.rand())
    assert list(values) == ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert torch.equal(values["0.running_mean"], torch.zeros(3))


class Versioned(nn.Linear):
    """Refuses a state_dict that does not say by which version it was written, as MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError("which version?")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_load_values_gives_the_models_own_versions_to_plain_tensors() -> None:
    model = nn.Sequential(Versioned(2, 1))
    values = {"0.weight": torch.ones(1, 2), "0.bias": torch.ones(1)}
    load_values(model, values)
    assert torch.equal(model[0].weight, torch.ones(1, 2))
    state = model.state_dict()
    state._metadata["0"]["version"] = 1
    with pytest.raises(ValueError, match="which version"):
        load_values(model, state)


def test_become_reaches_every_holder() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    held = [model[0]]
    become(model[0], nn.Conv2d(3, 8, 1))
    assert held[0] is model[0]
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 8, 2, 2)


def test_become_refuses_a_class_of_another_layout() -> None:
    class Slotted(nn.Conv2d):
        __slots__ = ("extra",)

    with pytest.raises(LayerError, match=r"Slotted cannot be exchanged.*; leave it out of layers="):
        become(Slotted(3, 4, 1), nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_of_another_dtype_than_its_inputs_has_a_remedy(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=rf"; pass inputs in {name}, or a model in float32, as model.to\("):
        run(nn.Conv2d(3, 4, 3).to(dtype), torch.zeros(1, 3, 8, 8))
