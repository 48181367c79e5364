"""``report`` of compressed models as they are used: trained, recalibrated, or of another original."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fxbasis import VerificationError, compress, recalibrate_batchnorm_, report

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
CHECKS = [
    "rewritten, to the",
    "folded, to the",
    "saved and loaded",
    "ONNX Runtime, orig",
    "ONNX Runtime, comp",
]


def net(*, bias: bool = True, activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.Identity() if bias else nn.BatchNorm2d(16)
    convs = [nn.Conv2d(channels, 16, 3, bias=bias) for channels in (3, 16)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(convs[0], norm, activation or nn.ReLU(), convs[1], *head).eval()


def train(small: nn.Module) -> None:
    optimizer = torch.optim.SGD(small.train().parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(small(X), torch.arange(4)).backward()
        optimizer.step()
    small.eval()


@pytest.mark.parametrize("change", ["train", "recalibrate"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_was_changed_is_checked_with_its_own_weights(
    change: str, bias: bool, tmp_path: Path
) -> None:
    small = compress(net(bias=bias), X, layers="re:.*")
    train(small) if change == "train" else recalibrate_batchnorm_(small, [3 * X])
    found = report(net(bias=bias), small, X, tmp_path, runs=1)
    assert [name[: len(check)] for name, check in zip(found.differences, CHECKS, strict=True)] == CHECKS


def test_the_code_of_another_model_is_refused(tmp_path: Path) -> None:
    small = compress(net(), X, layers="re:.*")
    train(small)
    with pytest.raises(VerificationError, match="the original with the folded weights: outputs differ"):
        report(net(activation=nn.Tanh()), small, X, tmp_path, runs=1)
    assert not list(tmp_path.iterdir())
