"""Passes on graphs, alone and in fx's PassManager: what they change, what they keep, what they refuse."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from fxbasis import (
    FxBasisWarning,
    LayerError,
    LayerPlan,
    Plan,
    PlanError,
    VerificationError,
    compress,
    fold,
    number_convs,
    plan_of,
    trace,
)
from fxbasis.forms import BasisConv2d
from fxbasis.passes import CONV_NUMBER, FoldPass, FxPass, NumberingPass, RewritePass
from fxbasis.passes.base import MACS
from fxbasis.passes.profiling import ProfilePass
from fxbasis.passes.rewriting import check_plan
from fxbasis.passes.selection import select

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.down(x))


class Net(nn.Module):
    """Convs 1 stem, 2 block.conv, 3 block.down.0, 4 shared (called twice), 5 last (also named extra)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.extra = self.last

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(input=x))
        x = self.shared(F.max_pool2d(self.shared(x), 2))
        return self.extra(self.last(x))


NAMES = ["stem", "block.conv", "block.down.0", "shared", "last"]
CALLS = ["stem", "block.conv", "block.down.0", "shared", "shared", "last", "last"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def plan_for(model: nn.Module, layers: Any = "re:.*", size: Any = 2) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxBasisWarning)
        return select(number_convs(model), layers, size=size)


def traced() -> fx.GraphModule:
    return trace(net(), X)  # type: ignore[return-value]


def rewritten(size: Any = 2, layers: Any = "re:.*") -> fx.GraphModule:
    graph_module = traced()
    RewritePass(plan_for(graph_module, layers, size))(graph_module)
    return graph_module


def targets(graph_module: fx.GraphModule) -> list[str]:
    """Targets of the calls of convolutions and forms, in order."""
    kinds = (nn.Conv2d, BasisConv2d)
    return [
        str(node.target)
        for node in graph_module.graph.nodes
        if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), kinds)
    ]


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


PASSES: dict[str, Callable[[], tuple[fx.GraphModule, FxPass]]] = {
    "numbering": lambda: (traced(), NumberingPass()),
    "rewriting": lambda: ((g := traced()), RewritePass(plan_for(g))),  # type: ignore[dict-item]
    "folding": lambda: (rewritten(), FoldPass()),
    "profiling": lambda: (traced(), ProfilePass(X)),
}


@pytest.mark.parametrize("key", PASSES)
def test_pass_says_honestly_whether_it_changed_something(key: str) -> None:
    graph_module, one_pass = PASSES[key]()
    first, second = one_pass(graph_module), one_pass(graph_module)
    assert isinstance(first, PassResult)
    assert (first.modified, second.modified) == (True, False)
    assert first.graph_module is second.graph_module is graph_module


@pytest.mark.parametrize("key", PASSES)
def test_pass_reaches_a_fixed_point_in_fxs_manager(key: str) -> None:
    graph_module, one_pass = PASSES[key]()
    calls = []

    class Counted(PassBase):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            result = one_pass(graph_module)
            calls.append(result.modified)
            return result

    manager = PassManager(passes=[Counted()], steps=3, run_checks_after_each_pass=True)
    assert manager(graph_module).modified
    assert calls == [True, False]
    assert not manager(graph_module).modified


def test_all_passes_together_reach_a_fixed_point() -> None:
    graph_module = traced()
    passes = [NumberingPass(), RewritePass(plan_for(graph_module)), NumberingPass(), ProfilePass(X)]
    manager = PassManager(passes=passes, steps=3, run_checks_after_each_pass=True)
    assert manager(graph_module).modified
    assert not manager(graph_module).modified
    assert close(compress_quietly()(X), graph_module(X))


def compress_quietly(**options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxBasisWarning)
        return compress(net(), X, **({"layers": "re:.*", "size": 2} | options))


