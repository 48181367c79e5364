"""The sequential refit: closed forms where there are some, means in bias or BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxbasis import refitting
from fxbasis.copying import copy_model
from fxbasis.costs import ConvShape
from fxbasis.forms import BasisConv2d
from fxbasis.passes.numbering import conv_layers
from fxbasis.passes.rewriting import rewrite
from fxbasis.refitting import batchnorms_behind, refit_in_sequence_, refittable, targets_of
from fxbasis.structures import FORMS
from fxbasis.subjects import plan_with, subject_of

EXACT = 1e-4
"""Of the outputs' largest magnitude: what the ridge of 1e-6 and features that are all but parallel leave."""
LINEAR = [form for form in FORMS if form not in ("weight", "reduced")]


def settle(net: nn.Module) -> nn.Module:
    """float64, eval(), BatchNorm statistics that matter."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.double().eval()


def chain(*, bias: bool = False, **options: Any) -> nn.Module:
    """conv (4 -> 6), BatchNorm, ReLU, conv (6 -> 4), both compressible."""
    torch.manual_seed(0)
    first = nn.Conv2d(4, 6, 3, **({"padding": 1} | options), bias=bias)
    second = nn.Conv2d(6, 4, 3, **({"padding": 1} | options), bias=True)
    return settle(nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), second))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, 8, 9, generator=generator, dtype=torch.float64) + 0.5 for n in (8, 6, 1)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "groups": {"groups": 2},
    "reflect": {"padding_mode": "reflect", "stride": (2, 1), "bias": True},
    "circular": {"padding_mode": "circular", "dilation": 2, "padding": 2},
}
CASES = [(form, "plain") for form in LINEAR]
CASES += [(form, kind) for form in ("gauge", "input", "spatial") for kind in OPTIONS if kind != "plain"]
grid = pytest.mark.parametrize(("form", "kind"), CASES)


def ranks_of(form: str, shape: ConvShape, part: float) -> tuple[int, ...]:
    largest = FORMS[form].largest_ranks(shape)
    return tuple(shape.groups * max(1, round(part * rank / shape.groups)) for rank in largest)


def small_of(net: nn.Module, form: str, part: float, data: Sequence[Tensor]) -> tuple[Any, nn.Module]:
    """The subject, and a copy with every convolution in the form, fitted to the weights."""
    subject = subject_of(net, data[0], list(data))
    dense, method = plan_with(subject.table, {}), FORMS[form].methods[0]
    chosen = {
        record.index: replace(layer, form=form, method=method, ranks=ranks_of(form, record.shape, part))
        for record, layer in zip(subject.table, dense, strict=True)
    }
    small = copy_model(subject.model)
    rewrite(small, plan_with(subject.table, chosen))
    return subject, small


def forms_of(small: nn.Module) -> dict[str, BasisConv2d]:
    layers = conv_layers(small).items()
    return {name: form for name, form in layers if isinstance(form, BasisConv2d) and refittable(form)}


def refit(subject: Any, small: nn.Module, data: Sequence[Tensor]) -> dict[str, BasisConv2d]:
    forms = forms_of(small)
    refit_in_sequence_(small, forms, targets_of(subject.layers, forms, subject.model, data), data)
    return forms


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module, data: Sequence[Tensor]) -> float:
    """Largest difference of the outputs over their largest magnitude."""
    return max(float((one(x) - other(x)).abs().max() / one(x).abs().max()) for x in data)


def first_layers(subject: Any, small: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The first convolution of a chain in both models, and the BatchNorm behind it."""
    convs = conv_layers(subject.model)["0"], conv_layers(small)["0"]
    return [convs, (subject.model.get_submodule("1"), small.get_submodule("1"))]


@grid
def test_at_full_rank_nothing_changes(form: str, kind: str) -> None:
    net, data = chain(**OPTIONS[kind]), batches()
    subject, small = small_of(net, form, 1.0, data)
    before = apart(net, small, data)
    refit(subject, small, data)
    assert apart(net, small, data) <= EXACT + 2 * before


