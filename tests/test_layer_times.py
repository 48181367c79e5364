"""measure_layer and time_ratio: real times, the graphs that are timed, the staircase, and the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from fxbasis import (
    ExportError,
    FxBasisWarning,
    InputError,
    SelectionError,
    compress,
    export_onnx,
    measure_layer,
)
from fxbasis.cli import main
from fxbasis.export import layer_times
from fxbasis.export.checking import open_session
from fxbasis.export.layer_graphs import geometry_of, layer_graph
from fxbasis.export.layer_times import FormTime, LayerTimes, time_ratio
from fxbasis.export.time_cache import Timing, default_path
from fxbasis.passes.numbering import number_convs
from fxbasis.passes.ranking import ranks_by_size
from fxbasis.passes.records import ConvRecord
from fxbasis.structures import FORMS


def record_of(conv: nn.Conv2d, size: int, batch: int = 1) -> ConvRecord:
    return number_convs(conv, torch.zeros(batch, conv.in_channels, size, size))[0]


SMALL = record_of(nn.Conv2d(8, 16, 3, padding=1), 6)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is really measured, with a made-up time."""
    made: list[Any] = []

    def timed(*what: Any) -> Timing:
        made.append(what)
        return Timing(0.25 * len(made), 2.0)

    monkeypatch.setattr(layer_times, "timed", timed)
    return made


def test_a_quarter_of_the_filters_is_faster_than_dense_and_more_work_is_slower() -> None:
    record = record_of(nn.Conv2d(256, 256, 3, padding=1), 14)
    times = measure_layer(record, forms=["output", "cp"], ranks=[64, 2304], cache=False)
    assert times.ratio("output", 64) < 0.7  # 0.28 of the MACs
    assert times.ratio("cp", 2304) > 1.5  # 2.0 of the MACs
    assert 0.7 < times.control < 1.4
    assert times.dense_ms > 0.1
    assert times.break_even("output") == (64,)


def test_full_rank_is_slower_than_dense() -> None:
    record = record_of(nn.Conv2d(512, 512, 3, padding=1), 7)
    assert time_ratio(record, "output", (512,), cache=False) > 1.0  # 1.11 of the MACs
    assert time_ratio(record, "weight", (512,), cache=False) == time_ratio(record, "dense", ()) == 1.0


CONVS = [
    nn.Conv2d(8, 16, 3, stride=2, padding=1),
    nn.Conv2d(8, 16, (3, 5), padding=(0, 2), dilation=(2, 1), bias=False),
    nn.Conv2d(8, 16, 3, padding="same", groups=2),
    nn.Conv2d(8, 16, 4, padding=1),
    nn.Conv2d(8, 16, 1, stride=(1, 3)),
]


@pytest.mark.parametrize("form", ["dense", *FORMS])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_the_graph_gives_the_shape_of_the_convolution(conv: nn.Conv2d, form: str) -> None:
    record = record_of(conv, 9, batch=2)
    ranks = () if form == "dense" else ranks_by_size(record, 4, form)
    graph = layer_graph(geometry_of(record), form, ranks)
    onnx.checker.check_model(onnx.load_from_string(graph))
    (output,) = open_session(graph, 1).run(None, {"input": torch.zeros(2, 8, 9, 9).numpy()})
    assert output.shape == conv(torch.zeros(2, 8, 9, 9)).shape


@pytest.mark.parametrize("form", ["output", "gauge", "cp4"])
def test_the_nodes_are_those_of_the_export(form: str, tmp_path: Path) -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    small = compress(conv, torch.zeros(1, 8, 6, 6), layers=1, size=4, form=form)
    exported = onnx.load(
        export_onnx(small, torch.zeros(1, 8, 6, 6), tmp_path / "f.onnx", dynamic_batch=False).path
    )
    record = record_of(conv, 6)
    ours = onnx.load_from_string(layer_graph(geometry_of(record), form, ranks_by_size(record, 4, form)))
    assert [node.op_type for node in ours.graph.node] == [node.op_type for node in exported.graph.node]
    assert [_shapes(ours, node) for node in ours.graph.node] == [
        _shapes(exported, node) for node in exported.graph.node
    ]


