"""What a Conv2d computes: the kernel of eval(), whoever makes it.

nn.Conv2d convolves with its stored weight, unless a parametrization or a pre-hook of ``torch.nn.utils``
(weight_norm, spectral_norm, prune) makes that weight. A subclass with a forward of its own is found out by
running that on synthetic inputs, without anybody's hooks, and recording the convolutions it calls:

* one convolution with the stored weight: the class only prepares its input (timm's Conv2dSame pads), so the
  same class with fewer filters is its basis;
* one convolution of its untouched input with another weight (weight standardisation): the *effective* kernel,
  a plain nn.Conv2d;
* anything else has no kernel to compress.

Synthetic inputs are a hint; ``proving`` compares on the example inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.nn.utils import parametrize, skip_init
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from .contexts import contexts, open_contexts
from .copying import copy_model
from .nests import tensors_of
from .running import in_mode, seeded

__all__ = [
    "Kernel",
    "KernelError",
    "bare_conv",
    "class_of",
    "conv_like",
    "held_besides",
    "kernel_of",
    "makers_of",
    "original_forward",
    "own_class",
    "run_weight_hooks",
    "settled_twin",
    "weight_hooks",
]

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_PARTS = ("g", "v", "u", "orig", "mask")
_CALLED = ("forward", "_conv_forward", "_call_impl")
_OF_MODULES = (
    *("train", "eval", "state_dict", "_save_to_state_dict"),
    *("get_extra_state", "parameters", "named_parameters", "_apply"),
    *("__getattr__", "__setattr__", "__delattr__", "__deepcopy__"),
)
_OF_STATE = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


Step = TypeVar("Step", bound=nn.Module)


class KernelError(Exception):
    """Why a convolution has no kernel that could be compressed."""


@dataclass(frozen=True)
class Kernel:
    """How one convolution computes.

    Attributes:
        conv: a stand-in with the function of eval(), without hooks and parametrizations. Its weight
            (out_channels, in_channels / groups, K_h, K_w) and bias are parameters; its class is nn.Conv2d,
            or the convolution's own when that prepares the input.
        effective: the weight is another than the stored one, made by the class's own forward.
    """

    conv: nn.Conv2d
    effective: bool = False


def kernel_of(conv: nn.Conv2d) -> Kernel:
    """The kernel that a convolution uses in eval(); the convolution is not touched.

    >>> kernel_of(nn.Conv2d(3, 8, 3)).effective
    False

    Raises:
        KernelError: when it makes more than one convolution, or other work after it.
    """
    replaced = [name for name in _CALLED if name in vars(conv)]
    if replaced:
        raise KernelError(f"its {replaced[0]} was replaced on the instance")
    _check_class(conv)
    settled = settled_twin(conv)
    _check_options(settled)
    if type(settled).__call__ is not nn.Module.__call__:
        raise KernelError(f"its class {type(settled).__name__} has its own __call__")
    if type(settled) is nn.Conv2d:
        return Kernel(settled)
    first, second = (_probe(settled, training=training) for training in (False, True))
    if first["stored"] and second["stored"]:
        _probe(settled, training=False, gradients=False)
        return Kernel(settled)
    return Kernel(_effective(settled, first, second), effective=True)


def own_class(conv: nn.Module) -> type[Any]:
    """Its class before parametrization."""
    kind: type[Any] = parametrize.type_before_parametrizations(conv)
    return kind


def class_of(conv: nn.Module) -> type[Any]:
    """Its class before parametrization; nn.Conv2d for a subclass that computes as that does."""
    kind = own_class(conv)
    names = ("forward", "_conv_forward", "__call__")
    same = all(getattr(kind, name, None) is getattr(nn.Conv2d, name) for name in names)
    return nn.Conv2d if same else kind


def _check_class(conv: nn.Conv2d) -> None:
    """Refuse what a class, or its hooks, do besides the convolution that a form would not do."""
    kind = own_class(conv)
    own = [name for name in _OF_MODULES if getattr(kind, name, None) is not getattr(nn.Conv2d, name, None)]
    if own:
        raise KernelError(f"its class {kind.__name__} has its own {own[0]}")
    hooks = [hook for name in _OF_STATE for hook in vars(conv).get(name, {}).values()]
    hooks = [getattr(hook, "hook", hook) for hook in hooks]  # torch wraps some of them
    if not all(str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks):
        raise KernelError("it has hooks of its state_dict")


def _check_options(settled: nn.Conv2d) -> None:
    """Refuse options that do not belong to the weight: either may have been changed after the other."""
    told = (settled.out_channels, settled.in_channels // settled.groups, *settled.kernel_size)
    if tuple(settled.weight.shape) != told:
        shapes = ["x".join(map(str, shape)) for shape in (settled.weight.shape, told)]
        raise KernelError(f"its weight is {shapes[0]}, its options say {shapes[1]}")
    around = settled._reversed_padding_repeated_twice
    if settled.padding_mode != "zeros" and not isinstance(settled.padding, str):
        rows, columns = settled.padding
        if tuple(around) != (columns, columns, rows, rows):
            raise KernelError(
                f"its padding was changed, which its {settled.padding_mode} padding does not follow"
            )


def weight_hooks(module: nn.Module) -> dict[int, tuple[Callable[..., Any], str]]:
    """The pre-hooks of torch.nn.utils that make a tensor anew at every call, by id, with its name."""
    found: dict[int, tuple[Callable[..., Any], str]] = {}
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod):
            found[key] = (hook, hook._tensor_name)
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            found[key] = (hook, hook.name)
    return found


def run_weight_hooks(module: nn.Module) -> None:
    """Make anew what the pre-hooks of torch.nn.utils make, for a module that is not called itself."""
    for hook, _ in weight_hooks(module).values():
        hook(module, ())


def makers_of(conv: nn.Conv2d) -> str:
    """What makes its weight and bias: names of parametrizations and hooks; empty for a plain one."""
    hooks = ", ".join(type(hook).__name__ for hook, _ in weight_hooks(conv).values())
    if hooks:
        return f"its weight hook ({hooks})"
    if not parametrize.is_parametrized(conv, "weight"):
        return ""
    parts = conv.get_submodule("parametrizations.weight").children()
    kinds = ", ".join(type(part).__name__.lstrip("_") for part in parts)
    return f"its parametrization ({kinds})"


def held_besides(conv: nn.Module) -> set[str]:
    """Parameters, buffers and modules beyond weight, bias and what makes them."""
    made = {f"{name}_{part}" for _, name in weight_hooks(conv).values() for part in _PARTS}
    held = {*conv._parameters, *conv._buffers, *conv._modules}
    return held - made - {"weight", "bias", "parametrizations"}


def original_forward(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """Its own computation in eval(), parametrizations and weight hooks included, the user's hooks not."""
    twin, hooks = _twin(conv), weight_hooks(conv)

    def forward(input: Tensor) -> Tensor:
        with in_mode(twin, training=False):
            for hook, _ in hooks.values():
                hook(twin, (input,))
            output: Tensor = twin.forward(input)
        return output

    return forward


