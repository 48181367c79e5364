"""One run that is watched: calls of convolutions, functional convolutions, other readers of their weights.

Every function of torch that runs is looked at, with the modules that are being called at that moment. So
models that stay Python are seen as well as graphs; only ScriptModules are closed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..forms import BasisConv2d
from ..kernels import weight_hooks
from ..nests import tensors_in, tensors_of
from ..running import ExampleInputs, run
from .readers import PAST, makes_alike

__all__ = ["Call", "FunctionalConv", "Seen", "watched_run"]

REMEDY = "functional: not a Conv2d module; make it an nn.Conv2d to compress it"
UNREGISTERED = "functional: its nn.Conv2d is no submodule; keep it in an nn.ModuleList to compress it"
_CONVOLUTIONS = (torch.conv2d, torch.convolution, torch.ops.aten.conv2d, torch.ops.aten.convolution)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed")
_TO_PYTHON = ("item", "tolist", "numpy", "__array__", "__bool__", "__float__")
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class FunctionalConv:
    """One call of ``F.conv2d``, or an operation like it, in the code of a model; it has no number.

    Attributes:
        scope: name of the module whose code calls it; empty for the model itself.
        weight: shape (out_channels, in_channels / groups, K_h, K_w).
        output_size: (H, W) of its first call. macs: of all calls, batch included. calls: how many.
        source: file and line of the call, or the node of the graph.
        reason: why it is not compressed.
    """

    scope: str
    weight: tuple[int, ...]
    output_size: tuple[int, int]
    macs: int
    calls: int
    source: str
    reason: str = REMEDY

    def __str__(self) -> str:
        size, times = "x".join(map(str, self.output_size)), f"{self.calls} call{'s' * (self.calls > 1)}"
        where = f"{self.scope or '(top level)'} ({self.source})"
        return f"- {where}, weight {self.weight}, output {size}, {times}, {self.macs:,} MACs: {self.reason}"


Call: TypeAlias = tuple[int, torch.Size, torch.Size]


@dataclass(frozen=True)
class Seen:
    """What a run showed: each layer's calls (position, output and input shape), and who read its weight."""

    calls: dict[str, list[Call]]
    functional: tuple[FunctionalConv, ...]
    readers: dict[str, str]


def watched_run(
    model: nn.Module,
    layers: Mapping[str, nn.Conv2d | BasisConv2d],
    example_inputs: ExampleInputs,
    *,
    training: bool = False,
) -> Seen:
    """Run a copy, whose convolutions and forms are ``layers``; its hooks stay marked.

    Raises:
        InputError: when the model fails on the inputs.
    """
    watch = _Watch(model, layers)
    calls = _note_calls(layers, watch.readers)
    watch.attach(model)
    with watch:
        output = run(model, example_inputs, training=training)
    for tensor in tensors_in(output):
        watch.note_reader(tensor, "the model's output")
    first_calls = sorted(calls, key=lambda name: calls[name][0][0])
    order = {name: first_calls.index(name) + 1 for name in calls}
    found = {name: [(order[name], *shapes) for _, *shapes in made] for name, made in calls.items()}
    return Seen(cast(dict[str, list[Call]], found), watch.functional(), watch.readers)


def _note_calls(layers: Mapping[str, nn.Conv2d | BasisConv2d], odd: dict[str, str]) -> dict[str, list[Call]]:
    """Fills while the model runs: for each layer the position and the shapes of each call.

    And ``odd``, by name: why a call is none that a form could take.
    """
    found: dict[str, list[Call]] = {}
    positions, entered = Counter[str](), dict[str, torch.Size]()

    def note(name: str, own: Tensor | None) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            entered[name] = _shape_of((args, kwargs))
            reason = _oddity(args, kwargs)
            if own is not module._parameters.get("weight"):
                reason = "its weight is exchanged for a call (torch.func.functional_call)"
            if reason:
                odd.setdefault(name, reason)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            positions["all"] += 1
            found.setdefault(name, []).append((positions["all"], _shape_of(output), entered[name]))

        return enter, leave

    for name, layer in layers.items():
        first, last = layer.ends if isinstance(layer, BasisConv2d) else (layer, layer)
        enter, leave = note(name, first._parameters.get("weight"))
        first.register_forward_pre_hook(enter, with_kwargs=True)
        last.register_forward_hook(leave, prepend=True)  # before hooks that make something else of its output
    return found


def _shape_of(value: Any) -> torch.Size:
    """Of the first tensor in it, with all samples of torch.vmap as batch; without any, of nothing."""
    first = next(iter(tensors_of(value)), None)
    if first is None:
        return torch.Size((0, 0, 0, 0))
    functorch, whole = torch._C._functorch, first
    while functorch.is_batchedtensor(whole) or functorch.is_gradtrackingtensor(whole):
        whole = functorch.get_unwrapped(whole)
    samples = whole.numel() // max(1, first.numel())
    return first.shape if samples == 1 else torch.Size((samples * prod(first.shape[:-3]), *first.shape[-3:]))


