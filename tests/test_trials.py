"""The runs that prove a trace: other batches and image sizes in both modes, and nothing left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxbasis import InputError
from fxbasis.passes.trials import run_trials


class Watched(nn.Module):
    """Notes what it is given, and refuses what ``takes`` does not allow."""

    def __init__(self, takes: Any = lambda shape, training: True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.takes = takes
        seen: list[tuple[tuple[int, ...], bool]] = []
        self.seen = lambda: seen  # attributes are put back after a trial, closures are not

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes(tuple(x.shape), self.training):
            raise ValueError("not this")
        self.seen().append((tuple(x.shape), self.training))
        return self.bn(x) + torch.rand(1)


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((1, 3, 224, 224), (2, 3, 64, 96)),
        ((2, 3, 8, 10), (3, 3, 16, 30)),
        ((4, 3, 64, 96), (5, 3, 96, 64)),
        ((1, 3, 100, 60), (2, 3, 64, 96)),
    ],
)
def test_batch_and_image_size_change_at_once(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    model = Watched()
    assert len(run_trials(model, torch.zeros(shape))) == 3
    assert model.seen() == [(shape, False), (other, False), (other, True)]


def test_one_after_the_other_where_the_model_takes_only_that() -> None:
    model = Watched(lambda shape, training: shape[0] == 2 or shape[-1] == 8)
    run_trials(model, torch.zeros(2, 3, 8, 8))
    assert {shape for shape, _ in model.seen()} == {(2, 3, 8, 8), (3, 3, 8, 8), (2, 3, 16, 24)}


def test_a_larger_size_where_the_small_one_is_refused() -> None:
    model = Watched(lambda shape, training: min(shape[-2:]) > 100)
    run_trials(model, torch.zeros(1, 3, 224, 224))
    assert ((1, 3, 192, 160), False) in model.seen()


def test_fixed_shapes_leave_the_example_in_both_modes() -> None:
    model = Watched(lambda shape, training: shape == (2, 3, 8, 8))
    found = run_trials(model, torch.rand(2, 3, 8, 8))
    assert list(found) == ["the example in eval()", "the example in train()"]
    found = run_trials(model, torch.zeros(2, 3, 8, 8))
    assert list(found) == [
        "the example in eval()",
        "random values in eval()",
        "random values in train()",
    ]


def test_no_train_where_the_model_refuses_it() -> None:
    model = Watched(lambda shape, training: not training)
    assert all("eval()" in what for what in run_trials(model, torch.zeros(2, 3, 8, 8)))


def test_failing_on_the_example_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match=r"not this; pass inputs of the shape"):
        run_trials(Watched(lambda shape, training: False), torch.zeros(2, 3, 8, 8))


def test_nothing_is_left_behind_and_runs_repeat() -> None:
    model = Watched()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = run_trials(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (output, buffers) = found["another batch and image size in train()"]
    assert buffers["bn.num_batches_tracked"] == 1
    assert output.shape == (3, 3, 16, 24)