def conv_like(conv: nn.Conv2d, out_channels: int, *, bias: bool) -> nn.Conv2d:
    """The same class and options with other filters, uninitialised; the random state is not touched."""
    weight = conv.weight
    if type(conv) is nn.Conv2d:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(conv, name) for name in names} | {"bias": bias}
        return bare_conv(conv.in_channels, out_channels, conv.kernel_size, weight, **options)
    twin = _twin(conv)
    twin.out_channels = out_channels
    filters = weight.new_empty(out_channels, *weight.shape[1:])
    _store(twin, filters, weight.new_empty(out_channels) if bias else None)
    return twin


def bare_conv(in_channels: int, out_channels: int, kernel: Any, like: Tensor, **options: Any) -> nn.Conv2d:
    """A plain Conv2d, uninitialised, dtype and device of ``like``; the random state is not touched."""
    conv: nn.Conv2d = skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, in_channels, out_channels, kernel, device=like.device, dtype=like.dtype, **options
    )
    return conv


def _twin(conv: Step) -> Step:
    """The same tensors in another object, whose dicts can be changed, without hooks."""
    twin = type(conv).__new__(type(conv))
    for key, value in vars(conv).items():
        hooks = isinstance(value, dict) and "_hooks" in key
        vars(twin)[key] = (
            type(value)() if hooks else copy.copy(value) if isinstance(value, (dict, set)) else value
        )
    return twin


@torch.no_grad()
def settled_twin(conv: Step) -> Step:
    """A twin with the weight and bias of eval() as plain parameters, and nothing that makes them.

    Of a convolution, or of another module with a weight and a bias.
    """
    made, twin = weight_hooks(conv), _twin(conv)
    with in_mode(conv, training=False), in_mode(twin, training=False):
        for hook, _ in made.values():
            hook(twin, ())
        weight, bias = cast(Tensor, twin.weight), cast("Tensor | None", twin.bias)
    try:
        twin.__class__ = class_of(conv)
    except TypeError as error:
        raise KernelError(f"its class {type(conv).__name__} cannot be exchanged: {error}") from error
    for name in ("kernel_size", "stride", "padding", "dilation"):  # which PyTorch takes as numbers too
        value = getattr(twin, name, "")
        if not isinstance(value, str):
            setattr(twin, name, _pair(value))
    keep = held_besides(conv)
    for store in (twin._parameters, twin._buffers, twin._modules):
        for name in set(store) - keep:
            del store[name]
    _store(twin, weight, bias)
    return twin