@pytest.mark.parametrize("key", PASSES)
@pytest.mark.parametrize("plain", [False, True], ids=["traced", "symbolic_trace"])
def test_graph_is_sound_after_the_pass(key: str, plain: bool) -> None:
    graph_module, one_pass = PASSES[key]()
    if plain:
        graph_module = fx.symbolic_trace(net())
        plan = plan_for(graph_module)
        one_pass = {"rewriting": RewritePass(plan), "folding": FoldPass()}.get(key, one_pass)
        if key == "folding":
            RewritePass(plan)(graph_module)
    expected = graph_module(X)
    one_pass(graph_module)
    graph_module.graph.lint()
    if key != "rewriting":
        assert close(expected, graph_module(X))
    assert graph_module.code == fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph)).code
    before = dict(graph_module.named_modules())
    graph_module.delete_all_unused_submodules()
    used = {name for name in before if name.endswith((".basis", ".composition"))}
    assert used <= {name for name, _ in graph_module.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("layers", [[1], ["block.down.0"], [4], [5], [1, 2, 3, 4, 5]], ids=repr)
def test_rewriting_at_full_size_is_the_identity(layers: Any) -> None:
    graph_module = rewritten(1.0, layers)
    assert close(net()(X), graph_module(X))
    assert sum(isinstance(m, BasisConv2d) for m in graph_module.modules()) == len(layers)


def test_nothing_selected_changes_nothing() -> None:
    graph_module = traced()
    code, plan = graph_module.code, plan_for(graph_module, [1], 2)
    nothing = Plan(tuple(LayerPlan(**{**vars(layer), "form": "dense", "ranks": ()}) for layer in plan))
    assert not RewritePass(nothing)(graph_module).modified
    assert graph_module.code == code
    assert not FoldPass()(graph_module).modified


def test_passes_on_a_graph_without_convolutions_do_nothing() -> None:
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))
    for one_pass in (NumberingPass(), RewritePass(Plan(())), FoldPass()):
        assert not one_pass(graph_module).modified


def test_nodes_and_submodules_are_called_basis_and_composition() -> None:
    graph_module = rewritten()
    expected = [f"{name}.{part}" for name in CALLS for part in ("basis", "composition")]
    assert targets(graph_module) == expected
    names = [node.name for node in graph_module.graph.nodes if node.op == "call_module"]
    assert [name for name in names if "stem" in name] == ["stem_basis", "stem_composition"]
    for target in expected:
        assert type(graph_module.get_submodule(target)) is nn.Conv2d


def test_state_dict_reads_naturally_and_keeps_its_order() -> None:
    keys = list(rewritten(layers=[2, 4]).state_dict())
    expected = []
    for key in net().state_dict():
        name, _, kind = key.rpartition(".")
        if name not in ("block.conv", "shared"):
            expected.append(key)
        elif kind == "weight":
            parts = ("basis.weight", "composition.weight", "composition.bias")
            expected += [f"{name}.{part}" for part in parts]
    assert keys == expected


def test_shared_convolution_has_one_basis_for_both_calls() -> None:
    graph_module = rewritten(layers=[4])
    assert targets(graph_module).count("shared.basis") == 2
    assert targets(graph_module).count("shared.composition") == 2
    assert number_convs(graph_module, X)[3].calls == 2
    full = rewritten(1.0, [4])
    assert close(net()(X), full(X))


def test_convolution_under_two_names_stays_one_object() -> None:
    graph_module = traced()
    second = [node for node in graph_module.graph.nodes if node.target == "last"][1]
    second.target = "extra"
    graph_module.recompile()
    expected = graph_module(X)
    RewritePass(plan_for(graph_module, [5], 1.0))(graph_module)
    parts = ["last.basis", "last.composition", "extra.basis", "extra.composition"]
    assert targets(graph_module)[-4:] == parts
    assert graph_module.last is graph_module.extra
    folded = fold(graph_module)
    assert targets(folded)[-2:] == ["last", "extra"]
    assert folded.last is folded.extra
    assert close(expected, graph_module(X))
    assert close(expected, folded(X))


def test_convolution_with_hooks_stays_one_call() -> None:
    model = net()
    model.stem.register_forward_hook(lambda module, args, output: output * 2)
    graph_module = trace(model, X)
    expected = graph_module(X)
    RewritePass(plan_for(graph_module, "re:.*", 1.0))(graph_module)
    assert targets(graph_module)[:2] == ["stem", "block.conv.basis"]
    assert close(expected, graph_module(X))
    assert FoldPass()(graph_module).modified
    assert targets(graph_module) == CALLS
    assert close(expected, graph_module(X))


