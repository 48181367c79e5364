"""Conversion between forms: the same function, fewer or other operations, and everything else kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Net, close
from torch import Tensor, nn

from fxbasis import compress, fold, load, plan_of, profile, save
from fxbasis.errors import SelectionError
from fxbasis.passes import convert
from fxbasis.structures import FORMS

pytestmark = pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")

PRODUCTS = ("output", "gauge", "weight")
PAIRS = [(one, other) for one in PRODUCTS for other in PRODUCTS if one != other] + [("cp4", "cp")]
PAIRS += [("reduced", other) for other in PRODUCTS]
pairs = pytest.mark.parametrize(("before", "after"), PAIRS)


def output(model: nn.Module, example: Tensor) -> Any:
    with torch.no_grad():
        return model(example)


@pairs
@pytest.mark.parametrize("size", [0.5, 4])
def test_the_function_stays(net: Net, before: str, after: str, size: float, tmp_path: Path) -> None:
    small = compress(net, net.example, layers="re:.*", form=before, size=size)
    expected, plan = output(small, net.example), plan_of(small)
    made = convert(small, after)
    assert close(expected, output(made, net.example))
    assert torch.equal(expected, output(small, net.example))
    assert plan_of(small) == plan
    layers = [layer for layer in plan_of(made).compressed if layer.groups < layer.out_channels]
    if before == "reduced":  # more atoms than the rank of the weight are no rank of the others
        layers = [layer for layer in layers if layer.rank <= layer.shape.largest_rank]
    assert {layer.form for layer in layers} == {after}  # a depthwise weight form shares its basis: it stays
    free = 1 if before == "reduced" else 3
    assert [layer.ranks[:free] for layer in plan_of(made)] == [layer.ranks[:free] for layer in plan]
    assert not profile(made, net.example).disagreements
    assert close(output(fold(small), net.example), output(fold(made), net.example))
    assert list(fold(made).state_dict()) == list(net.state_dict())
    loaded = load(net, save(made, tmp_path / "made"))
    assert torch.equal(output(loaded, net.example), output(made, net.example))


def test_gauge_is_cheaper_and_comes_back(residual_net: Net) -> None:
    example = residual_net.example
    small = compress(residual_net, example, layers="re:.*", size=0.5)
    gauge = convert(small, "gauge")
    again = convert(gauge, "output")
    assert profile(gauge, example).macs < profile(small, example).macs == profile(again, example).macs
    assert close(output(small, example), output(again, example))


def test_float64_is_exact_to_rounding() -> None:
    model, example = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)).double(), torch.randn(1, 8, 7, 7).double()
    small = compress(model, example, layers=1, size=6)
    gap = (output(small, example) - output(convert(small, "gauge"), example)).abs().max()
    assert float(gap) < 1e-13


def test_gradient_flags_hooks_and_a_fixed_basis_stay() -> None:
    model, example = nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(1, 4, 7, 7)
    model[0].bias.requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    small = compress(model, example, layers=1, size=4, fixed_basis=True)
    made = convert(small, "gauge")
    flags = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    assert flags == {"0.basis.weight": False, "0.composition.weight": True, "0.composition.bias": False}
    assert close(output(small, example), output(made, example))


def test_atoms_beyond_the_rank_of_the_output_form_stay_and_nothing_becomes_reduced() -> None:
    conv, example = nn.Conv2d(4, 16, 1), torch.randn(1, 4, 5, 5)
    small = compress(conv, example, layers=1, form="reduced", size=8)
    with pytest.raises(SelectionError, match="form='output': the model has the forms reduced"):
        convert(small, "output")
    with pytest.raises(SelectionError, match="form='reduced': the model has the forms output"):
        convert(compress(conv, example, layers=1, size=2), "reduced")


def test_layers_of_other_forms_stay(residual_net: Net) -> None:
    rules: dict[Any, Any] = {"re:.*": {"form": "spatial"}, 1: {"form": "output"}}
    small = compress(residual_net, residual_net.example, layers=rules)
    forms = [layer.form for layer in plan_of(convert(small, "gauge"))]
    assert forms == ["gauge", *[layer.form for layer in plan_of(small)][1:]]


def test_what_cannot_be_is_refused(plain_net: Net) -> None:
    small = compress(plain_net, plain_net.example, layers="re:.*", form="spatial")
    for form in set(FORMS) - {"spatial"}:
        with pytest.raises(
            SelectionError, match=f"converted to form='{form}': the model has the forms spatial"
        ):
            convert(small, form)
    with pytest.raises(SelectionError, match="form='x' is not known; choose one of output"):
        convert(small, "x")
    with pytest.raises(SelectionError, match="the model has the forms none"):
        convert(plain_net, "gauge")
