"""What is known of each convolution from unlabelled data: one forward and one backward pass.

For every group of a layer: the mean of its patches and their second moment matrix, at sampled positions;
for the layer the Fisher metric of its outputs, the second moment of the gradient of ``divergence.probe``.
From the moments follow the error of any other weight, and the best one of any form (``datafit``); no image is
looked at again. Sums are float64; products of patches of more than ``WIDE`` numbers are float32, in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibration_data import naming_batch
from .divergence import probe
from .errors import InputError
from .running import ExampleInputs, batch_size, call, in_mode, seeded
from .windows import all_patches, sampled_patches

__all__ = ["LayerStatistics", "against", "by_image", "collect", "inner_products", "observed"]

WIDE = 1024
LEAST = 64  # positions sampled of an image
CHUNK = 1 << 21  # numbers of patches that are unfolded at once; 8 MB stay in the cache


@dataclass
class LayerStatistics:
    """Sums over the patches seen, and over the outputs' gradients.

    Attributes:
        mean: (g, q), of the patches. moment: (g, q, q), mean of x x^T, not centred.
        metric: (C, C), mean over positions of the outer product of the gradient of an output position.
        positions: outputs of one image, all calls.
        samples: patches that the moments were taken over.
    """

    mean: Tensor
    moment: Tensor
    metric: Tensor
    positions: int = 0
    samples: int = 0
    gradients: int = field(default=0, repr=False)

    @property
    def covariance(self) -> Tensor:
        """(g, q, q), of the patches about their mean."""
        return self.moment - self.mean[:, :, None] * self.mean[:, None, :]


@contextmanager
def observed(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Keeps, for each call of a layer inside, its input and a zero added to its output, for gradients."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            input = args[0] if args else kwargs["input"]
            zero = torch.zeros_like(output, requires_grad=True)
            calls[name].append((input.detach().clone(), zero))
            return output + zero

        return keep

    handles = [
        layer.register_forward_hook(hook(name), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: ExampleInputs,
    seed: int,
    *,
    needed: bool = True,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each call of a layer in one batch: its name, its input, and the gradient at its output.

    Zeros in place of the gradient where none is needed.
    """
    generator = torch.Generator().manual_seed(seed)
    with observed(layers) as calls, torch.enable_grad(), in_mode(model, False), seeded():
        output = call(model, inputs)
        scalar = probe(output, generator) if needed else None
    flat = [(name, *call) for name, found in calls.items() for call in found]
    gradients: Sequence[Tensor | None] = [None] * len(flat)
    if scalar is not None and scalar.requires_grad and flat:
        gradients = torch.autograd.grad(scalar, [zero for _, _, zero in flat], allow_unused=True)
    for (name, input, zero), gradient in zip(flat, gradients, strict=True):
        yield name, input, torch.zeros_like(zero) if gradient is None else gradient


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Conv2d],
    batches: Sequence[ExampleInputs],
    *,
    gradients: bool = True,
) -> dict[str, LayerStatistics]:
    """The statistics of each layer over all batches.

    Args:
        model: a copy to run; ``layers`` are its convolutions by name.
        batches: inputs; every batch is run once.
        gradients: otherwise the metric is the identity.
    """
    found = {name: _empty(layer) for name, layer in layers.items()}
    images = 0
    for seed, inputs in enumerate(batches):
        generator = torch.Generator().manual_seed(seed)
        with naming_batch(seed + 1):
            for name, input, gradient in _gradients(model, layers, inputs, seed, needed=gradients):
                _add(found[name], layers[name], input, gradient, generator)
        images += batch_size(inputs)
    for statistics in found.values():
        _finish(statistics, images)
        if not gradients:
            statistics.metric = torch.eye(len(statistics.metric), dtype=torch.float64)
    return found


def _empty(layer: nn.Conv2d) -> LayerStatistics:
    q, o = layer.weight[0].numel(), layer.out_channels
    zeros = torch.zeros(layer.groups, q, q, dtype=torch.float64)
    return LayerStatistics(zeros[..., 0].clone(), zeros, torch.zeros(o, o, dtype=torch.float64))


