"""BatchNorm recalibration: statistics by hand, and everything else as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxbasis
from fxbasis import InputError, recalibrate_batchnorm_
from fxbasis.calibration_data import checked, inputs_of


class Net(nn.Module):
    """norm1 sees the input, norm2 sees dropout of a 1x1 convolution of it; spare is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv, self.drop = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Dropout(0.5)
        self.norm2, self.spare = nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(2)
        self.loose = nn.BatchNorm2d(4, track_running_stats=False)
        for norm in (self.norm1, self.norm2, self.spare):
            norm.running_mean.fill_(5.0)
            norm.running_var.fill_(7.0)
            norm.num_batches_tracked.fill_(11)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.loose(self.norm2(self.drop(self.conv(x))) + self.norm1(x).mean())
        return found


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 5, 5, generator=generator) * 2 + 1 for _ in range(count)]


def means_and_variances(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each channel: means of the batches' means and unbiased variances."""
    rows = [value.transpose(0, 1).flatten(1) for value in values]
    return torch.stack([row.mean(1) for row in rows]).mean(0), torch.stack([row.var(1) for row in rows]).mean(
        0
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_statistics_are_those_of_the_batches() -> None:
    net, data = Net(), batches()
    assert recalibrate_batchnorm_(net, data) == 2
    with torch.no_grad():
        seen = {net.norm1: data, net.norm2: [net.conv(batch) for batch in data]}  # dropout in eval mode
    for norm, values in seen.items():
        mean, variance = means_and_variances(values)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
        assert int(norm.num_batches_tracked) == 4


def test_the_mean_of_equal_batches_is_that_of_the_data() -> None:
    norm, data = nn.BatchNorm2d(3), batches()
    recalibrate_batchnorm_(norm, data)
    torch.testing.assert_close(norm.running_mean, torch.cat(data).mean((0, 2, 3)))


def test_nothing_but_the_statistics_changes() -> None:
    net = Net().train()
    net.norm1.eval()
    net.conv.eval()
    modes = [module.training for module in net.modules()]
    before, states = state_of(net), (torch.get_rng_state(), random.getstate())
    recalibrate_batchnorm_(net, DataLoader(TensorDataset(torch.cat(batches())), batch_size=8, shuffle=True))
    after = state_of(net)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"norm{number}.{name}"
        for number in (1, 2)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert [module.training for module in net.modules()] == modes
    assert (net.norm1.momentum, net.norm2.momentum, net.spare.momentum) == (0.1, 0.3, 0.1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_second_time_gives_the_same() -> None:
    net, data = Net(), batches()
    recalibrate_batchnorm_(net, data)
    first = state_of(net)
    recalibrate_batchnorm_(net, data)
    assert all(torch.equal(value, first[name]) for name, value in state_of(net).items())


def test_a_shared_norm_averages_its_calls() -> None:
    norm, data = nn.BatchNorm2d(3, affine=False), batches(1)
    assert recalibrate_batchnorm_(nn.Sequential(norm, nn.ReLU(), norm), data) == 1
    assert int(norm.num_batches_tracked) == 2


def test_no_batchnorm_is_no_work() -> None:
    never = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))
    assert recalibrate_batchnorm_(never, [torch.zeros(1, 1, 2, 2)]) == 0


def test_a_failure_leaves_the_model_as_it_was() -> None:
    net = Net()
    before, modes = state_of(net), [module.training for module in net.modules()]
    with pytest.raises(InputError, match=r"the model failed on .*\(2, 9\) float32 cpu.*; pass inputs of the"):
        recalibrate_batchnorm_(net, [*batches(), torch.zeros(2, 9)])
    assert all(torch.equal(value, before[name]) for name, value in state_of(net).items())
    assert [module.training for module in net.modules()] == modes
    assert net.norm2.momentum == 0.3


def test_a_compressed_model_and_its_fold_get_the_same_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()).eval()
    small = fxbasis.compress(model, batches(1)[0], size=2)
    recalibrate_batchnorm_(small, batches())
    dense = fxbasis.fold(small)
    folded = {name: value for name, value in dense.state_dict().items() if name.startswith("1.running")}
    recalibrate_batchnorm_(dense, batches())
    assert folded
    for name, value in folded.items():
        torch.testing.assert_close(dense.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["tensor", "dict", "pair", "list", "pair with a dict"])
def test_batches_of_every_kind(kind: str) -> None:
    wrap: dict[str, Any] = {
        "tensor": lambda x: x,
        "dict": lambda x: {"input": x},
        "pair": lambda x: (x, torch.zeros(8)),
        "list": lambda x: [x, torch.zeros(8)],
        "pair with a dict": lambda x: ({"input": x}, 3),
    }
    plain, norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    recalibrate_batchnorm_(plain, batches())
    recalibrate_batchnorm_(norm, [wrap[kind](batch) for batch in batches()])
    assert torch.equal(plain.running_mean, norm.running_mean)


def test_positional_arguments_stand_in_a_tuple_of_their_own() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert inputs_of(((one, two), 3)) == (one, two)


class Stream(IterableDataset[Tensor]):
    """So many random images, without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.rand(self.count, 3, 4, 4))


def test_data_without_a_length() -> None:
    state = torch.get_rng_state()
    assert recalibrate_batchnorm_(nn.BatchNorm2d(3), DataLoader(Stream(8), batch_size=4)) == 1
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match=r"\(DataLoader\) has no batch; pass at least one"):
        checked(DataLoader(Stream(0), batch_size=4))


def test_refusals() -> None:
    norm = nn.BatchNorm2d(3)
    for data in (iter(batches()), (batch for batch in batches())):
        with pytest.raises(InputError, match=r"can be read only once; pass a list or a DataLoader"):
            recalibrate_batchnorm_(norm, data)
    for single in (batches()[0], {"x": 1}, 3, "images"):
        with pytest.raises(InputError, match=r"is a \w+; pass a list of batches, or a DataLoader"):
            recalibrate_batchnorm_(norm, single)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data \(list\) has no batch; pass at least one"):
        recalibrate_batchnorm_(norm, [])
    with pytest.raises(InputError, match=r"a batch is an empty tuple; pass \(input, labels\)"):
        recalibrate_batchnorm_(norm, [()])
    with pytest.raises(InputError, match=r"gives the model a str; pass batches that are, or begin with"):
        recalibrate_batchnorm_(norm, [("images", 3)])