def _shapes(model: Any, node: Any) -> list[Any]:
    held = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return [held[name] for name in node.input if name in held]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_the_batch_and_the_padding_come_from_the_record() -> None:
    geometry = geometry_of(record_of(nn.Conv2d(8, 16, 4, padding="same"), 9, batch=3))
    assert (geometry.batch, geometry.padding, geometry.input_size) == (3, (1, 1, 2, 2), (9, 9))
    shared = nn.Conv2d(8, 8, 3, padding=1)
    assert geometry_of(number_convs(nn.Sequential(shared, shared), torch.zeros(5, 8, 4, 4))[0]).batch == 5


def times_of(*times: float) -> LayerTimes:
    rows = tuple(FormTime("output", (8 * i,), 0.1 * i, time) for i, time in enumerate(times, 1))
    return LayerTimes("conv 1 (x)", geometry_of(SMALL), 1, "onnxruntime", 2.0, 1.0, rows)


def test_steps_are_the_largest_ranks_of_flat_stretches() -> None:
    times = times_of(0.30, 0.305, 0.5, 0.51, 0.49, 0.8, 1.1)
    assert times.steps("output") == ((16,), (40,), (48,), (56,))
    assert times.break_even("output") == (48,)
    assert times.steps("gauge") == ()
    assert times.break_even("gauge") is None
    slow = times_of(*(1 + 0.02 * i for i in range(4)))  # slow growth is no flat stretch
    assert slow.steps("output") == ((16,), (32,))


def test_the_table_names_all(counted: list[Any]) -> None:
    times = measure_layer(SMALL, forms=["output", "tucker2", "weight"], ranks=[4, 6], threads=2, cache=False)
    text = str(times)
    assert "conv 1 (), weight (16, 8, 3, 3), input 6x6, batch 1: dense 2.000 ms, 0.250 times itself" in text
    assert "2 threads" in text
    assert [line.split()[:2] for line in text.splitlines()[4:]] == [
        ["output", "4"],
        ["output", "6"],
        ["tucker2", "4,"],
        ["tucker2", "6,"],
        ["weight", "4"],
        ["weight", "6"],
    ]
    assert json.loads(json.dumps(times.to_dict()))["rows"][3]["ranks"] == [6, 6]
    assert times.ratio("tucker2", (6, 6)) == 1.25
    assert times.ratio("weight", 4) == 1.0
    assert len(counted) == 5
    with pytest.raises(InputError, match=r"the gauge form at rank 4 was not measured.*ranks=\[4\]\)"):
        times.ratio("gauge", 4)


@pytest.mark.parametrize("conv", [nn.Conv2d(512, 512, 3), nn.Conv2d(64, 64, 3, groups=4), nn.Conv2d(3, 4, 1)])
def test_the_ranks_by_default_are_multiples_of_eight_in_each_group(
    counted: list[Any], conv: nn.Conv2d
) -> None:
    times = measure_layer(record_of(conv, 8), cache=False)
    for form in sorted({*FORMS} - {"weight"}):
        rows = [row for row in times.rows if row.form == form]
        assert 1 <= len(rows) <= 32
        assert all(row.macs_ratio <= 1.2 or len(rows) == 1 for row in rows)
        if conv.in_channels > 3 and len(rows[0].ranks) == 1:
            assert all(row.ranks[0] % (8 * conv.groups) == 0 for row in rows)


def test_the_second_call_reads_the_file_and_runs_nothing(counted: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "times.jsonl"
    first = measure_layer(SMALL, forms=["output", "cp"], ranks=[4, 8], cache=file)
    assert len(counted) == 5
    layer_times.times_at.cache_clear()  # as another process
    assert measure_layer(SMALL, forms=["output", "cp"], ranks=[4, 8], cache=file) == first
    assert time_ratio(replace(SMALL, name="another", index=7), "cp", (8,), cache=file) == first.ratio("cp", 8)
    assert len(counted) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda record: (record, "output", (4,), 2),
        lambda record: (record, "output", (5,), 1),
        lambda record: (record, "gauge", (4,), 1),
        lambda record: (replace(record, stride=(2, 2), output_size=(3, 3)), "output", (4,), 1),
        lambda record: (replace(record, input_size=(7, 7), output_size=(7, 7)), "output", (4,), 1),
        lambda record: (record_of(nn.Conv2d(8, 16, 3, padding=1), 6, batch=2), "output", (4,), 1),
    ],
    ids=["threads", "ranks", "form", "stride", "size", "batch"],
)
def test_every_part_of_the_key_counts(counted: list[Any], tmp_path: Path, change: Callable[..., Any]) -> None:
    file = tmp_path / "times.jsonl"
    time_ratio(SMALL, "output", (4,), cache=file)
    time_ratio(*change(SMALL), cache=file)
    assert len(counted) == 2