def test_numbers_stand_on_every_call_and_are_kept_by_rewriting_and_folding() -> None:
    graph_module = traced()
    NumberingPass()(graph_module)

    def numbers() -> list[tuple[str, int]]:
        nodes = graph_module.graph.nodes
        return [(str(n.target), n.meta[CONV_NUMBER]) for n in nodes if CONV_NUMBER in n.meta]

    before = numbers()
    assert [number for _, number in before] == [1, 2, 3, 4, 4, 5, 5]
    RewritePass(plan_for(graph_module))(graph_module)
    parts = [(f"{name}.{part}", number) for name, number in before for part in ("basis", "composition")]
    assert numbers() == parts
    assert not NumberingPass()(graph_module).modified
    FoldPass()(graph_module)
    assert numbers() == before


def test_meta_of_the_output_is_kept() -> None:
    graph_module = traced()
    ShapeProp(graph_module).propagate(X)
    before = {}
    for node in graph_module.graph.nodes:
        node.meta["custom"] = {"of": node.name}
        meta = (node.meta["tensor_meta"].shape, node.meta.get("nn_module_stack"), node.name)
        before.setdefault(str(node.target), meta)
    RewritePass(plan_for(graph_module))(graph_module)
    for name in NAMES:
        shape, stack, old = before[name]
        composition, basis = (
            next(n for n in graph_module.graph.nodes if n.target == f"{name}.{part}")
            for part in ("composition", "basis")
        )
        assert composition.meta["nn_module_stack"] == basis.meta["nn_module_stack"] == stack
        assert composition.meta["tensor_meta"].shape == shape
        assert composition.meta["custom"] == {"of": old}
        assert "tensor_meta" not in basis.meta
    FoldPass()(graph_module)
    for name in ("stem", "block.conv"):
        node = next(n for n in graph_module.graph.nodes if n.target == name)
        assert (node.meta["tensor_meta"].shape, node.meta["nn_module_stack"]) == before[name][:2]
        assert node.meta["custom"] == {"of": before[name][2]}


def test_macs_in_meta_are_never_stale() -> None:
    graph_module = traced()
    ProfilePass(X)(graph_module)
    before = {str(node.target): node.meta[MACS] for node in graph_module.graph.nodes}
    assert before["stem"] == 2 * 8 * 8 * 8 * 27
    RewritePass(plan_for(graph_module, [1], 2))(graph_module)
    assert all(MACS not in node.meta for node in graph_module.graph.nodes if "stem" in str(node.target))
    assert ProfilePass(X)(graph_module).modified
    after = {str(node.target): node.meta[MACS] for node in graph_module.graph.nodes}
    assert after["stem.basis"] == 2 * 8 * 8 * 2 * 27
    assert after["stem.composition"] == 2 * 8 * 8 * 8 * 2
    assert after["last"] == before["last"]


def test_pass_changes_the_graph_module_it_is_given_and_compress_does_not() -> None:
    graph_module = traced()
    code = graph_module.code
    compress_quietly()
    assert graph_module.code == code
    assert RewritePass(plan_for(graph_module))(graph_module).graph_module is graph_module
    assert graph_module.code != code


def damaged(**changes: Any) -> Callable[[Plan], Plan]:
    def damage(plan: Plan) -> Plan:
        first, *others = plan
        return Plan((LayerPlan(**{**vars(first), **changes}), *others))

    return damage


