"""The costs of every form side by side, from Python and on the command line."""

from __future__ import annotations

import json

import pytest
from torch import nn

from fxbasis.cli import main
from fxbasis.costs import ConvShape
from fxbasis.errors import SelectionError
from fxbasis.form_table import form_table
from fxbasis.structures import FORMS, form_macs, form_params

SHAPE, SIZE = ConvShape(64, 96, (3, 3), groups=2), (14, 12)


def macs(form: str, ranks: tuple[int, ...]) -> int:
    return form_macs(form, SHAPE, ranks, SIZE, SIZE)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_every_form_is_at_or_under_the_ratio_and_one_rank_more_is_over(ratio: float) -> None:
    dense, *rows = form_table(SHAPE, SIZE, ratio)
    assert dense.macs == 14 * 12 * 96 * 32 * 9
    assert [row.form for row in rows] == list(FORMS)
    for row in rows:
        part = row.params_ratio if row.form == "weight" else row.macs_ratio
        assert part <= ratio, row
        if row.form == "reduced" and row.ranks[0] < row.largest[0]:
            assert macs(row.form, (row.ranks[0] + SHAPE.groups, row.ranks[1])) > ratio * row.macs / part
        if len(row.ranks) == 1 and row.ranks != row.largest:
            more, cost = (row.ranks[0] + SHAPE.groups,), row.params if row.form == "weight" else row.macs
            found = form_params("weight", SHAPE, more) if row.form == "weight" else macs(row.form, more)
            assert found > ratio * cost / part, row


def test_a_ratio_below_every_form_gives_the_smallest_ranks_and_says_so() -> None:
    table = form_table(SHAPE, SIZE, 1e-4)
    assert all(row.ranks[0] == SHAPE.groups or row.form == "weight" for row in table.rows[1:])
    assert "of the MACs (weight: of the weights), or the smallest where none are\n" in str(table)
    assert "smallest" not in str(form_table(SHAPE, SIZE))


def test_training_is_as_cheap_as_the_forward_pass_but_for_the_weight_form() -> None:
    for row in form_table(SHAPE, SIZE):
        assert row.training_ratio == pytest.approx(row.macs_ratio)
        assert (row.training_ratio > 1) == (row.form == "weight")


def test_parameters_are_those_of_the_modules() -> None:
    dense = nn.Conv2d(64, 96, 3, groups=2, bias=False)
    assert form_table(SHAPE, SIZE).rows[0].params == sum(p.numel() for p in dense.parameters())


def test_bad_values_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"macs_ratio=0 is no ratio in \(0, 1\]; pass"):
        form_table(SHAPE, SIZE, 0)
    with pytest.raises(SelectionError, match="0x3 has no positions; pass sizes from 1"):
        form_table(SHAPE, (0, 3))


def test_the_command_prints_the_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forms", "--layer", "64,64,3,56,56"]) == 0
    text = capsys.readouterr().out
    assert "64 -> 64 channels, 3x3, stride 1, 56x56" in text
    assert all(form in text for form in FORMS)
    assert main(["forms", "--layer", "64,64,3,56,56", "--macs-ratio", "0.25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["form"] for row in found["forms"]] == ["dense", *FORMS]


@pytest.mark.parametrize("layer", ["64,64,3,56", "64,64,0,7,7", "a,b,c,d,e", ""])
def test_a_layer_that_is_none_is_refused(layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["forms", "--layer", layer])
    assert "five whole numbers from 1" in capsys.readouterr().err
