"""A deep copy holds together: what it calls is the copy."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import X
from torch import Tensor, nn

from fxbasis import ExportError, TraceError, compress, export_onnx, load, number_convs, profile, save, trace
from fxbasis.copying import copy_model, memory_of


class Entangled(nn.Module):
    """Functions and a weak reference that lead back to the model, in closures of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.seen: list[Tensor] = []
        self.first.register_forward_hook(lambda module, args, output: self.seen.append(output))
        self.first.parent = weakref.ref(self)
        self.steps = [lambda x: self.first(x)]
        plain, unrelated = self.last.forward, [1.0]
        self.last.forward = lambda x: plain(x) * unrelated[0] + self.first.bias.sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.steps[0](x)) * self.first.parent().first.weight.sum()


def export(model: nn.Module, x: Tensor) -> None:
    export_onnx(model, x, "never.onnx")


def test_the_copy_reads_and_writes_nothing_of_the_original() -> None:
    model = Entangled()
    expected, model.seen = model(X), []
    copied = copy_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(X), expected)
    assert not model.seen
    assert len(copied.seen) == 1


def test_a_copy_of_the_copy_is_as_independent() -> None:
    first = copy_model(Entangled())
    second = copy_model(first)
    assert second.first.parent() is second
    second(X)
    assert (len(first.seen), len(second.seen)) == (0, 1)


def test_functions_that_lead_elsewhere_are_kept() -> None:
    model, other = nn.Sequential(nn.Conv2d(3, 4, 1)), nn.ReLU()

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return other(output)

    model[0].register_forward_hook(hook)
    assert next(iter(copy_model(model)[0]._forward_hooks.values())) is hook


def test_a_function_that_calls_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))

    def again(module: nn.Module, args: Any, output: Tensor, depth: int = 2) -> Tensor:
        return model[0].weight.sum() * (again(module, args, output, depth - 1) if depth else output)

    model[0].register_forward_hook(again)
    expected, copied = model(X), copy_model(model)
    nn.init.zeros_(model[0].weight)
    assert torch.equal(copied(X), expected)


@pytest.mark.parametrize("verb", [trace, number_convs, profile, export])
def test_a_script_module_is_refused(verb: Any) -> None:
    with pytest.raises((TraceError, ExportError), match="ScriptModule, which is closed; pass"):
        verb(torch.jit.trace(nn.Conv2d(3, 4, 1), X), X)


def test_loaded_into_a_model_with_a_replaced_forward(tmp_path: Any) -> None:
    def made() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1))
        model[1].forward = lambda x: nn.functional.conv2d(x, model[1].weight.abs())
        return model.eval()

    small = compress(made(), X, layers=[1], size=4)
    assert torch.equal(load(made(), save(small, tmp_path))(X), small(X))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fixed = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(1), False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * self.fixed


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::fxbasis.FxBasisWarning")
@pytest.mark.parametrize(
    "close", [torch.jit.script, lambda part: torch.jit.trace(part, torch.ones(1, 4, 1, 1))]
)
def test_a_copy_trains_its_own_script_modules(close: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), close(Scaled()), nn.ReLU())
    for copied in (copy_model(model), compress(model, X, layers="re:.*", size=1.0)):
        wanted = [parameter.requires_grad for parameter in copied[1].parameters()]
        assert wanted == [True, False]
        torch.optim.SGD(copied.parameters(), 0.1)  # refuses parameters that are computed
        copied(X).sum().backward()
        assert copied[1].scale.grad is not None
        assert model[1].scale.grad is None
        assert copied[1].scale.data_ptr() != model[1].scale.data_ptr()


def weights_alive() -> int:
    """Bytes of all large tensors that are not freed."""
    tensors = [part for part in gc.get_objects() if type(part) in (Tensor, nn.Parameter)]  # asking no object
    return sum({memory_of(part): part.nbytes for part in tensors if part.numel() > 10_000}.values())


WAYS: dict[str, Callable[[nn.Module, Path], object]] = {
    "traced": lambda model, path: trace(model, X),
    "numbered": lambda model, path: number_convs(model, X),
    "compressed": lambda model, path: compress(model, X),
    "compressed from a graph": lambda model, path: (graph := trace(model, X), compress(graph, X)),
    "loaded": lambda model, path: load(model, path),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_weights_wait_for_the_garbage_collector(way: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 160, 3), nn.ReLU(), nn.Conv2d(160, 160, 3)).eval()
    save(compress(model, X), tmp_path)
    gc.collect()
    gc.disable()
    try:
        kept = WAYS[way](model, tmp_path)
        alive = weights_alive()
        gc.collect()
        assert alive == weights_alive()
    finally:
        gc.enable()
    assert kept is not None