def _store(conv: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Set both as parameters, before any others; gradients where the dtype has them."""
    rest = {name: part for name, part in conv._parameters.items() if name not in ("weight", "bias")}
    conv._parameters.clear()
    for name, tensor in {"weight": weight, "bias": bias}.items():
        vars(conv).pop(name, None)
        grad = tensor is not None and (tensor.is_floating_point() or tensor.is_complex())
        part = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=grad)
        conv.register_parameter(name, part)
    conv._parameters.update(rest)


class _Recorder(TorchFunctionMode):
    """Keeps the arguments and the output of each 2-D convolution, and whether others read its tensors."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stored = [tensor for tensor in (conv.weight, conv.bias) if tensor is not None]
        self.channels = 0  # of the input of one that runs, or failed
        self.read = False
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and record it."""
        given = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
        if func is torch.conv2d:
            self.channels = given["input"].shape[-3]
        output = func(*args, **(kwargs or {}))
        self.channels = 0
        if func is torch.conv2d:
            state = {"output": output, "version": output._version, "contexts": open_contexts()}
            self.calls.append(_DEFAULTS | given | state)
        elif any(given is held for given in tensors_of([args, kwargs]) for held in self.stored):
            self.read |= any(part is not held for part in tensors_of([output]) for held in args[:1])
        return output


def _probe(settled: nn.Conv2d, *, training: bool, gradients: bool = True) -> dict[str, Any]:
    """The one convolution that its forward makes of a synthetic input.

    "prepared": not of that itself; "stored": with the weight itself. Without gradients it is in autocast.
    """
    twin = copy_model(settled)
    recorder, name = _Recorder(twin), type(settled).__name__
    with (
        contexts(gradients=gradients, autocast=not gradients),
        seeded(int(training)),
        in_mode(twin, training),
    ):
        x, held = _synthetic(settled, 5 if training else 2), _held(twin)
        before, around = _versions(x, twin), open_contexts()
        try:
            with recorder:
                output = twin.forward(x)
        except Exception as error:
            if recorder.channels not in (0, settled.in_channels):
                raise KernelError(f"its class {name} changes the number of channels of its input") from error
            what = f"{type(error).__name__}: {error}"
            raise KernelError(f"its class {name} fails on a synthetic input ({what})") from error
        kept = sorted(key for key, value in _held(twin).items() if value is not held.get(key, held))
    if kept:
        raise KernelError(f"its class {name} keeps {', '.join(kept)} from call to call")
    if len(recorder.calls) != 1:
        raise KernelError(f"its class {name} makes {len(recorder.calls)} convolutions in its own forward")
    call = recorder.calls[0]
    if output is not call["output"] or output._version != call["version"]:
        raise KernelError(f"its class {name} changes the output of its convolution in its own forward")
    if call["bias"] is not twin.bias:
        raise KernelError(f"its class {name} uses another bias than the stored one")
    stored = call["weight"] is twin.weight
    if before != _versions(x, twin) or (stored and recorder.read):
        raise KernelError(f"its class {name} reads its weight, or changes its input or weight in place")
    if call["contexts"] != around:
        raise KernelError(f"its class {name} opens a context (no_grad, autocast) in its own forward")
    return call | {"prepared": call["input"] is not x, "stored": stored}


def _versions(x: Tensor, conv: nn.Conv2d) -> list[int]:
    return [tensor._version for tensor in (x, *conv.parameters())]


def _held(conv: nn.Conv2d) -> dict[str, Any]:
    """Its attributes, parameters, buffers and modules."""
    plain = {key: value for key, value in vars(conv).items() if not key.startswith("_")}
    return plain | conv._parameters | conv._buffers | conv._modules


def _synthetic(conv: nn.Conv2d, extra: int) -> Tensor:
    """(2, in_channels, H, W), large enough for some positions of the kernel."""
    spans = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    extent = [dilation * (kernel - 1) + 1 + extra * stride for kernel, stride, dilation in spans]
    return torch.randn(2, conv.in_channels, *extent, dtype=conv.weight.dtype, device=conv.weight.device)


def _effective(settled: nn.Conv2d, first: dict[str, Any], second: dict[str, Any]) -> nn.Conv2d:
    """A plain convolution with the recorded kernel and options, where both calls agree on them."""
    name, weight = type(settled).__name__, first["weight"]
    if first["prepared"] or second["prepared"]:
        raise KernelError(f"its class {name} pads its input and computes its kernel in its own forward")
    if weight.shape != settled.weight.shape or first["groups"] != settled.groups:
        raise KernelError(
            f"its class {name} uses a kernel of shape {tuple(weight.shape)} in {first['groups']} groups"
        )
    same = weight.is_meta or torch.equal(weight, second["weight"])
    options = {key: first[key] for key in ("stride", "padding", "dilation", "groups")}
    if not same or any(second[key] != value for key, value in options.items()):
        raise KernelError(f"its class {name} has no fixed kernel: it depends on the input or on train()")
    shape, bias = (settled.in_channels, settled.out_channels, settled.kernel_size), settled.bias is not None
    conv = bare_conv(*shape, weight, bias=bias, **options)
    _store(conv, weight, settled.bias)
    return conv.train(settled.training)
