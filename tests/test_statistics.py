"""The sums over patches and gradients, against all of them by hand; the model is left as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxbasis import statistics
from fxbasis.divergence import probe
from fxbasis.errors import InputError
from fxbasis.statistics import collect, inner_products
from fxbasis.windows import all_patches


def near(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    """Same shape, and equal to the tolerance of the largest magnitude."""
    scale = float(other.abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * scale


class Ways(nn.Module):
    """In-place ReLU behind a conv, one conv called twice, one without gradients, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.still = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.first(x))
        y = F.relu_(self.norm(self.twice(y)))
        y = F.max_pool2d(self.twice(y).add_(y), 2)
        with torch.no_grad():
            still = self.still(y).relu_()
        return self.head((y + still).mean((2, 3)))


def ways(dtype: torch.dtype = torch.float64) -> tuple[Ways, dict[str, nn.Conv2d], list[Tensor]]:
    torch.manual_seed(0)
    net = Ways().to(dtype)
    layers = {name: part for name, part in net.named_children() if isinstance(part, nn.Conv2d)}
    return net, layers, [torch.randn(3, 3, 6, 6, dtype=dtype), torch.randn(2, 3, 6, 6, dtype=dtype)]


def by_hand(net: nn.Module, conv: nn.Conv2d, batches: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and moment of all patches, and the average outer product of the output's gradients."""
    patches, gradients = [], []
    kept: list[tuple[Tensor, Tensor]] = []
    handle = conv.register_forward_hook(lambda m, a, y: kept.append((a[0].clone(), y)) or y.clone())
    for seed, x in enumerate(batches):
        kept.clear()
        scalar = probe(net.eval()(x), torch.Generator().manual_seed(seed))
        found = torch.autograd.grad(scalar, [y for _, y in kept if y.requires_grad], allow_unused=True)
        gradients += [grad.transpose(0, 1).flatten(1) for grad in found if grad is not None]
        patches += [all_patches(conv, x).permute(1, 0, 3, 2).flatten(1, 2) for x, _ in kept]
    handle.remove()
    xs, gs = torch.cat(patches, 1).detach(), torch.cat(gradients, 1).detach()
    return xs.mean(1), xs.mT @ xs / xs.shape[1], gs @ gs.mT / gs.shape[1]


def test_sums_equal_those_of_all_patches_and_gradients() -> None:
    net, layers, batches = ways()
    found = collect(net, layers, batches)
    for name in ("first", "twice"):
        mean, moment, metric = by_hand(net, layers[name], batches)
        assert near(found[name].mean, mean)
        assert near(found[name].moment, moment)
        assert near(found[name].metric, metric)
        assert near(found[name].covariance, moment - mean[:, :, None] * mean[:, None])
    assert [found[name].positions for name in layers] == [36, 72, 9, 0]
    assert [found[name].samples for name in layers] == [180, 360, 45, 0]


def test_layers_without_gradients_have_a_zero_metric_and_unused_ones_nothing() -> None:
    net, layers, batches = ways()
    found = collect(net, layers, batches)
    assert not found["still"].metric.any()
    assert bool(found["still"].moment.any())
    assert not found["unused"].moment.any()
    identity = collect(net, layers, batches, gradients=False)
    assert all(torch.equal(one.metric, torch.eye(8).double()) for one in identity.values())


def test_a_model_without_any_gradient_has_zero_metrics() -> None:
    class Still(nn.Sequential):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean((2, 3))

    net = Still(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    found = collect(net, {"0": net[0], "2": net[2]}, [torch.randn(2, 3, 8, 8)])
    assert not any(one.metric.any() for one in found.values())
    shifts = {"0": torch.randn(2, 4, 3, 3, 3)}
    assert not inner_products(net, {"0": net[0]}, shifts, [torch.randn(2, 3, 8, 8)], {"0": None})["0"].any()


def snapshot(net: nn.Module) -> dict[str, Any]:
    parts = {name: value.clone() for name, value in net.state_dict().items()}
    parameters = [(p.requires_grad, p.grad) for p in net.parameters()]
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    return {"state": parts, "parameters": parameters, "modes": modes, "rng": torch.get_rng_state()}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    net, layers, batches = ways()
    net.train().norm.eval()
    net.first.weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before, threads = snapshot(net), threading.active_count()
    if fails:
        with pytest.raises(InputError, match="the model failed on batch 2 of the calibration data"):
            collect(net, layers, [batches[0], torch.zeros(1, 5, 6, 6).double()])
    else:
        collect(net, layers, batches)
    after = snapshot(net)
    assert all(torch.equal(value, before["state"][name]) for name, value in after["state"].items())
    assert all(
        one[0] == two[0] and one[1] is two[1]
        for one, two in zip(after["parameters"], before["parameters"], strict=True)
    )
    assert after["modes"] == before["modes"]
    assert torch.equal(after["rng"], before["rng"])
    assert threading.active_count() == threads


def test_frozen_parameters_have_the_same_metric() -> None:
    net, layers, batches = ways()
    free = collect(net, layers, batches)
    frozen = collect(net.requires_grad_(False), layers, batches)
    assert all(torch.equal(free[name].metric, frozen[name].metric) for name in layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wide", [1, 1024])
def test_other_dtypes_give_the_same_sums_to_their_rounding(
    dtype: torch.dtype, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "WIDE", wide)
    net, layers, batches = ways()
    exact = collect(net, layers, batches)
    found = collect(net.to(dtype), layers, [x.to(dtype) for x in batches])
    tolerance = 8 * torch.finfo(dtype).eps
    assert all(near(found[name].moment, exact[name].moment, tolerance) for name in layers if name != "unused")
    large = [300 * x.to(dtype) for x in batches]  # squares beyond half
    assert bool(collect(net, {"first": net.first}, large)["first"].moment.isfinite().all())


def test_positions_are_sampled_from_large_outputs() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1, dtype=torch.float64))
    x = torch.randn(4, 2, 20, 20, dtype=torch.float64)
    (found,) = collect(net, {"0": net[0]}, [x]).values()
    assert (found.samples, found.positions) == (4 * statistics.LEAST, 400)
    true = x.square().mean((0, 2, 3))
    error = x.square().transpose(0, 1).flatten(1).std(1) / found.samples**0.5
    assert bool(((found.moment[0].diagonal() - true).abs() <= 4 * error).all())


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_inner_products_are_derivatives_along_the_shift(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    net, layers, batches = ways()
    shifts = {
        name: torch.randn(2, *layers[name].weight.shape).double() for name in ("twice", "first", "unused")
    }
    found = inner_products(net, layers, shifts, batches, dict.fromkeys(shifts))
    assert not found["unused"].any()
    for name in ("twice", "first"):
        expected, weight = [], layers[name].weight
        for seed, x in enumerate(batches):
            generator = torch.Generator().manual_seed(seed)
            net.eval()(x)  # each image has its own part of the scalar: take it alone, with the same signs
            signs = torch.randint(0, 2, (len(x), 4), generator=generator).double() * 2 - 1
            for image in range(len(x)):
                output = net(x[image : image + 1])
                p = output.detach().softmax(1)
                weights = signs[image] * p.sqrt()
                scalar = ((weights - p * weights.sum()) * output).sum()
                gradient = torch.autograd.grad(scalar, weight)[0]
                expected.append((shifts[name] * gradient).flatten(1).sum(1))
        assert near(found[name], torch.stack(expected).detach(), 1e-5)


def test_inner_products_take_the_mean_patch_off() -> None:
    net, layers, batches = ways()
    shift = {"first": torch.randn(1, 8, 3, 3, 3).double()}
    mean = {"first": torch.randn(1, 27).double()}
    with_mean = inner_products(net, layers, shift, batches, mean)["first"]
    plain = inner_products(net, layers, shift, batches, {"first": None})["first"]
    constant = {"first": (shift["first"].flatten(2) @ mean["first"][0])[0]}  # what the mean patch gives
    kept: list[Tensor] = []
    handle = net.first.register_forward_hook(lambda m, a, y: kept.append(y) or y.clone())
    for seed, x in enumerate(batches):
        net.eval()
        output = net(x)
        gradient = torch.autograd.grad(probe(output, torch.Generator().manual_seed(seed)), kept[seed])[0]
        kept[seed] = gradient.sum((2, 3)) @ constant["first"]
    handle.remove()
    assert near(plain[:, 0] - with_mean[:, 0], torch.cat(kept).detach(), 1e-5)


class Frames(nn.Module):
    """Folds the frames of each image into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean((1, 3, 4))


def test_frames_are_added_up_for_their_image() -> None:
    net, batch = Frames().double().eval(), torch.randn(3, 5, 3, 8, 8).double()
    shifts = {"conv": torch.randn(2, 4, 3, 3, 3).double()}
    layers: dict[str, nn.Conv2d] = {"conv": net.conv}
    found = inner_products(net, layers, shifts, [batch], {"conv": None})["conv"]
    generator = torch.Generator().manual_seed(0)
    leaf = net.conv.weight
    for image in range(3):
        outputs = net(batch)
        scalar = probe(outputs, generator.manual_seed(0))
        mine = torch.autograd.grad(scalar, outputs, retain_graph=True)[0][image]
        (gradient,) = torch.autograd.grad(outputs[image] @ mine, leaf)
        torch.testing.assert_close(
            found[image].float(), (shifts["conv"] * gradient).sum((1, 2, 3, 4)).float(), rtol=1e-4, atol=1e-5
        )


def test_a_batch_that_is_no_multiple_of_the_images_is_refused() -> None:
    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:1].expand(3, -1, -1, -1)).mean((2, 3))[:2]

    net = Odd(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(InputError, match=r'0 sees a batch of 3 for 2 images.*or estimator="kfac"$'):
        inner_products(
            net, {"0": net[0]}, {"0": torch.randn(1, 4, 3, 3, 3)}, [torch.randn(2, 3, 8, 8)], {"0": None}
        )