def _oddity(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why arguments are none that a form could take; empty for one tensor."""
    given = args[0] if args else kwargs.get("input")
    if len(args) + len(kwargs) != 1 or not isinstance(given, Tensor):
        return "it is called with something else than one tensor, its input"
    if torch._C._functorch.is_batchedtensor(given):
        return "it is called inside of torch.vmap"
    return ""


class _Watch(TorchFunctionMode):
    """Looks at every function of torch, with the stack of modules that are being called."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Conv2d | BasisConv2d]) -> None:
        super().__init__()
        self.convs = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
        self.owners = {id(p): name for name, conv in self.convs.items() for p in conv.parameters()}
        self.hooked = [name for name, conv in self.convs.items() if weight_hooks(conv)]
        self.stack: list[tuple[str, nn.Module]] = [("", model)]
        self.readers: dict[str, str] = {}
        self.found: dict[tuple[str, str, tuple[int, ...], str], list[torch.Size]] = {}
        self.nodes_run: Counter[str] = Counter()

    def attach(self, model: nn.Module) -> None:
        """Keep the stack: pushed before a module's own hooks, popped after them, also on an error."""

        def push(name: str) -> Callable[..., None]:
            return lambda module, args: self.stack.append((name, module))

        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks and shows no functions
                module.register_forward_pre_hook(push(name), prepend=True)
                module.register_forward_hook(lambda *_: self.stack.pop() and None, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and note what it is."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = tensors_of([args, kwargs])
        for tensor in given:
            if self._owner(tensor) is not None and _uses_values(func, tensor is given[0], output):
                self.note_reader(tensor)
        weight = _kernel(func, args, kwargs)
        if weight is not None and weight.ndim == 4 and not isinstance(self.stack[-1][1], nn.Conv2d):
            place = (*self._place(), tuple(weight.shape), self._reason())
            self.found.setdefault(place, []).append(_shape_of(output))
        return output

    def note_reader(self, tensor: Tensor, who: str = "") -> None:
        """Note who reads a convolution's parameter, if it is one and its convolution is not running."""
        name = self._owner(tensor)
        if name is None or any(module is self.convs[name] for _, module in self.stack):
            return
        if self._inside() is self.convs[name]:
            self.readers.setdefault(name, PAST)
            return
        kind = "bias" if tensor is self.convs[name]._parameters.get("bias") else "weight"
        who = who or f"the forward of {type(self.stack[-1][1]).__name__} ({_source()})"
        self.readers.setdefault(name, f"its {kind} is also read by {who}")

    def functional(self) -> tuple[FunctionalConv, ...]:
        """One record for each place and shape of weight."""
        return tuple(
            FunctionalConv(
                scope=scope,
                weight=weight,
                output_size=(int(sizes[0][-2]), int(sizes[0][-1])),
                macs=sum(size.numel() for size in sizes) * prod(weight[1:]),
                calls=len(sizes),
                source=source,
                reason=reason,
            )
            for (scope, source, weight, reason), sizes in self.found.items()
        )

    def _owner(self, tensor: Tensor) -> str | None:
        """The convolution whose parameter it is, or a view of one; or whose hook made it."""
        for part in (tensor, tensor._base):
            if part is not None and id(part) in self.owners:
                return self.owners[id(part)]
        made = (name for name in self.hooked if vars(self.convs[name]).get("weight") is tensor)
        return next(made, None)

    def _reason(self) -> str:
        """Why the convolution that runs is not compressed."""
        conv = self._inside()
        if conv is None:
            return REMEDY
        return f"functional: {PAST}" if any(conv is layer for layer in self.convs.values()) else UNREGISTERED

    def _inside(self) -> nn.Conv2d | None:
        """The convolution whose own code runs, also where it was not called as a module."""
        owners = (frame.f_locals.get("self") for frame in _frames())
        return next((owner for owner in owners if isinstance(owner, nn.Conv2d)), None)

    def _place(self) -> tuple[str, str]:
        """Scope and source of a functional convolution; in a graph, whose calls come in order, its node."""
        scope, module = self.stack[-1]
        nodes: list[fx.Node] = []
        if isinstance(module, fx.GraphModule):
            calls = [node for node in module.graph.nodes if node.op == "call_function"]
            nodes = [node for node in calls if _kernel(node.target, node.args, node.kwargs) is not None]
        if not nodes:
            return scope, _source()
        node = nodes[self.nodes_run[scope] % len(nodes)]
        self.nodes_run[scope] += 1
        inner = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return ".".join(part for part in (scope, *inner[-1:]) if part), f"node {node.name}"


def _kernel(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The weight that it is given if it is a convolution, not a transposed one; otherwise None."""
    given = dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)
    is_one = getattr(func, "_overloadpacket", func) in _CONVOLUTIONS and given.get("transposed") is not True
    return given["weight"] if is_one else None


def _uses_values(func: Any, first: bool, output: Any) -> bool:
    """Whether the function does more with a tensor than to look at its shape, dtype or device."""
    name = str(getattr(func, "__name__", ""))
    return not makes_alike(name, first) and (name in _TO_PYTHON or bool(tensors_of(output)))


def _frames() -> Iterator[FrameType]:
    """From here out to the innermost Python code outside of torch and of this file, or the whole stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        file = frame.f_code.co_filename
        if file == run.__code__.co_filename or (file != __file__ and not file.startswith(("<", _TORCH))):
            return
        frame = frame.f_back


def _source() -> str:
    """File and line of the innermost Python code outside of torch and of this file."""
    *_, frame = _frames()
    file = frame.f_code.co_filename
    return "its graph" if file == run.__code__.co_filename else f"{file}:{frame.f_lineno}"
