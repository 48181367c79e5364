"""Pictures: both files, what is written on them, how many marks they have, and no matplotlib left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import build
from PIL import Image

import fxbasis
from fxbasis.canvas import NAMED, width_for
from fxbasis.cli import main
from fxbasis.errors import InputError, MissingExtraError, UsageError
from fxbasis.passes.profiling import Profile
from fxbasis.pictures import draw_forecast, draw_front, draw_layers, draw_sensitivities, layers_for_report
from fxbasis.planning import ParetoFront
from fxbasis.recipe import LayerPlan, Plan
from fxbasis.sensitivities import Sensitivities, Sensitivity

RATIOS = (0.1, 0.15, 0.22, 0.3, 0.4, 0.52, 0.67, 0.85)
SVG = "{http://www.w3.org/2000/svg}"


def made(layers: int, forms: tuple[str, ...] = ("gauge", "cp"), change: float = 0.1) -> Sensitivities:
    rows = [
        Sensitivity(plan_of(number, form), 100, 100, ratio, change * (1 - ratio) / number, 0.01 * abs(change))
        for number in range(1, layers + 1)
        for form in forms
        for ratio in RATIOS
    ]
    return Sensitivities(tuple(rows), "fisher", "nats", 750, {})


def plan_of(number: int, form: str) -> LayerPlan:
    shape = {"in_channels": 8, "out_channels": 8, "kernel_size": (3, 3)}
    return LayerPlan(number=number, name=f"block{number}.conv", form=form, method="svd", ranks=(4,), **shape)


@pytest.fixture(scope="module")
def front() -> ParetoFront:
    net = build("residual")
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return fxbasis.pareto(net, net.example, calibration=data)


@pytest.fixture(scope="module")
def work() -> Profile:
    net = build("residual")
    return fxbasis.profile(fxbasis.compress(net, net.example, layers=[2, 3], size=2), net.example)


def texts(path: Path) -> str:
    return "\n".join(element.text or "" for element in ElementTree.parse(path).iter(f"{SVG}text"))


def marks(path: Path, group: str) -> int:
    """How many markers or bars the group of that id has; 0 without one."""
    groups = [g for g in ElementTree.parse(path).iter(f"{SVG}g") if g.get("id") == group]
    uses = sum(len(list(g.iter(f"{SVG}use"))) for g in groups)
    return uses or sum(len(list(g.iter(f"{SVG}path"))) for g in groups)


def check_files(paths: tuple[Path, Path], stem: Path) -> Path:
    """Both files are there and whole; returns the SVG."""
    assert paths == (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg"))
    with Image.open(paths[0]) as image:
        image.verify()
        assert image.format == "PNG"
        assert min(image.size) > 400
    assert ElementTree.parse(paths[1]).getroot().tag == f"{SVG}svg"
    assert sorted(stem.parent.iterdir()) == sorted(paths)
    return paths[1]


@pytest.mark.parametrize("layers", [1, 5, 161])
def test_sensitivities_have_a_panel_for_each_form_and_a_mark_for_each_layer(
    tmp_path: Path, layers: int
) -> None:
    svg = check_files(draw_sensitivities(made(layers), tmp_path / "a"), tmp_path / "a")
    for form in ("gauge", "cp"):
        assert [marks(svg, f"{form}-{ratio}") for ratio in (0.15, 0.3, 0.52, 0.85)] == [layers] * 4
        assert f"{form}: change (nats)" in texts(svg)
    assert "estimator fisher, 750 images, bars: standard error" in texts(svg)
    assert "convolution, by number" in texts(svg)
    assert ("block1.conv" in texts(svg)) == (layers <= NAMED)
    assert marks(svg, "output-0.15") == 0


def test_a_form_that_a_layer_does_not_have_leaves_a_gap(tmp_path: Path) -> None:
    rows = [row for row in made(5) if (row.layer.number, row.layer.form) != (3, "cp")]
    svg = draw_sensitivities(Sensitivities(tuple(rows), "fisher", "nats", 750, {}), tmp_path / "a")[1]
    assert (marks(svg, "cp-0.3"), marks(svg, "gauge-0.3")) == (4, 5)


def test_what_is_zero_or_below_is_drawn_too(tmp_path: Path) -> None:
    rows = [*made(2), *made(1, change=0.0), *made(1, change=-0.1)]
    svg = draw_sensitivities(Sensitivities(tuple(rows), "evaluate", "of the score", 0, {}), tmp_path / "a")[1]
    assert "estimator evaluate, no images" in texts(svg)
    assert draw_sensitivities(made(2, change=0.0), tmp_path / "b")[1].is_file()


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sensitivities to draw; choose other layers or forms"):
        draw_sensitivities(made(0), tmp_path / "a")


def test_the_front_with_a_plan_and_its_measured_changes(tmp_path: Path, front: ParetoFront) -> None:
    found = front.within({"macs": 0.6})
    fit = {"changes": {"weights": 0.3, "data": 0.2, "sequential": 0.1, "recalibrated": 0.15}}
    measured = Plan(found.layers, {**found.forecast, "fit": fit})
    svg = check_files(draw_front(front, tmp_path / "a", measured), tmp_path / "a")
    assert marks(svg, "front") == marks(svg, "chosen") == 1
    assert [marks(svg, f"measured-{stage}") for stage in fit["changes"]] == [1] * 4
    written = texts(svg)
    assert "MACs over those of the original" in written
    assert "change (nats)" in written
    assert f"MACs of the whole model; {len(front):,} plans" in written
    assert "budget" in written


def test_the_front_alone_and_with_several_plans(tmp_path: Path, front: ParetoFront) -> None:
    alone = draw_front(front, tmp_path / "a")[1]
    assert (marks(alone, "front"), marks(alone, "chosen")) == (1, 0)
    several = draw_front(front, tmp_path / "b", [front.plan(0), front.plan(len(front) // 2)])[1]
    assert marks(several, "chosen") == 2
    assert "budget" not in texts(several)


def test_a_plan_without_a_forecast_is_refused(tmp_path: Path, front: ParetoFront) -> None:
    with pytest.raises(InputError, match="has no forecast; mark plans that `plan` or `pareto` made"):
        draw_front(front, tmp_path / "a", Plan(front.plan(0).layers))


def test_layers_have_two_bars_each_and_times_where_given(tmp_path: Path, work: Profile) -> None:
    net = build("residual")
    record = fxbasis.number_convs(net, net.example)[1]
    times = fxbasis.measure_layer(record, forms=["output"], ranks=[2], cache=tmp_path / "times.json")
    (tmp_path / "b").mkdir()
    stem = tmp_path / "b" / "layers"
    svg = check_files(draw_layers(work, stem, {2: times}), stem)
    assert [marks(svg, f"macs-{when}-{n}") for when in ("before", "after") for n in (1, 2, 3)] == [1] * 6
    assert [marks(svg, f"time-after-{n}") for n in (1, 2, 3)] == [0, 1, 0]
    for text in ("MACs (batch 2)", "time (ms, threads: 1)", "left dense", "after, output", "before"):
        assert text in texts(svg)
    assert "FLOPs = 2 x MACs" in texts(svg)


def test_times_of_another_rank_and_no_layers_are_refused(tmp_path: Path, work: Profile) -> None:
    net = build("residual")
    record = fxbasis.number_convs(net, net.example)[1]
    times = fxbasis.measure_layer(record, forms=["output"], ranks=[4], cache=tmp_path / "times.json")
    with pytest.raises(InputError, match=r"the output form at rank .* was not measured"):
        draw_layers(work, tmp_path / "a", {2: times})
    with pytest.raises(InputError, match="no convolution to draw; profile a model that has some"):
        draw_layers(fxbasis.profile(torch.nn.Linear(3, 2), torch.zeros(1, 3)), tmp_path / "a")


@pytest.mark.parametrize("worst", [0.5, 0.0, -0.2])
def test_a_forecast_has_a_mark_for_each_pair(tmp_path: Path, worst: float) -> None:
    pairs = [(0.01 * n, 0.011 * n) for n in range(1, 8)] + [(0.4, worst)]
    svg = check_files(draw_forecast(pairs, tmp_path / "a", told="one layer, 8 images"), tmp_path / "a")
    assert marks(svg, "pairs") == 8
    for text in ("predicted change (nats)", "measured change (nats)", "one layer, 8 images; 8 pairs"):
        assert text in texts(svg)


def test_a_single_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 pairs is no picture; pass two or more"):
        draw_forecast([(0.1, 0.1)], tmp_path / "a")


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    first, again = (draw_sensitivities(made(3), tmp_path / name)[1] for name in "ab")
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a"])
def test_the_endings_of_a_path_are_its_own(tmp_path: Path, name: str) -> None:
    check_files(draw_sensitivities(made(2), tmp_path / name), tmp_path / "a")


def test_pictures_grow_with_the_layers_up_to_a_width() -> None:
    assert width_for(1) == 7 < width_for(20) < width_for(161) <= width_for(10_000) == 17


Draw = Callable[[Path], object]
DRAWN: dict[str, Draw] = {
    "sensitivities": lambda path: draw_sensitivities(made(2), path),
    "forecast": lambda path: draw_forecast([(0.1, 0.1), (0.2, 0.2)], path),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, draw: Draw) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*a\.png"):
        draw(tmp_path / "missing" / "a")


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pictures need matplotlib .*pip install "fxbasis\[plot\]"$'):
        draw(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_report_shows_the_layers_or_says_what_is_missing(
    tmp_path: Path, work: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layers_for_report(work, tmp_path).endswith("(layers.svg)")
    check_files((tmp_path / "layers.png", tmp_path / "layers.svg"), tmp_path / "layers")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert layers_for_report(work, tmp_path).startswith("No picture of the layers: pictures need matplotlib")


def test_no_pyplot_and_no_setting_stays(tmp_path: Path) -> None:
    code = (
        "import sys, matplotlib\n"
        "def settings():  # but the backend, which is looked for when it is read\n"
        "    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "from fxbasis.pictures import draw_forecast\n"
        f"draw_forecast([(0.1, 0.1), (0.2, 0.3)], {str(tmp_path / 'a')!r})\n"
        "print('matplotlib.pyplot' in sys.modules, before == settings())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


SOURCE = """
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(SOURCE)
    return f"{tmp_path / 'nets.py'}:net"


def test_sensitivities_and_plan_draw_on_the_command_line(source: str, tmp_path: Path) -> None:
    common = [source, "--input", "1x3x8x8", "--picture"]
    assert main(["sensitivities", *common, str(tmp_path / "one.svg")]) == 0
    assert "estimator weight, no images" in texts(tmp_path / "one.svg")
    out = ["--out", str(tmp_path / "plan.json")]
    out.append("--keep-if-slower")
    assert main(["plan", *common, str(tmp_path / "front"), "--macs", "0.6", *out]) == 0
    assert "MACs over those of the original" in texts(tmp_path / "front.svg")
    assert main(["plan", *common, str(tmp_path / "front"), "--params", "0.6", *out]) == 0
    assert "parameters over those of the original" in texts(tmp_path / "front.svg")
    names = {"nets.py", "one.png", "one.svg", "front.png", "front.svg", "plan.json"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == names


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, picture = tmp_path / "plan.json", tmp_path / "missing" / "a"
    common = [source, "--input", "1x3x8x8", "--macs", "0.6", "--out", str(plan)]
    assert main(["plan", *common, "--picture", str(picture)]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not plan.exists()