@grid
def test_the_error_of_the_first_layer_falls(form: str, kind: str) -> None:
    net, data = chain(**OPTIONS[kind]), batches()
    subject, small = small_of(net, form, 0.5, data)

    @torch.no_grad()
    def error() -> float:
        """Of what the BatchNorm makes of the first layer's outputs."""
        (old, new), (a, b) = first_layers(subject, small)
        return float(sum((a(old(x)) - b(new(x))).square().sum() for x in data))

    before = error()
    refit(subject, small, data)
    assert error() < 0.999 * before


def brute(patches: Tensor, target: Tensor, with_mean: bool) -> tuple[Tensor, Tensor]:
    """lstsq of (N, n) and (N, o)."""
    ones = torch.ones(len(patches), int(with_mean), dtype=patches.dtype)
    solution = torch.linalg.lstsq(torch.cat([patches, ones], 1), target).solution
    n = patches.shape[1]
    return solution[:n].mT, solution[n:].sum(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_chain_is_refitted_as_least_squares_say(bias: bool, groups: int) -> None:
    """The second layer against what the refitted first one brings."""
    net, data = chain(bias=bias, groups=groups), batches()
    subject, small = small_of(net, "output", 0.5, data)
    start = copy.deepcopy(small)
    forms = refit(subject, small, data)
    for name, original in subject.layers.items():
        form, features, wanted = forms[name], [], []
        head = nn.Sequential(*list(small.children())[: int(name)])
        for x in data:
            features.append(form.basis(head(x)).movedim(1, -1).flatten(0, 2))
            whole = nn.Sequential(*list(subject.model.children())[: int(name)])
            wanted.append(original(whole(x)).movedim(1, -1).flatten(0, 2))
        xs, ys = torch.cat(features).detach(), torch.cat(wanted).detach()
        for group, (x, y) in enumerate(zip(xs.chunk(groups, 1), ys.chunk(groups, 1), strict=True)):
            weight, constant = brute(x, y, with_mean=True)
            found = form.composition.weight[:, :, 0, 0].chunk(groups)[group]
            assert torch.allclose(found, weight, atol=1e-4)
            if form.bias is not None:
                assert torch.allclose(form.bias.chunk(groups)[group], constant, atol=1e-4)
            else:
                moved = start.get_submodule("1").running_mean - small.get_submodule("1").running_mean
                assert torch.allclose(moved.chunk(groups)[group], constant, atol=1e-4)


class Readers(nn.Module):
    """Convolutions without bias before BatchNorms of every kind."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("mine", "twice", "also", "seen", "read", "bare", "still"):
            self.add_module(name, nn.Conv2d(4, 4, 3, padding=1, bias=False))
        self.mine_norm, self.twice_norm, self.seen_norm = (nn.BatchNorm2d(4) for _ in range(3))
        self.read_norm = nn.BatchNorm2d(4)
        self.still_norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mine_norm(self.mine(x)))
        x = F.relu(self.twice_norm(self.twice(x)))
        x = F.relu(self.twice_norm(self.also(x)))
        seen = self.seen(x)
        x = F.relu(self.seen_norm(seen) + seen)
        x = F.relu(self.read_norm(self.read(x)) + self.read_norm.running_mean[:, None, None])
        return self.still_norm(F.relu(self.bare(x))) + self.still_norm(self.still(x))


def test_a_batchnorm_takes_the_mean_only_where_it_is_the_layers_own() -> None:
    torch.manual_seed(0)
    net, data = settle(Readers()), batches()
    subject, small = small_of(net, "output", 0.5, data)
    last = {name: form.composition for name, form in forms_of(small).items()}
    assert list(batchnorms_behind(small, last)) == ["mine"]
    before = {name: buffer.clone() for name, buffer in small.named_buffers()}
    refit(subject, small, data)
    moved = {name for name, buffer in small.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {"mine_norm.running_mean"}


def test_a_batchnorm_in_two_graphs_is_left_alone() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    norm = fx.symbolic_trace(nn.Sequential(block[1]))
    both = nn.ModuleList([fx.symbolic_trace(block), norm])
    assert list(batchnorms_behind(both[:1], {"0": both[0].get_submodule("0")})) == ["0"]
    norm.add_module("0", both[0].get_submodule("1"))
    assert not batchnorms_behind(both, {"0": both[0].get_submodule("0")})


def test_without_bias_or_batchnorm_there_is_no_constant() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False)).double(), batches()
    subject, small = small_of(net, "output", 0.5, data)
    form = refit(subject, small, data)["0"]
    xs = torch.cat([form.basis(x).movedim(1, -1).flatten(0, 2) for x in data]).detach()
    ys = torch.cat([net(x).movedim(1, -1).flatten(0, 2) for x in data]).detach()
    assert torch.allclose(form.composition.weight[:, :, 0, 0], brute(xs, ys, with_mean=False)[0], atol=1e-4)
    assert form.bias is None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_copies_of_the_gauge_form_stay_copies_and_have_the_mean(groups: int, bias: bool) -> None:
    net, data = chain(groups=groups, bias=bias), batches()
    subject, small = small_of(net, "gauge", 0.5, data)
    order = small.get_submodule("0.composition").order.clone()
    refit(subject, small, data)
    composition = small.get_submodule("0.composition")
    assert torch.equal(composition.order, order)
    (old, new), (a, b) = first_layers(subject, small)
    gap = sum((a(old(x)) - b(new(x))).detach().sum((0, 2, 3)) for x in data)
    assert float(gap.abs().max()) <= 1e-6  # every output has the mean of the original's
    basis = small.get_submodule("0.basis")(data[0])
    constant = 0.0 if composition.bias is None else composition.bias[:, None, None]
    copies = order.argsort()[: basis.shape[1]]
    assert torch.allclose((composition(basis) - constant)[:, copies], basis)


def test_modes_hooks_and_the_random_state_are_restored() -> None:
    net, data = chain(), batches()
    subject, small = small_of(net, "spatial", 0.5, data)
    small.train().get_submodule("1").eval()
    modes, state = [m.training for m in small.modules()], torch.get_rng_state()
    refit(subject, small, data)
    assert [m.training for m in small.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(Exception, match="pass inputs"):
        targets_of(subject.layers, forms_of(small), subject.model, [torch.zeros(1, 7, 8, 8)])
    held = [part for model in (subject.model, small) for part in model.modules()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in held)


def test_sampled_positions_are_the_same_for_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full rank a sample of positions is as good as all, if it is the same in both."""
    monkeypatch.setattr(refitting, "VALUES", 1)
    net, data = chain(bias=True), batches()
    for form in ("output", "gauge", "spatial", "input"):
        subject, small = small_of(net, form, 1.0, data)
        forms = refit(subject, small, data)
        targets = targets_of(subject.layers, forms, subject.model, data)
        assert sum(map(len, targets["0"].values())) < 15 * 72 or form == "input"
        assert apart(net, small, data) <= EXACT


class Ways(nn.Module):
    """One way or the other by the input; the second conv is not on every way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.second(y) if x.mean() > 0 else y


@pytest.mark.filterwarnings("ignore::fxbasis.FxBasisWarning")
def test_batches_of_other_ways_do_not_stop_the_refit() -> None:
    torch.manual_seed(0)
    net, data = Ways().double().eval(), batches()
    data = [data[0], -data[1], data[2]]
    subject, small = small_of(net, "output", 0.5, data)
    targets = targets_of(subject.layers, forms_of(small), subject.model, data)
    assert {name: sorted(found) for name, found in targets.items()} == {"first": [0, 1, 2], "second": [0, 2]}
    before, old = apart(net, small, data), copy.deepcopy(small.state_dict())
    refit(subject, small, data)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, old[name])}
    assert {"first.composition.weight", "second.composition.weight"} <= changed
    assert apart(net, small, data) < before


def test_unbatched_inputs_are_batches_of_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double().eval()
    data = [x[0] for x in batches()]
    subject, small = small_of(net, "output", 1.0, data)
    refit(subject, small, data)
    assert apart(net, small, data) <= EXACT
