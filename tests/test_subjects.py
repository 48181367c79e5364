"""The model under study: its digest, by which measured points and statistics are known again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from safetensors.torch import save_file
from torch import Tensor, nn

from fxbasis import compress, plan, plan_of, sensitivities, subjects
from fxbasis.datafit import fit_to_data
from fxbasis.errors import InputError
from fxbasis.factors import folded
from fxbasis.recipe import LayerPlan
from fxbasis.subjects import subject_of

SUMS = ("mean", "moment", "metric")


def test_the_digest_takes_scalars_of_batchnorm_and_tells_weights_and_data_apart() -> None:
    net, data = build("plain"), torch.randn(2, 3, 8, 8)
    first = subject_of(net, net.example, [data]).digest("measured")
    assert subject_of(net, net.example, [data]).digest("measured") == first
    assert subject_of(net, net.example, [data + 1]).digest("measured") != first
    net.bn.num_batches_tracked += 1
    assert subject_of(net, net.example, [data]).digest("measured") != first


def test_statistics_are_kept_for_the_same_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data, path = build("plain"), torch.randn(2, 3, 8, 8), tmp_path / "sums.safetensors"
    first = subject_of(net, net.example, [data], path).statistics
    with monkeypatch.context() as patch:
        patch.setattr(subjects, "collect", None)
        again = subject_of(net, net.example, [data], path).statistics
    assert list(again) == list(first)
    for name, one in first.items():
        assert all(torch.equal(getattr(again[name], sums), getattr(one, sums)) for sums in SUMS)
        assert (again[name].positions, again[name].samples) == (one.positions, one.samples)
    other = subject_of(net, net.example, [data + 1], path).statistics["conv1"]
    assert not torch.equal(other.mean, first["conv1"].mean)
    assert torch.equal(subject_of(net, net.example, [data + 1], path).statistics["conv1"].mean, other.mean)


class Texts(nn.Module):
    """Its outputs cannot be compared, so that there is no Fisher metric."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return self.features(x).argmax(1)


def test_without_a_fisher_metric_errors_count_as_after_the_batchnorm() -> None:
    norm, data = nn.BatchNorm2d(8), torch.randn(16, 3, 8, 8)
    norm.weight.data.uniform_(0.1, 3)
    norm.running_var.uniform_(0.01, 4)
    net = Texts(norm).eval()
    found = subject_of(net, data[:1], [data])
    assert not found.comparable
    metrics = [one.metric for one in found.statistics.values()]
    gain = norm.weight.detach().double() ** 2 / (norm.running_var.double() + norm.eps)
    torch.testing.assert_close(metrics[0], torch.diag(gain))
    assert torch.equal(metrics[1], torch.eye(4, dtype=torch.float64))


def test_the_metric_of_the_batchnorm_lowers_the_error_behind_it() -> None:
    """A fit in it is the best behind the BatchNorm, one with equal weights the best before it."""
    norm, data = nn.BatchNorm2d(8), torch.randn(64, 3, 8, 8)
    norm.weight.data.copy_(torch.logspace(-2, 1, 8))
    net, errors = Texts(norm).eval(), {}
    subject = subject_of(net, data[:1], [data])
    name, statistics = next(iter(subject.statistics.items()))
    shape: dict[str, Any] = {
        "number": 1,
        "name": name,
        "in_channels": 3,
        "out_channels": 8,
        "kernel_size": (3, 3),
    }
    plan = LayerPlan(**shape, form="output", method="svd", ranks=(4,))
    for which, metric in {"norm": statistics.metric, "equal": torch.eye(8, dtype=torch.float64)}.items():
        weights = fit_to_data(subject.weight(name), plan, statistics.covariance, metric)
        shift = (folded(plan, weights) - subject.weight(name)).float()
        errors[which] = [float(scale * part.square().mean()) for scale, part in behind(shift, norm, data)]
    assert sum(errors["norm"]) < 0.5 * sum(errors["equal"])


def behind(shift: Tensor, norm: nn.BatchNorm2d, data: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each channel the gain of the BatchNorm, and the centred error before it."""
    error = nn.functional.conv2d(data, shift)
    gain = norm.weight.detach() ** 2 / (norm.running_var + norm.eps)
    return list(zip(gain, (error - error.mean((0, 2, 3), keepdim=True)).unbind(1), strict=True))


def test_kept_statistics_give_the_same_plan(tmp_path: Path) -> None:
    net, path = build("plain"), tmp_path / "sums.safetensors"
    how = {"calibration": [torch.randn(4, 3, 8, 8)], "macs": 0.7, "forms": ["gauge"]}
    found = [plan(net, net.example, statistics=path, **how) for _ in range(2)]
    assert found[0].forecast == found[1].forecast == plan(net, net.example, **how).forecast
    small = compress(net, net.example, statistics=path, **how)
    assert plan_of(small).layers == found[0].layers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tensors", "is no file of statistics.*name of a new file$"),
        (None, "holds other tensors; pass the"),
    ],
)
def test_other_files_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    net, path = build("plain"), tmp_path / "sums.safetensors"
    if content is None:
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        subject_of(net, net.example, [net.example], path).statistics  # noqa: B018
    with pytest.raises(InputError, match="pass calibration= too"):
        sensitivities(net, net.example, statistics=path)
