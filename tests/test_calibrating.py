"""``compress(calibration=...)``: the stages, the state that is kept, and every form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NETS, build, close
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import calibrating, compress, fold, load, plan_of, save
from fxbasis.calibrating import change_of, fit_to_data_
from fxbasis.errors import InputError
from fxbasis.passes.numbering import conv_layers
from fxbasis.recipe import FORECAST
from fxbasis.running import run
from fxbasis.structures import FORMS
from fxbasis.subjects import subject_of

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")
STAGES = ["weights", "data", "sequential", "recalibrated"]


def images(count: int = 3, channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, channels, 8, 8, generator=generator) + 0.3 for _ in range(count)]


def fit_of(small: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = getattr(small, FORECAST)["fit"]
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["plain", "grouped", "strided", "shared"])
def test_every_form_is_fitted_and_none_gets_worse(form: str, key: str) -> None:
    net, data = build(key), images()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    small = compress(net, data[0], calibration=data, size=0.4, form=form)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    fit = fit_of(small)
    assert list(fit["changes"]) == STAGES[: len(fit["changes"])]
    assert fit["images"] == 24
    assert fit["changes"][fit["kept"]] == min(fit["changes"].values())
    expected = [run(net, x) for x in data]
    assert change_of(expected, small, tuple(data)) == pytest.approx(min(fit["changes"].values()), rel=1e-9)
    assert close(fold(small)(data[0]).detach(), small(data[0]).detach())
    if form != "reduced" and plan_of(small).compressed:
        assert min(fit["changes"].values()) < fit["changes"]["weights"]


@pytest.mark.parametrize("key", NETS)
def test_a_fitted_model_is_saved_bit_by_bit(key: str, tmp_path: Path) -> None:
    net, data = build(key), images()
    small = compress(net, data[0], calibration=data, size=0.5, form="gauge")
    again = load(net, save(small, tmp_path / "folder"))
    assert torch.equal(run(again, data[1]), run(small, data[1]))
    assert getattr(again, FORECAST, {}) == getattr(small, FORECAST, {})


def test_the_stages_have_means_that_are_right() -> None:
    """After each layer by itself the BatchNorm sees the mean that it saw, and so it does at the end."""
    net, data = build("plain").double(), [x.double() for x in images()]
    with_means: list[Tensor] = []

    class Kept(calibrating._Stages):
        def done(self, stage: str) -> None:
            conv, norm = conv_layers(self.small)["conv1"], self.small.get_submodule("bn")
            with_means.append(torch.cat([norm(conv(x)).detach() for x in data]).mean((0, 2, 3)))
            super().done(stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "_Stages", Kept)
        compress(net, data[0], calibration=data, size=0.4)
    expected = torch.cat([net.bn(net.conv1(x)) for x in data]).mean((0, 2, 3)).detach()
    gaps = [float((found - expected).abs().max()) for found in with_means]
    assert gaps[0] > 1e-2
    assert max(gaps[1:3]) < 1e-6


@pytest.mark.parametrize("form", ["weight", "output"])
def test_layers_without_a_sequential_refit_have_their_mean_too(form: str) -> None:
    """The weight form has no last step, and a shared layer has none of its own."""
    key = "plain" if form == "weight" else "shared"
    net, data = build(key).double(), [x.double() for x in images()]
    small = compress(net, data[0], calibration=data, size=0.4, form=form)
    assert fit_of(small)["changes"]["data"] < fit_of(small)["changes"]["weights"]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        maps = self.head(F.relu(self.norm(self.conv(x))))
        return [{"boxes": one.flatten(1)} for one in maps]


def test_models_whose_outputs_cannot_be_compared_are_fitted_in_sequence() -> None:
    torch.manual_seed(0)
    net, data = Detector().eval(), images()
    small = compress(net, data[0], calibration=data, size=0.5)
    assert fit_of(small) == {"changes": {}, "kept": "sequential", "images": 24}

    def gap(other: nn.Module) -> float:
        pairs = [(run(net, x), run(other, x)) for x in data]
        return sum(
            float((a["boxes"] - b["boxes"]).square().sum()) for p in pairs for a, b in zip(*p, strict=True)
        )

    assert gap(small) < gap(compress(net, data[0], size=0.5))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x)))).mean((2, 3)) * scale


@pytest.mark.parametrize("kind", [tuple, dict])
def test_models_of_several_inputs_are_fitted_in_all_stages(kind: type) -> None:
    torch.manual_seed(0)
    net, scale = Two().eval(), torch.tensor(2.0)
    data = [(x, scale) if kind is tuple else {"x": x, "scale": scale} for x in images()]
    labelled = [(inputs, torch.zeros(8)) for inputs in data]
    small = compress(net, data[0], calibration=labelled, size=0.5)
    assert list(fit_of(small)["changes"]) == STAGES


def test_a_batchnorm_that_cannot_be_recalibrated_is_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    ).eval()
    data = [x[:1] for x in images()]
    assert list(fit_of(compress(net, data[0], calibration=data, size=0.5))["changes"]) == STAGES[:3]


def test_a_change_that_is_not_a_number_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, found = build("plain"), images(), iter([0.5, math.inf, 0.2, 0.3])
    monkeypatch.setattr(calibrating, "change_of", lambda *args: next(found))
    assert fit_of(compress(net, data[0], calibration=data, size=0.5))["kept"] == "sequential"
    broken = [torch.full_like(run(net, x), float("nan")) for x in data]
    assert change_of(broken, net, tuple(data)) == math.inf


def test_without_data_there_is_nothing_to_fit_to() -> None:
    net = build("plain")
    with pytest.raises(InputError, match=r"pass calibration=, some batches of inputs$"):
        fit_to_data_(net, subject_of(net, net.example, None))
    with pytest.raises(InputError, match="pass inputs of the shape"):
        compress(net, net.example, calibration=[torch.zeros(2, 5, 8, 8)])


def test_a_subject_has_a_digest_of_all_it_holds() -> None:
    net, data = build("plain"), images()
    one = subject_of(net, data[0], data).digest("a")
    assert one == subject_of(net, data[0], data).digest("a") != subject_of(net, data[0], data).digest("b")
    net.bn.num_batches_tracked += 1
    assert one != subject_of(net, data[0], data).digest("a")
