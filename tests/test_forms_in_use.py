"""What is done to a compressed model afterwards: compiled, under autocast, traced by fx, pruned, hooked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from fxbasis import LayerError, compress, fold, number_convs, plan_of, profile, save
from fxbasis.structures import FORMS

X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(1))


def small(form: str = "output") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    return compress(model, X, layers="re:.*", size=4, form=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_compressed_model_is_compiled_as_one_graph(form: str) -> None:
    model, seen = small(form), []

    def backend(graph_module: Any, inputs: Any) -> Any:
        seen.append(len(graph_module.graph.nodes))
        return graph_module

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(model(X), compiled(X))
    assert len(seen) == 1


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_a_form_has_the_dtype_of_a_convolution(form: str) -> None:
    model = small(form)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs, expected = model(X), fold(model)(X)
    assert outputs.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(outputs, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("form", FORMS)
def test_plain_fx_traces_a_compressed_model_again(form: str) -> None:
    model = small(form)
    assert_same(model(X), torch.fx.symbolic_trace(model)(X))


def pruned(step: nn.Module) -> None:
    prune.l1_unstructured(step, "weight", 0.5)


def hooked(step: nn.Module) -> None:
    weight_norm(step)


def parametrized(step: nn.Module) -> None:
    parametrizations.weight_norm(step)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("form", ["output", "gauge", "weight", "spatial", "tucker2"])
@pytest.mark.parametrize("change", [pruned, hooked, parametrized])
def test_fold_takes_in_what_makes_the_weight_of_a_step(form: str, change: Any) -> None:
    model = small(form)
    change(model.get_submodule("0.basis"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    folded = fold(model)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in folded.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_fold_refuses_a_step_with_hooks() -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    model = small()
    handle = model.get_submodule("2.basis").register_forward_hook(double)
    with pytest.raises(LayerError, match=r"conv 2 \(2\).*its basis has hooks.*remove it first"):
        fold(model)
    handle.remove()
    fold(model)


def test_fold_refuses_a_basis_with_a_bias() -> None:
    model = small()
    model.get_submodule("0.basis").bias = nn.Parameter(torch.ones(4))
    with pytest.raises(LayerError, match=r"conv 1 \(0\).*its basis has a bias of its own.*remove it first"):
        fold(model)


@pytest.mark.parametrize("verb", [fold, plan_of, profile, number_convs, save])
def test_a_composition_that_was_exchanged_is_named(verb: Any, tmp_path: Path) -> None:
    model = small()
    model.get_submodule("2").composition = nn.Conv2d(4, 8, 1)
    given = {profile: (X,), save: (tmp_path / "saved",)}.get(verb, ())
    with pytest.raises(LayerError, match=r"^2: its composition was exchanged for a Conv2d.*; write into"):
        verb(model, *given)
    assert not list(tmp_path.iterdir())