def _add(
    into: LayerStatistics, layer: nn.Conv2d, input: Tensor, gradient: Tensor, generator: torch.Generator
) -> None:
    flat = gradient.reshape(-1, *gradient.shape[-3:]).flatten(2)  # (B, C, S)
    count = min(max(LEAST, -(-into.mean.shape[1] // 64)), flat.shape[2])
    order = torch.rand(len(flat), flat.shape[2], generator=generator).argsort(1)[:, :count]
    patches = sampled_patches(layer, input, order.to(input.device)).to("cpu")
    into.mean += patches.double().sum(1)
    into.moment += _squared(patches)
    into.samples += order.numel()
    wide = flat.transpose(0, 1).flatten(1).to("cpu", torch.float64)
    into.metric += wide @ wide.mT
    into.gradients += flat.shape[0] * flat.shape[2]
    into.positions += flat.shape[0] * flat.shape[2]


def _squared(patches: Tensor) -> Tensor:
    """(g, N, q) to the sum of x x^T (g, q, q)."""
    patches = patches.double() if patches.shape[2] <= WIDE else patches.float()
    parts = torch.split(patches, 4096, 1)
    return torch.stack([(part.mT @ part).double() for part in parts]).sum(0)


def _finish(statistics: LayerStatistics, images: int) -> None:
    statistics.mean /= max(1, statistics.samples)
    statistics.moment /= max(1, statistics.samples)
    statistics.metric /= max(1, statistics.gradients)
    statistics.positions //= max(1, images)


def inner_products(
    model: nn.Module,
    layers: Mapping[str, nn.Conv2d],
    shifts: Mapping[str, Tensor],
    batches: Sequence[ExampleInputs],
    means: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """For each image, layer and shift of its weight, the inner product with the gradient of the weight.

    Half the mean square over the images is the change that the shift causes, to second order, by the exact
    Fisher metric: no independence of positions or of inputs and gradients is assumed.

    Args:
        model, layers, batches: as of ``collect``.
        shifts: by name, (n, out_channels, in_channels / groups, K_h, K_w).
        means: by name, the mean patch (g, q) that is taken off first, or None.

    Returns:
        By name, (images, n) float64.
    """
    flat = {name: shift.flatten(1).float() for name, shift in shifts.items()}
    chosen = {name: layers[name] for name in shifts}
    found: dict[str, list[Tensor]] = {name: [] for name in shifts}
    for seed, inputs in enumerate(batches):
        sums = {name: torch.zeros(batch_size(inputs), len(shift)) for name, shift in flat.items()}
        for name, input, gradient in _gradients(model, chosen, inputs, seed):
            values = against(layers[name], input, gradient, flat[name], means[name])
            sums[name] += by_image(name, values, len(sums[name]))
        for name, values in sums.items():
            found[name].append(values.double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def by_image(name: str, values: Tensor, images: int) -> Tensor:
    """(B, n) for the images of the model's batch, of which a layer may see several parts: frames, windows."""
    if len(values) % images:
        raise InputError(
            f"{name} sees a batch of {len(values)} for {images} images, so it is not known which is whose; "
            'pass one image in each batch, or estimator="kfac"'
        )
    return values.view(images, -1, values.shape[1]).sum(1)


def against(layer: nn.Conv2d, input: Tensor, gradient: Tensor, shifts: Tensor, mean: Tensor | None) -> Tensor:
    """(B, n): the gradient of the weight of each image, of one call, against each of the shifts (n, C q)."""
    images = gradient.reshape(-1, *gradient.shape[-3:])
    inputs = input.reshape(-1, *input.shape[-3:])
    patch = layer.weight[0].numel() * layer.groups * images.shape[2] * images.shape[3]
    found = []
    chunks = (torch.split(tensor, max(1, CHUNK // patch)) for tensor in (inputs, images))
    for part, grad in zip(*chunks, strict=True):
        patches = all_patches(layer, part)  # (b, g, q, S)
        mine = grad.reshape(len(grad), layer.groups, -1, patches.shape[3])
        weights = mine @ patches.mT  # (b, g, C / g, q)
        if mean is not None:
            weights = weights - mine.sum(3, keepdim=True) * mean[:, None].to(weights)
        weights = weights.flatten(1)
        found.append(weights.to("cpu", torch.float32) @ shifts.mT)
    return torch.cat(found)
