"""Sequential refit: the last step of every form by least squares on what the compressed model itself brings.

Layer by layer, in the order of calls: the features that the already compressed and refitted model feeds to
the composition, against the outputs of the original layer at the same positions of the same images. So each
layer also repairs what the layers before it did. Where the layer has a bias, or a BatchNorm alone reads its
outputs, the mean is fitted too; the BatchNorm takes it into its running mean. One forward pass of each model
(see ``lockstep``); of each layer at most ``VALUES`` output values are kept, or ``PER_UNKNOWN`` positions for
each unknown. Source: the asymmetric reconstruction of Zhang, Zou, He, Sun 2016, for any last factor.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .compositions import GaugeComposition
from .forms import BasisConv2d
from .least_squares import Sums
from .lockstep import lockstep
from .running import ExampleInputs, run
from .windows import output_size, sampled_patches, sampled_values

__all__ = ["Targets", "batchnorms_behind", "refit_in_sequence_", "refittable", "targets_of"]

VALUES = 1 << 23
PER_UNKNOWN = 20
Targets = dict[str, list[Tensor]]


def refittable(form: BasisConv2d) -> bool:
    """Whether its last step is called by itself, and is linear in weights of its own."""
    return bool(form.plan.called) and isinstance(form.composition, (nn.Conv2d, GaugeComposition))


def targets_of(
    layers: Mapping[str, nn.Module],
    forms: Mapping[str, BasisConv2d],
    model: nn.Module,
    batches: Sequence[ExampleInputs],
) -> Targets:
    """The sampled outputs of the original's layers, (n, C) for each batch; of the first call of a run.

    Args:
        layers: the original's, by the names of ``forms``.
        forms: what they became.
        model: a copy of the original, to run.
        batches: inputs.
    """
    found: Targets = {name: [] for name in forms}

    def keeper(name: str, batch: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if len(found[name]) == batch:
                output = output if output.ndim == 4 else output[None]
                size = (int(output.shape[2]), int(output.shape[3]))
                at = _positions(name, batch, len(output), size, _wanted(forms[name], len(output), batches))
                found[name].append(sampled_values(output, at.to(output.device)))

        return keep

    for batch, inputs in enumerate(batches):
        handles = [layers[name].register_forward_hook(keeper(name, batch), prepend=True) for name in forms]
        run(model, inputs)
        for handle in handles:
            handle.remove()
    return found


def _wanted(form: BasisConv2d, images: int, batches: Sequence[ExampleInputs]) -> int:
    """Positions of an image, if all batches are about as large as this one."""
    unknowns = form.composition.weight[0].numel()
    return -(-max(VALUES // form.out_channels, PER_UNKNOWN * unknowns) // (images * len(batches)))


def _positions(name: str, batch: int, images: int, size: tuple[int, int], wanted: int) -> Tensor:
    """(images, P) positions of a layer's outputs, the same whenever they are asked for."""
    total = size[0] * size[1]
    if wanted >= total:
        return torch.arange(total).expand(images, total)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {batch}".encode()))
    return torch.randint(total, (images, wanted), generator=generator)


def refit_in_sequence_(
    model: nn.Module,
    forms: Mapping[str, BasisConv2d],
    targets: Targets,
    batches: Sequence[ExampleInputs],
) -> None:
    """Refit the composition of each form, in place.

    Args:
        model: compressed; ``forms`` are its forms by name.
        targets: of ``targets_of``, for the same batches.
        batches: inputs; run side by side.
    """
    last = {name: form.composition for name, form in forms.items()}
    norms, done = batchnorms_behind(model, last), set()

    def visit(name: str, inputs: dict[int, Tensor]) -> None:
        if name not in done and all(len(targets[name]) > batch for batch in inputs):
            done.add(name)
            _refit(name, forms[name], inputs, targets[name], norms.get(name), batches)

    lockstep(model, last, batches, visit)


def _refit(
    name: str,
    form: BasisConv2d,
    inputs: Mapping[int, Tensor],
    targets: Sequence[Tensor],
    norm: nn.BatchNorm2d | None,
    batches: Sequence[ExampleInputs],
) -> None:
    last, groups = form.composition, form.plan.steps[-1].groups
    made = _made(form)
    view = last if isinstance(last, nn.Conv2d) else nn.Conv2d(1, 1, 1, groups=1)  # a 1x1 patch is a pixel
    sums = Sums(groups, last.weight[0].numel(), len(made) // groups)
    copied, count = torch.zeros(form.out_channels, dtype=torch.float64), 0
    for batch, input in inputs.items():
        input = input if input.ndim == 4 else input[None]
        size = output_size(view, input)
        at = _positions(name, batch, len(input), size, _wanted(form, len(input), batches)).to(input.device)
        patches = sampled_patches(view, input, at, groups)
        target = targets[batch]
        sums.add(patches, target[:, made].reshape(at.numel(), groups, -1).transpose(0, 1))
        copied += _copied(form, target, patches)
        count += at.numel()
    start = last.weight.detach().to("cpu", torch.float64).reshape(groups, -1, sums.gram.shape[1])
    weight, constant = sums.solve(start, with_mean=form.bias is not None or norm is not None)
    constants = copied / max(1, count)
    constants[made] = constant.flatten()
    with torch.no_grad():
        last.weight.copy_(weight.reshape(last.weight.shape))
        if form.bias is not None:
            form.bias.copy_(constants)
        elif norm is not None and norm.running_mean is not None:
            norm.running_mean.sub_(constants.to(norm.running_mean))


def _made(form: BasisConv2d) -> Tensor:
    """The output channels that the weight of the composition makes, in its order."""
    last = form.composition
    if isinstance(last, GaugeComposition):
        return last.order.argsort()[form.plan.rank :].cpu()
    return torch.arange(form.out_channels)


def _copied(form: BasisConv2d, target: Tensor, patches: Tensor) -> Tensor:
    """For the outputs that are copies the summed difference from their targets; 0 for the others."""
    found = torch.zeros(form.out_channels, dtype=torch.float64)
    last = form.composition
    if isinstance(last, GaugeComposition):
        copies = last.order.argsort()[: form.plan.rank].cpu()
        given = patches.transpose(0, 1).flatten(1).to("cpu", torch.float64)
        found[copies] = (target[:, copies].to("cpu", torch.float64) - given).sum(0)
    return found


def batchnorms_behind(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.BatchNorm2d]:
    """By name the BatchNorm that alone reads a layer's outputs, where a graph shows it.

    Its statistics must be its own: one that is called elsewhere too is left alone.
    """
    found: dict[str, nn.BatchNorm2d] = {}
    names = {id(layer): name for name, layer in layers.items()}
    for graph in (part for part in model.modules() if isinstance(part, fx.GraphModule)):
        modules = dict(graph.named_modules(remove_duplicate=False))
        calls = [node for node in graph.graph.nodes if node.op == "call_module"]
        called = [id(modules[str(node.target)]) for node in calls]
        for node in calls:
            name = names.get(id(modules[str(node.target)]))
            readers = list(node.users)
            if name is None or len(readers) != 1 or readers[0].op != "call_module":
                continue
            norm = modules[str(readers[0].target)]
            alone = called.count(id(norm)) == 1 and called.count(id(modules[str(node.target)])) == 1
            if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and alone:
                found[name] = norm
    return found
