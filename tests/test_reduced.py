"""The reduced form: its composition in both lowerings, its settings, repeated channels, and the paper."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxbasis import compress, export_onnx, fold, load, paper, plan_of, profile, save
from fxbasis.cli import main
from fxbasis.compositions import LOWERINGS, ReducedComposition
from fxbasis.costs import ConvShape, dense_macs
from fxbasis.errors import FxBasisWarning, PlanError, SelectionError
from fxbasis.export import lowering as export_lowering
from fxbasis.fitting import fit
from fxbasis.forms import BasisConv2d
from fxbasis.passes.numbering import conv_layers
from fxbasis.recipe import LayerPlan, Plan
from fxbasis.structures import form_macs, training_macs

pytestmark = pytest.mark.filterwarnings("ignore:.*it is rewritten because it was asked for")


def composition_of(model: nn.Module) -> ReducedComposition:
    (found,) = (module for module in model.modules() if isinstance(module, ReducedComposition))
    return found


def plan(shape: ConvShape, ranks: tuple[int, int], method: str = "atoms") -> LayerPlan:
    channels = {"in_channels": shape.in_channels, "out_channels": shape.out_channels}
    rest = {"kernel_size": shape.kernel_size, "groups": shape.groups, "form": "reduced", "method": method}
    return LayerPlan(number=1, name="conv", **channels, **rest, ranks=ranks)


def form_of(shape: ConvShape, ranks: tuple[int, int], method: str = "atoms") -> BasisConv2d:
    channels, options = (shape.in_channels, shape.out_channels, shape.kernel_size), {"groups": shape.groups}
    conv = nn.Conv2d(*channels, **options, bias=shape.bias, dtype=torch.float64)
    layer = plan(shape, ranks, method)
    return BasisConv2d.from_conv2d(conv, layer, fit(conv.weight, layer))


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([1, 3]),
    st.sampled_from(["atoms", "subset"]),
    st.data(),
)
def test_forward_backward_and_fold_agree_in_both_lowerings(
    groups: int, channels: int, filters: int, kernel: int, method: str, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, filters))
    sums = data.draw(st.integers(0, filters)) if rank > 1 else 0
    shape = ConvShape(groups * channels, groups * filters, (kernel, kernel), groups, bias=True)
    form = form_of(shape, (groups * rank, groups * sums), method)
    x = torch.randn(2, shape.in_channels, 5, 4, dtype=torch.float64)
    found: list[Any] = []
    for lowering in LOWERINGS:
        form.composition.lowering = lowering
        form.zero_grad()
        output = form(x)
        output.square().sum().backward()
        found.append((output.detach(), [part.grad for part in form.parameters()]))
        assert close(form(x[0]).detach(), output[0].detach())
    assert close(found[0][0], found[1][0])
    assert close(found[0][0], form.to_conv2d()(x).detach())
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert float((one - other).abs().max()) <= 1e-10 * max(1.0, float(one.abs().max()))
    rows = (form.composition.dense_weight() != 0).sum(1)
    assert int(rows.max()) <= (2 if sums else 1)


def test_copies_share_atoms_and_the_largest_is_not_scaled() -> None:
    composition = form_of(ConvShape(4, 16, (3, 3)), (6, 4)).composition
    dense = composition.dense_weight().detach()[:, :, 0, 0]
    copies = dense[(dense != 0).sum(1) == 1]
    assert len(copies) == 12
    for atom in copies.T:
        assert not bool(atom.any()) or float(atom[atom.abs().argmax()]) == 1.0
    assert len(torch.unique((copies != 0), dim=0)) <= 6


def test_the_layout_is_kept_and_the_state_has_the_support() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 7, 7).to(memory_format=torch.channels_last)
    small = compress(model, x, layers=1, form="reduced", size=4)
    assert small(x).is_contiguous(memory_format=torch.channels_last)
    assert small(x.contiguous()).stride() == model(x.contiguous()).stride()
    names = ["weight", "bias", "first", "second", "order"]
    assert list(small.state_dict()) == ["0.basis.weight", *(f"0.composition.{name}" for name in names)]
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        composition_of(other).lowering = "conv"
        assert close(small(x), other(x))
        assert composition_of(small).lowering == "gather"
    assert list(fold(small).state_dict()) == list(model.state_dict())


def test_an_unknown_lowering_is_refused() -> None:
    form = form_of(ConvShape(2, 4, (1, 1)), (2, 2))
    form.composition.lowering = "sparse"
    with pytest.raises(SelectionError, match="lowering='sparse' is not known; set one of gather, conv"):
        form(torch.zeros(1, 2, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "beta", "expected"), [(4, None, (4, 4)), (4, 0, (4, 0)), (0.5, 1.0, (8, 16))]
)
def test_beta_is_the_part_of_the_outputs_that_are_sums(size: Any, beta: Any, expected: Any) -> None:
    conv, x = nn.Conv2d(8, 16, 3), torch.randn(1, 8, 5, 5)
    small = compress(conv, x, layers=1, form="reduced", size=size, beta=beta)
    assert plan_of(small).layers[0].ranks == expected


def test_sums_are_a_multiple_of_the_groups_and_none_with_one_atom_each() -> None:
    conv, x = nn.Conv2d(8, 12, 3, groups=4), torch.randn(1, 8, 5, 5)
    for size, multiple, expected in ((8, 1, (8, 4)), (4, 1, (4, 0)), (4, 8, (8, 4)), (1.0, 1, (12, 4))):
        small = compress(conv, x, layers=1, form="reduced", size=size, multiple=multiple, beta=0.3)
        assert plan_of(small).layers[0].ranks == expected


def test_rules_have_their_own_beta() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        torch.randn(1, 3, 9, 9),
    )
    rules: dict[Any, Any] = {"re:.*": {"beta": 0.5}, 2: {"form": "output"}, 3: {}}
    small = compress(model, x, layers=rules, form="reduced", size=4, beta=0.75)
    assert [layer.ranks for layer in plan_of(small)] == [(4, 4), (4,), (4, 6)]


def test_bad_settings_are_refused() -> None:
    conv, x = nn.Conv2d(3, 8, 3), torch.randn(1, 3, 5, 5)
    with pytest.raises(
        SelectionError, match=r"beta=0\.5 is a setting of the reduced form; leave it out of form='gauge'"
    ):
        compress(conv, x, form="gauge", beta=0.5)
    for beta in (-0.1, 1.5, True, "half"):
        with pytest.raises(SelectionError, match=r"is no fraction of the outputs; pass one in \[0, 1\]"):
            compress(conv, x, form="reduced", beta=beta)  # type: ignore[arg-type]


def test_plans_know_how_many_sums_there_can_be() -> None:
    shape = ConvShape(4, 8, (3, 3), groups=2)
    for ranks in ((4, 0), (2, 0), (8, 8)):
        found = Plan((plan(shape, ranks),))
        assert Plan.from_dict(found.to_dict()) == found
    for wrong, message in (
        ((2, 2), "ask for sums of two where a group has one atom"),
        ((4, 1), "are no multiples of its 2 groups"),
        ((0, 0), r"are not between \(1, 0\) and \(8, 8\)"),
        ((4, 10), r"are not between \(1, 0\) and \(8, 8\)"),
        ((4,), r"are not between \(1, 0\) and \(8, 8\)"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.from_dict(Plan((plan(shape, wrong),)).to_dict())


def test_the_lowering_as_a_convolution_is_counted_as_one() -> None:
    conv, x = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 9, 9)
    small = compress(conv, x, layers=1, form="reduced", size=6)
    plain = profile(small, x)
    assert not plain.disagreements
    assert plain.macs == 2 * 49 * (6 * 72 + 16 + 4)
    composition_of(small).lowering = "conv"
    found = profile(small, x)
    building = 6 * (16 + 4)  # its dense weight is made at each call
    assert (found.macs, found.counted) == (plain.macs, 2 * 49 * (6 * 72 + 6 * 16) + building)


def test_dead_filters_and_one_filter() -> None:
    conv, x = nn.Conv2d(3, 8, 3), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        conv.weight[[1, 4, 5]] = 0.0
    with pytest.warns(FxBasisWarning, match=r"2 of its 8 outputs repeat another one exactly, bias aside"):
        small = compress(conv, x, layers=1, form="reduced", size=6)
    assert composition_of(small).distinct_outputs == 6
    assert torch.isfinite(small(x)).all()
    assert close(conv(x).detach(), small(x).detach())
    one = nn.Conv2d(3, 1, 3)
    small = compress(one, x, layers=1, form="reduced", size=1)
    assert plan_of(small).layers[0].ranks == (1, 0)
    assert close(one(x).detach(), small(x).detach())


def test_equal_filters_are_said_to_repeat() -> None:
    conv, x = nn.Conv2d(3, 12, 3), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        conv.weight.copy_(conv.weight[torch.arange(12) % 4].clone())
    with pytest.warns(FxBasisWarning, match=r"8 of its 12 outputs repeat another one exactly"):
        small = compress(conv, x, layers=1, form="reduced", size=4, beta=0)
    assert composition_of(small).distinct_outputs == 4
    assert close(conv(x).detach(), small(x).detach())


def test_a_fixed_basis_leaves_the_coefficients_to_train(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(1, 3, 6, 6)
    small = compress(model, x, layers=1, form="reduced", size=4, fixed_basis=True)
    small(x).sum().backward()
    assert small.get_submodule("0.basis").weight.grad is None
    assert composition_of(small).weight.grad is not None
    loaded = load(model, save(small, tmp_path / "saved"))
    assert not loaded.get_submodule("0.basis").weight.requires_grad
    assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_onnx_file_equals_the_model_in_both_lowerings(
    lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 4, 7, 6)
    small = compress(model, x, layers="re:.*", form="reduced", size=4)
    monkeypatch.setattr(
        export_lowering, "_least", lambda sessions, _: dict.fromkeys(sessions, 1) | {lowering: 0}
    )
    file = export_onnx(small, x, tmp_path / "m.onnx")
    kinds = [node.op_type for node in onnx.load(str(file.path)).graph.node]
    assert kinds.count("Conv") == (4 if lowering == "conv" else 2)
    lowered = {
        form.composition.lowering for form in conv_layers(small).values() if isinstance(form, BasisConv2d)
    }
    assert lowered == {"gather"}, "the model itself stays as it is"


def test_layers_of_one_shape_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))), torch.randn(1, 4, 6, 6)
    small, calls = compress(model, x, layers="re:.*", form="reduced", size=2), []
    monkeypatch.setattr(export_lowering, "_faster", lambda *args: calls.append(args) or "conv")
    found = export_lowering.with_measured_lowerings(small, x)
    forms = [form for form in conv_layers(found).values() if isinstance(form, BasisConv2d)]
    assert [form.composition.lowering for form in forms] == ["conv"] * 3
    assert len(calls) == 1
    assert export_lowering.with_measured_lowerings(model, x) is model


def test_measured_is_what_runs_and_what_cannot_run_keeps_its_lowering() -> None:
    form = form_of(ConvShape(4, 8, (3, 3)), (4, 2))
    assert export_lowering._faster(form.float(), (1, 4, 8, 8)) in LOWERINGS
    assert export_lowering._faster(form.bfloat16(), (1, 4, 8, 8)) is None


def test_the_command_line_knows_beta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compress",
        "torchvision:squeezenet1_1",
        "--input",
        "1x3x64x64",
        "--form",
        "gauge",
        "--beta",
        "0.5",
    ]
    assert main([*arguments, "--out", str(tmp_path / "out")]) != 0
    assert "beta=0.5 is a setting of the reduced form" in capsys.readouterr().err


SHAPE = ConvShape(64, 64, (3, 3))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.25), (0.25, 0.25), (0.25, 0.5)])
def test_where_the_paper_accelerates_outputs_repeat_up_to_scale(alpha: float, beta: float) -> None:
    """G1: fewer atoms than copies, so by pigeonhole some copies are of one atom."""
    assert paper.reduced_accelerates(64, 3, alpha, beta)
    rank, sums = int(alpha * 32), int(beta * 32)
    dense = form_of(ConvShape(8, 32, (3, 3)), (rank, sums)).composition.dense_weight()[:, :, 0, 0]
    lines = torch.unique(torch.nn.functional.normalize(dense, dim=1), dim=0)
    assert len(lines) <= rank * 2 + sums  # an atom and its negative
    copies = dense[(dense != 0).sum(1) == 1]
    assert len(copies) - len(torch.unique(copies != 0, dim=0)) >= (1 - alpha - beta) * 32


@pytest.mark.parametrize("rank", [1, 16, 32, 57])
def test_the_design_of_the_papers_figure_accelerates_though_its_own_count_denies_it(rank: int) -> None:
    """G2: each atom copied once, the other outputs sums, beta = 1 - alpha."""
    size, beta = (56, 56), 1 - rank / 64
    assert paper.reduced_difference(64, 64, 3, *size, basis=rank, beta=beta) > 0
    true = training_macs("reduced", SHAPE, (rank, 64 - rank), size, size)
    assert true < 3 * dense_macs(SHAPE, size)


@pytest.mark.parametrize("sums", [0, 16, 64])
def test_the_true_forward_is_the_papers_with_a_copy_as_one_operation(sums: int) -> None:
    """F4: N''' counts a copy as one operation and a sum as two; so does a scaled copy in MACs."""
    printed = paper.forward_reduced(64, 64, 3, 56, 56, basis=32, beta=sums / 64)
    assert form_macs("reduced", SHAPE, (32, sums), (56, 56), (56, 56)) == printed