WRONG_PLANS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "fewer layers": (lambda plan: Plan(plan.layers[:-1]), "plan has 4 convolutions, .* has 5; use the model"),
    "more layers": (lambda plan: Plan(plan.layers * 2), "plan has 10 convolutions, .* has 5"),
    "no layers": (lambda plan: Plan(()), "plan has 0 convolutions"),
    "other order": (lambda plan: Plan(plan.layers[::-1]), r"conv 5 \(last\).* meets conv 1 \(stem\)"),
    "other name": (damaged(name="head"), r"conv 1 \(head\).* meets conv 1 \(stem\), Conv2d of weight \(8, 3"),
    "other number": (damaged(number=2), r"conv 2 \(stem\).* meets conv 1 \(stem\)"),
    "other inputs": (damaged(in_channels=6), "meets conv 1"),
    "other filters": (damaged(out_channels=16), "meets conv 1"),
    "other kernel": (damaged(kernel_size=(5, 3)), "meets conv 1"),
    "other groups": (damaged(groups=3), "meets conv 1"),
}


@pytest.mark.parametrize("key", WRONG_PLANS)
def test_plan_of_another_model_is_refused_and_nothing_is_changed(key: str) -> None:
    damage, message = WRONG_PLANS[key]
    graph_module = traced()
    plan, code = damage(plan_for(graph_module)), graph_module.code
    modules = dict(graph_module.named_modules())
    with pytest.raises(PlanError, match=message):
        RewritePass(plan).change(graph_module)
    assert graph_module.code == code
    assert dict(graph_module.named_modules()) == modules
    with pytest.raises(PlanError, match=message):
        compress(net(), X, plan=plan)


def test_plan_for_an_already_compressed_model_is_refused() -> None:
    graph_module = rewritten()
    with pytest.raises(LayerError, match=r"is compressed already \(output form, rank .*fold the model first"):
        RewritePass(plan_for(net(), "re:.*", 3)).change(graph_module)
    with pytest.raises(LayerError, match="is compressed already"):
        check_plan(graph_module, plan_of(graph_module))


def test_weight_that_is_not_finite_is_refused_before_anything_is_changed() -> None:
    graph_module = traced()
    graph_module.last.weight.data[0, 0, 0, 0] = math.nan
    plan, code = plan_for(graph_module), graph_module.code
    modules = dict(graph_module.named_modules())
    with pytest.raises(LayerError, match=r"conv 5 \(last\).*1 of its weights are NaN"):
        RewritePass(plan).change(graph_module)
    assert graph_module.code == code
    assert dict(graph_module.named_modules()) == modules


def test_empty_rewriting_gives_the_structure_only() -> None:
    graph_module, full = traced(), rewritten()
    RewritePass(plan_for(graph_module), empty=True)(graph_module)
    shapes = {key: tuple(value.shape) for key, value in graph_module.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in full.state_dict().items()}
    assert graph_module.code == full.code


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "GraphModule": lambda model: fx.GraphModule(model, copy.deepcopy(model.graph)),
    "traced again": lambda model: fx.symbolic_trace(model),
}


@pytest.mark.parametrize("key", COPIES)
def test_folding_undoes_rewriting_exactly(key: str) -> None:
    small = COPIES[key](rewritten())
    folded = fold(small)
    assert close(small(X), folded(X))
    assert targets(folded) == CALLS
    expected = {name: tuple(value.shape) for name, value in net().state_dict().items()}
    if key not in ("itself", "deepcopy", "pickle"):  # fx's own copies keep one name of a module that has two
        expected = {name: shape for name, shape in expected.items() if not name.startswith("extra.")}
    assert {name: tuple(value.shape) for name, value in folded.state_dict().items()} == expected
    if key in ("itself", "deepcopy"):
        assert list(folded.state_dict()) == list(expected)
        assert folded.code == traced().code


def test_folded_state_dict_loads_into_the_original() -> None:
    small, original = compress_quietly(), net()
    original.load_state_dict(fold(small).state_dict())
    assert close(small(X), original(X))
    assert not close(net()(X), original(X))


def test_folded_weight_is_the_product_in_float64() -> None:
    small = compress_quietly(layers=[2])
    form = small.get_submodule("block.conv")
    basis, composition = form.basis.weight.double(), form.composition.weight.double()
    expected = torch.einsum("or,rihw->oihw", composition[:, :, 0, 0], basis)
    assert torch.equal(fold(small).get_submodule("block.conv").weight, expected.float())


