"""``number_convs``: every Conv2d of a model, numbered in the order of definition.

Each distinct Conv2d module has one number, whether or not it runs and however many names it has; a
rewritten layer keeps the number of the convolution that it stands for. Sizes, MACs, the order and the
number of calls come from one run on a copy, so that the model, its statistics and the RNG stay untouched.
Convolutions that are no module (``F.conv2d`` in the code) have no number; the table lists them apart.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.utils import _pair
from torch.nn.utils import parametrize

from ..arguments import check_flags
from ..copying import check_module, passing_copy
from ..costs import ConvShape, dense_macs, dense_params
from ..errors import InputError, LayerError
from ..forms import RESERVED, BasisConv2d, as_form, layer_plan
from ..kernels import KernelError, class_of, held_besides, kernel_of, weight_hooks
from ..recipe import LAYER, UNFIT, LayerPlan
from ..running import ExampleInputs
from ..structures import FORMS, form_macs, form_params
from .base import CONV_NUMBER, FxPass, call_sites
from .readers import readers_in
from .records import COMPRESSED, DEPTHWISE, NO_GAIN, OK, UNSUPPORTED, ConvRecord, ConvTable
from .tracing import python_in_train, refuse_lazy
from .watching import Call, Seen, watched_run

__all__ = ["ConvRecord", "ConvTable", "NumberingPass", "conv_layers", "number_convs", "shape_of"]


def conv_layers(model: nn.Module) -> dict[str, nn.Conv2d | BasisConv2d]:
    """Every distinct Conv2d or form by its first name, in the order of definition.

    Raises:
        LayerError: for a form whose composition was exchanged.

    >>> list(conv_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))))
    ['0', '2']
    """
    check_module(model)
    layers: dict[str, nn.Conv2d | BasisConv2d] = {}
    factors: set[int] = set()
    for name, module in model.named_modules():
        form = as_form(module)
        if form is not None:
            _check_whole(name, form)
            layers[name] = form
            factors |= {id(part) for part in form.factors.values()}
        elif isinstance(module, nn.Conv2d) and id(module) not in factors:
            layers[name] = module
    return layers


def _check_whole(name: str, form: BasisConv2d) -> None:
    if not hasattr(form.composition, LAYER):
        raise LayerError(
            f"{name}: its composition was exchanged for a {type(form.composition).__name__}, which does not "
            "hold the plan of the layer; write into its weight instead, or fold the model first"
        )


def number_convs(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, effective_weights: bool = False
) -> ConvTable:
    """Number the convolutions of a model, with sizes and MACs when inputs are given.

    Args:
        model: any nn.Module, traced or not, compressed or not; it is not touched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; MACs count the whole
            batch.
        effective_weights: take classes that compute their kernel from the stored weight for supported.

    Raises:
        LayerError: when a lazy convolution has no weight yet.
        InputError: when the model fails on the inputs.

    >>> import torch
    >>> table = number_convs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), torch.zeros(1, 3, 8, 8))
    >>> [(record.index, record.name, record.output_size, record.macs) for record in table]
    [(1, '0', (6, 6), 7776), (2, '1', (6, 6), 2304)]
    """
    check_flags(effective_weights=effective_weights)
    refuse_lazy(model)
    layers = conv_layers(model)
    seen = Seen({}, (), {}) if example_inputs is None else _seen(model, example_inputs)
    calls = None if example_inputs is None else seen.calls
    readers = seen.readers | readers_in(model, layers)
    records = []
    for index, (name, layer) in enumerate(layers.items(), 1):
        obstacle, effective = _obstacle(layer, effective_weights)
        if obstacle in ("", DEPTHWISE):  # which hinders not every form
            obstacle = readers.get(name, obstacle)
        records.append(_record(index, name, layer, calls, obstacle, effective))
    return ConvTable(records, seen.functional)


def _seen(model: nn.Module, example_inputs: ExampleInputs) -> Seen:
    with passing_copy(model) as copied:
        seen = watched_run(copied, conv_layers(copied), example_inputs)
    if python_in_train(model):
        with suppress(InputError), passing_copy(model) as again:  # as BatchNorm does with a batch of one
            trained = watched_run(again, conv_layers(again), example_inputs, training=True)
            seen = replace(seen, readers=trained.readers | seen.readers)
    return seen


def _record(
    index: int,
    name: str,
    layer: nn.Conv2d | BasisConv2d,
    calls: dict[str, list[Call]] | None,
    obstacle: str,
    effective: bool,
) -> ConvRecord:
    shape = shape_of(layer)
    made = [] if calls is None else calls.get(name, [])
    sizes = [(int(size[-2]), int(size[-1])) for _, size, _ in made]
    inputs = [(int(size[-2]), int(size[-1])) for _, _, size in made]
    batches = [int(size[0]) if len(size) == 4 else 1 for _, size, _ in made]
    prepares = isinstance(layer, nn.Conv2d) and class_of(layer) is not nn.Conv2d and not effective
    status, reason = _status(layer, shape, obstacle, calls is not None and not made)
    plan = layer.plan if isinstance(layer, BasisConv2d) else None
    return ConvRecord(
        index=index,
        name=name,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        kernel_size=shape.kernel_size,
        stride=_pair(layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
        dilation=_pair(layer.dilation),
        groups=shape.groups,
        bias=shape.bias,
        output_size=sizes[0] if sizes else None,
        macs=None if calls is None else sum(map(_macs_of(shape, plan), sizes, inputs, batches)),
        params=dense_params(shape) if plan is None else form_params(plan.form, shape, plan.ranks),
        order=made[0][0] if made else None,
        calls=None if calls is None else len(made),
        status=status,
        reason=reason,
        effective=effective,
        prepares=prepares,
        input_size=inputs[0] if inputs else None,
        elements=None if calls is None else sum(size.numel() for _, size, _ in made),
        sizes=tuple(zip(batches, sizes, inputs, strict=True)),
    )


def shape_of(layer: nn.Conv2d | BasisConv2d) -> ConvShape:
    """By the stored weight where there is one, which counts, whatever the options say."""
    weight, bias = layer._parameters.get("weight"), layer.bias is not None
    if weight is None or weight.ndim != 4:
        kernel = _pair(layer.kernel_size)
        return ConvShape(layer.in_channels, layer.out_channels, kernel, layer.groups, bias)
    filters, inner, height, width = weight.shape
    return ConvShape(inner * layer.groups, filters, (height, width), layer.groups, bias)


def _macs_of(shape: ConvShape, plan: LayerPlan | None) -> Any:
    if plan is None:
        return lambda size, _, batch: dense_macs(shape, size, batch)
    return lambda size, before, batch: form_macs(plan.form, shape, plan.ranks, size, before, batch)


def _status(layer: nn.Conv2d | BasisConv2d, shape: ConvShape, obstacle: str, idle: bool) -> tuple[str, str]:
    if isinstance(layer, BasisConv2d):
        plan = layer.plan
        ranks, largest = (
            ", ".join(map(str, found))
            for found in (plan.ranks, FORMS[plan.form].largest_ranks(shape, plan.method))
        )
        return COMPRESSED, f"{plan.form} form, {plan.method}, rank {ranks} of {largest}"
    if idle and obstacle in ("", DEPTHWISE):
        return UNSUPPORTED, "it is not called on these inputs"
    if obstacle:
        return UNSUPPORTED, obstacle
    if not shape.gains:
        return NO_GAIN, f"break-even rank {shape.break_even_rank:.1f}"
    decided = layer_plan(layer)
    return OK, f"left dense: {decided.reason}" if decided is not None else ""


def _obstacle(layer: nn.Conv2d | BasisConv2d, effective_weights: bool) -> tuple[str, bool]:
    """Why it cannot be rewritten, empty when it can; and whether its kernel is not the stored weight."""
    if isinstance(layer, BasisConv2d):
        return "", layer.plan.effective
    if UNFIT in vars(layer):
        return str(vars(layer)[UNFIT]), False
    taken = sorted(RESERVED & {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules})
    if taken:
        return f"its attribute {taken[0]} has another meaning in a form", False
    if any(part is not None and _has_gradient_hooks(part) for part in layer._parameters.values()):
        return "its weight or bias has hooks of its gradient", False
    made = any(name == "weight" for _, name in weight_hooks(layer).values())
    if "weight" not in layer._parameters and not parametrize.is_parametrized(layer, "weight") and not made:
        return "its weight is no parameter", False
    try:
        kernel = kernel_of(layer)
    except KernelError as error:
        return str(error), False
    held = held_besides(layer)
    if held and not kernel.effective:
        return f"it holds {', '.join(sorted(held))} besides its weight and bias", False
    if kernel.effective and not effective_weights:
        what = f"its class {type(layer).__name__} convolves with another weight than the stored one"
        return f"{what}; effective_weights=True compresses that", True
    return _obstacle_of_kernel(kernel.conv), kernel.effective


def _has_gradient_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _obstacle_of_kernel(conv: nn.Conv2d) -> str:
    if not conv.weight.is_floating_point():
        return f"its weight is {str(conv.weight.dtype).removeprefix('torch.')}"
    if conv.groups > 1 and conv.groups == conv.out_channels:
        return DEPTHWISE
    return ""


class NumberingPass(FxPass):
    """Write each convolution's number into ``node.meta[CONV_NUMBER]`` of the nodes that call it."""

    def change(self, graph_module: fx.GraphModule) -> int:
        """Number the call sites; counts those whose number was missing or different."""
        changed = 0
        for index, (name, layer) in enumerate(conv_layers(graph_module).items(), 1):
            steps = layer.plan.called if isinstance(layer, BasisConv2d) else ()
            factors = {f"{name}.{step}" for step in steps}
            for node in call_sites(graph_module, {name, *factors}):
                changed += node.meta.get(CONV_NUMBER) != index
                node.meta[CONV_NUMBER] = index
        return changed
