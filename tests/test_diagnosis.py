"""``doctor`` says before any work what a compression would meet, and its forecast is what compress does."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import FxBasisWarning, InputError, LayerError, compress, doctor, profile
from fxbasis.cli import main

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.shape[0] > 2 else self.body(x * 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv2d(8, 1, 1)
        self.part = Branching()
        self.idle = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.stem(x)))
        return self.head(self.part(x + self.narrow(x)).mean((2, 3)))


def test_statuses_parts_and_the_obstacles_line() -> None:
    found = doctor(Net().eval(), X)
    statuses = {record.name: record.status for record in found.convs}
    assert statuses == {
        "stem": "ok",
        "depthwise": "unsupported",
        "narrow": "no gain at any rank",
        "part.body.0": "ok",
        "part.body.2": "ok",
        "idle": "unsupported",
    }
    assert [(part.name, part.graph) for part in found.parts] == [
        ("", True),
        ("part", False),
        ("part.body", True),
    ]
    (obstacle,) = found.python_parts
    assert "test_diagnosis.py:" in obstacle.reason
    assert found.part_of("part.body.0").name == "part.body"
    assert found.part_of("stem").name == ""


@pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")
def test_the_outlook_is_what_compress_does() -> None:
    model = Net().eval()
    found = doctor(model, X)
    for size in (0.75, 0.5, 0.25):
        work = profile(compress(model, X, size=size), X)
        assert work.macs / work.macs_before == pytest.approx(found.outlook[str(size)], abs=1e-12)
    floor = profile(compress(model, X, size=1), X)
    assert floor.macs / floor.macs_before == pytest.approx(found.outlook["floor"], abs=1e-12)
    assert found.macs == profile(model, X).macs


def test_it_warns_of_nothing_and_leaves_the_model_alone(recwarn: pytest.WarningsRecorder) -> None:
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    doctor(model, X)
    assert not [entry for entry in recwarn if issubclass(entry.category, FxBasisWarning)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_text_names_all_that_matters() -> None:
    text = str(doctor(Net().eval(), X))
    for part in (
        "R*",
        "depthwise: a group of one filter",
        "not called",
        "stays Python",
        "at size=0.5",
        "graphs",
    ):
        assert part in text


class CallsFunctional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, torch.eye(3)[..., None, None]))


def test_functional_convolutions_are_listed() -> None:
    found = doctor(CallsFunctional().eval(), X)
    assert "weight (3, 3, 1, 1), output 16x16, 1 call, 4,608 MACs: functional: not a Conv2d" in str(found)
    assert [call["macs"] for call in found.to_dict()["functional"]] == [4608]


def test_weights_that_compress_refuses_are_not_ok() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    found = doctor(model, X)
    assert [record.status for record in found.convs] == ["ok", "unsupported", "ok"]
    assert "unsupported: 1 of its weights are NaN or infinite" in str(found)
    with pytest.raises(LayerError, match="1 of its weights are NaN or infinite"):
        compress(model, X)


def test_weights_without_data_are_not_ok() -> None:
    found = doctor(nn.Sequential(nn.Conv2d(3, 8, 3)).to("meta"), X.to("meta"))
    assert found.convs[0].reason == "its weight is on the meta device and has no data"
    assert "there is nothing to compress" in str(found)


def test_nothing_to_gain() -> None:
    assert "nothing to compress" in str(doctor(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), X))
    assert "nothing to compress" in str(doctor(nn.Sequential(nn.Conv2d(3, 1, 1)), X))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="pass inputs of the shape"):
        doctor(Net(), torch.zeros(1, 4, 8, 8))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"{__file__}:Net", "--input", "1x3x16x16"]) == 0
    assert "6 convolutions: 3 ok" in capsys.readouterr().out
    assert main(["doctor", f"{__file__}:Net", "--input", "1x3x16x16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["convs"][0]["break_even_rank"] == pytest.approx(8 * 27 / 35)
    assert [part["name"] for part in found["parts"]] == ["", "part", "part.body"]
    assert main(["doctor", f"{__file__}:Net", "--input", "1x1x16x16"]) == 2