@pytest.mark.parametrize("make", [compress_quietly, net, traced], ids=["compressed", "never", "traced"])
def test_folding_twice_is_folding_once_and_copies(make: Callable[[], Any]) -> None:
    model = make()
    keys = list(model.state_dict())
    once = fold(model)
    twice = fold(once)
    assert once is not model
    assert list(model.state_dict()) == keys
    assert list(once.state_dict()) == list(twice.state_dict())
    assert all(torch.equal(once.state_dict()[k], v) for k, v in twice.state_dict().items())
    assert torch.equal(once(X), twice(X))


def test_folding_after_training_equals_the_trained_model() -> None:
    small = compress_quietly().train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    before = small(X).detach()
    small(X).square().mean().backward()
    optimizer.step()
    small.eval()
    assert not close(before, small(X))
    assert close(small(X), fold(small)(X))


def test_folded_model_has_forgotten_its_plan() -> None:
    small = compress_quietly(layers=[1, 2])
    folded = fold(small)
    assert {record.status for record in number_convs(folded)} <= {"ok", "no gain at any rank"}
    assert not any(record.reason.startswith("left dense") for record in number_convs(folded))
    with pytest.raises(PlanError, match="was not made by compress; compress it first"):
        plan_of(folded)
    assert [layer.rank for layer in plan_of(compress(folded, X, layers=[1], size=3))] == [3, 0, 0, 0, 0]


def test_compress_again_after_folding_is_lossless() -> None:
    small = compress_quietly(layers=[1, 2, 4])
    again = compress(fold(small), X, layers=[1, 2, 4], size=2)
    assert close(small(X), again(X))


def insert_between(graph_module: fx.GraphModule) -> None:
    basis = next(node for node in graph_module.graph.nodes if node.target == "stem.basis")
    with graph_module.graph.inserting_after(basis):
        relu = graph_module.graph.call_function(F.relu, (basis,))
    basis.replace_all_uses_with(relu, lambda user: user is not relu)


def read_basis(graph_module: fx.GraphModule) -> None:
    basis = next(node for node in graph_module.graph.nodes if node.target == "stem.basis")
    output = graph_module.graph.output_node()
    output.args = ((output.args[0], basis),)


def feed_composition(graph_module: fx.GraphModule) -> None:
    basis = next(node for node in graph_module.graph.nodes if node.target == "shared.basis")
    first = next(node for node in graph_module.graph.nodes if node.target == "shared.composition")
    first.args = (basis.args[0],)


@pytest.mark.parametrize("disturb", [insert_between, read_basis, feed_composition])
def test_fold_refuses_what_stands_between_basis_and_composition(disturb: Callable[[Any], None]) -> None:
    graph_module = rewritten()
    disturb(graph_module)
    graph_module.recompile()
    code, modules = graph_module.code, dict(graph_module.named_modules())
    with pytest.raises(LayerError, match=r"conv \d \(\w+\).* cannot be folded: .*; remove it from the graph"):
        FoldPass().change(graph_module)
    assert graph_module.code == code
    assert dict(graph_module.named_modules()) == modules
    with pytest.raises(LayerError, match="cannot be folded"):
        fold(graph_module)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=repr)
def test_fold_refuses_factors_that_are_not_finite(value: float) -> None:
    small = compress_quietly()
    small.get_submodule("stem.composition").weight.data[0] = value
    with pytest.raises(VerificationError, match=r"conv 1 \(stem\).*not finite.*: train it"):
        fold(small)


def test_python_model_folds_as_a_graph_does() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] > 1 else super().forward(x) * 2

    torch.manual_seed(0)
    model = Branching().eval()
    with pytest.warns(FxBasisWarning):
        small = compress(model, X, layers="re:.*", size=2)
    assert isinstance(small, Branching)
    folded = fold(small)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert close(small(X), folded(X))
    assert folded.last is folded.extra
    assert close(compress_quietly()(X), small(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_compressed_graph_runs_through_torchscript_and_compile() -> None:
    small = compress_quietly()
    assert close(small(X), torch.jit.trace(small, X)(X))
    assert close(small(X), torch.compile(small, backend="eager")(X))
