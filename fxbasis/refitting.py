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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calibration_data import naming_batch
from .compositions import GaugeComposition
from .forms import BasisConv2d
from .least_squares import Sums
from .lockstep import lockstep
from .running import ExampleInputs, run
from .windows import output_size, sampled_patches, sampled_values

__all__ = ["Targets", "add_constant", "batchnorms_behind", "refit_in_sequence_", "refittable", "targets_of"]

VALUES = 1 << 23
PER_UNKNOWN = 20
Targets = dict[str, dict[int, Tensor]]


def refittable(form: BasisConv2d) -> bool:
    """Whether its last step is called by itself, and is linear in weights of its own."""
    return bool(form.plan.called) and isinstance(form.composition, (nn.Conv2d, GaugeComposition))


def targets_of(
    layers: Mapping[str, nn.Module],
    forms: Mapping[str, BasisConv2d],
    model: nn.Module,
    batches: Sequence[ExampleInputs],
) -> Targets:
    """The sampled outputs of the original's layers, (n, C) by batch; of the first call of a run.

    Args:
        layers: the original's, by the names of ``forms``.
        forms: what they became.
        model: a copy of the original, to run.
        batches: inputs.
    """
    found: Targets = {name: {} for name in forms}

    def keeper(name: str, batch: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if batch not in found[name]:
                output = output if output.ndim == 4 else output[None]
                size = (int(output.shape[2]), int(output.shape[3]))
                at = _positions(name, batch, len(output), size, _wanted(forms[name], len(output), batches))
                found[name][batch] = sampled_values(output, at.to(output.device))

        return keep

    for batch, inputs in enumerate(batches):
        handles = [layers[name].register_forward_hook(keeper(name, batch), prepend=True) for name in forms]
        try:
            with naming_batch(batch + 1):
                run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _wanted(form: BasisConv2d, images: int, batches: Sequence[ExampleInputs]) -> int:
    """Positions of an image, if all batches are about as large as this one."""
    values = max(VALUES // form.out_channels, PER_UNKNOWN * _unknowns(form))
    return -(-values // (images * len(batches)))


def _unknowns(form: BasisConv2d) -> int:
    """How many features an output of the composition is made of."""
    step = form.plan.steps[-1]
    return step.in_channels // step.groups * prod(step.kernel_size)


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
        if name not in done and all(batch in targets[name] for batch in inputs):
            done.add(name)
            _refit(name, forms[name], inputs, targets[name], norms.get(name), batches)

    lockstep(model, last, batches, visit)


def _refit(
    name: str,
    form: BasisConv2d,
    inputs: Mapping[int, Tensor],
    targets: Mapping[int, Tensor],
    norm: nn.BatchNorm2d | None,
    batches: Sequence[ExampleInputs],
) -> None:
    groups, made = form.plan.steps[-1].groups, _made(form)
    sums = Sums(groups, _unknowns(form), len(made) // groups)
    copied = torch.zeros(form.out_channels, dtype=torch.float64)
    for batch, input in inputs.items():
        patches, target = _patches(name, form, batch, input, batches), targets[batch]
        sums.add(patches, target[:, made].reshape(len(target), *sums.y.shape).transpose(0, 1))
        copied += _copied(form, target, patches)
    start = form.composition.weight.detach().to("cpu", torch.float64).reshape(sums.cross.shape)
    weight, constant = sums.solve(start, with_mean=form.bias is not None or norm is not None)
    constants = copied / sums.count
    constants[made] = constant.flatten()
    _put(form, norm, weight, constants)


def _patches(
    name: str, form: BasisConv2d, batch: int, input: Tensor, batches: Sequence[ExampleInputs]
) -> Tensor:
    """What the composition sees at the positions of the targets, (g, N, n)."""
    last = form.composition
    pixels = nn.Conv2d(1, 1, 1, device="meta")  # of the gauge composition a patch is a pixel
    view, input = last if isinstance(last, nn.Conv2d) else pixels, input if input.ndim == 4 else input[None]
    wanted = _wanted(form, len(input), batches)
    at = _positions(name, batch, len(input), output_size(view, input), wanted)
    return sampled_patches(view, input, at.to(input.device), form.plan.steps[-1].groups)


@torch.no_grad()
def _put(form: BasisConv2d, norm: nn.BatchNorm2d | None, weight: Tensor, constants: Tensor) -> None:
    form.composition.weight.copy_(weight.reshape(form.composition.weight.shape))
    if form.bias is not None:
        form.bias.zero_()
    add_constant(form, norm, constants)


@torch.no_grad()
def add_constant(form: BasisConv2d, norm: nn.BatchNorm2d | None, constant: Tensor) -> None:
    """To the outputs of a form: in its bias, or in the running mean of the BatchNorm behind it."""
    if form.bias is not None:
        form.bias.add_(constant.to(form.bias))
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean.sub_(constant.to(norm.running_mean))


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
    names = {id(layer): name for name, layer in layers.items()}
    calls, read = _calls(model)
    found: dict[str, nn.BatchNorm2d] = {}
    for module, node, modules in calls:
        readers = list(node.users)
        if id(module) not in names or len(readers) != 1 or readers[0].op != "call_module":
            continue
        norm = modules[str(readers[0].target)]
        alone = read[id(norm)] == 1 and read[id(module)] == 1
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and alone:
            found[names[id(module)]] = norm
    return found


def _calls(model: nn.Module) -> tuple[list[tuple[nn.Module, fx.Node, dict[str, nn.Module]]], Counter[int]]:
    """Each call of a module in a graph; and how often each is called, or a tensor of it is read, in all."""
    calls, read = [], Counter[int]()
    for graph in (part for part in model.modules() if isinstance(part, fx.GraphModule)):
        modules = dict(graph.named_modules(remove_duplicate=False))
        for node in graph.graph.nodes:
            if node.op == "call_module":
                calls.append((modules[str(node.target)], node, modules))
                read[id(calls[-1][0])] += 1
            elif node.op == "get_attr":
                read[id(modules.get(str(node.target).rpartition(".")[0]))] += 1
    return calls, read
