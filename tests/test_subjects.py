"""The model under study: its digest, by which measured points and statistics are known again."""

from pathlib import Path

import pytest
import torch
from conftest import build
from safetensors.torch import save_file

from fxbasis import compress, plan, plan_of, sensitivities, subjects
from fxbasis.errors import InputError
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