@pytest.mark.parametrize("part", ["runtime", "processor"])
def test_another_runtime_or_processor_measures_again(
    counted: list[Any], tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_ratio(SMALL, "output", (4,), cache=tmp_path / "times.jsonl")
    monkeypatch.setattr(layer_times, part, lambda: "another")
    time_ratio(SMALL, "output", (4,), cache=tmp_path / "times.jsonl")
    assert len(counted) == 2


def test_a_damaged_cache_is_ignored_with_a_warning(counted: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "times.jsonl"
    time_ratio(SMALL, "output", (4,), cache=file)
    time_ratio(SMALL, "output", (5,), cache=file)
    good, cut = file.read_bytes().strip().splitlines()
    negative = json.dumps({**json.loads(good), "ratio": -1}).encode()
    file.write_bytes(b"\n".join([b"\xff\x00", b"[]", b"3", negative, good, cut[:-9]]))
    with pytest.warns(FxBasisWarning, match=r"times\.jsonl: 5 lines are damaged and ignored; delete"):
        assert time_ratio(SMALL, "output", (4,), cache=file) == 0.25
    assert time_ratio(SMALL, "output", (5,), cache=file) == 0.75  # measured again, after the line cut off
    assert len(counted) == 3
    layer_times.times_at.cache_clear()
    with pytest.warns(FxBasisWarning, match="5 lines"):
        assert time_ratio(SMALL, "output", (5,), cache=file) == 0.75
    assert len(counted) == 3


def test_a_cache_that_cannot_be_written_is_a_warning(counted: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(FxBasisWarning, match="cannot write .*; pass cache= another file"):
        assert time_ratio(SMALL, "output", (4,), cache=tmp_path / "file" / "times.jsonl") == 0.25
    assert time_ratio(SMALL, "output", (4,), cache=tmp_path / "file" / "times.jsonl") == 0.25
    assert len(counted) == 1
    with pytest.warns(FxBasisWarning, match="cannot (read|write) .*; pass cache= another file"):
        time_ratio(SMALL, "output", (4,), cache=tmp_path)


def test_no_cache_writes_nothing_and_the_default_is_the_users(
    counted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    time_ratio(SMALL, "output", (4,), cache=False)
    assert list(tmp_path.iterdir()) == []
    time_ratio(SMALL, "output", (4,))
    assert [*tmp_path.rglob("*.jsonl")] == [default_path()]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path().parts[-3:] == (".cache", "fxbasis", "layer_times.jsonl")


def test_what_cannot_be_timed_is_refused() -> None:
    unsized = number_convs(nn.Conv2d(3, 4, 3))[0]
    with pytest.raises(InputError, match=r"conv 1 .* has no sizes.*; number it with example inputs"):
        measure_layer(unsized, cache=False)
    with pytest.raises(SelectionError, match=r"form='best' is not known; choose one of output"):
        measure_layer(SMALL, forms=["best"], cache=False)
    with pytest.raises(SelectionError, match=r"ranks=\(4, 4\) are none of the output form; pass 1 from 1"):
        time_ratio(SMALL, "output", (4, 4), cache=False)
    grouped = record_of(nn.Conv2d(8, 16, 3, groups=4), 6)
    for ranks in ((6,), (0,), (80,), (4.0,)):
        with pytest.raises(SelectionError, match=r"multiples of its groups, 4"):
            time_ratio(grouped, "output", ranks, cache=False)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="threads=0 cannot be measured; pass a whole number"):
        time_ratio(SMALL, "output", (4,), 0, cache=False)


def test_forms_measure_adds_a_column(
    counted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["forms", "--layer", "16,16,3,8,8"]) == 0
    assert "time" not in capsys.readouterr().out.replace("Work is not time", "")
    assert counted == []
    assert main(["forms", "--layer", "16,16,3,8,8", "--measure"]) == 0
    text = capsys.readouterr().out
    assert "time ratio" in text
    assert len(counted) == len(FORMS) - 1
    assert main(["forms", "--layer", "16,16,3,8,8", "--measure", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["forms"]
    assert [row["time_ratio"] for row in rows][:4] == [1.0, 0.25, 0.5, 1.0]
    assert len(counted) == len(FORMS) - 1
