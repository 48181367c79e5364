"""Deep copies of models that hold together: what a copy calls is the copy, what was tied stays tied.

``copy.deepcopy`` leaves functions with the original (``rebinding``), parts parameters that share memory, and
drops the attributes and hooks of parameters; some classes copy themselves in another mode.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import TraceError
from .nests import ATOMS, tensors_of
from .rebinding import rebind_
from .running import COMPILED, is_compiled, seeded

__all__ = [
    "KEEPS_PARAMETERS",
    "Model",
    "check_module",
    "copy_model",
    "copy_to_run",
    "memory_of",
    "passing_copy",
]

KEEPS_PARAMETERS = "fxbasis_keeps_parameters"
_EMPTY = (OrderedDict, dict, set)  # each module holds a dozen of them for hooks, slow to deepcopy
Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, *, share_parameters: bool = False) -> Model:
    """A deep copy in the same modes; with ``share_parameters`` only structure and buffers are copied.

    Computed tensors that modules hold (the weight that old-style weight_norm or pruning made, a cached
    output), which deepcopy refuses, are copied without their history; views of parameters stay views.

    Raises:
        TraceError: when something that the model holds cannot be copied, or copies itself as itself.
    """
    check_module(model)
    _check_delegation(model)
    parameters = list(model.parameters())
    memo: dict[int, Any] = {}
    parts = [part for module in model.modules() for part in vars(module).values() if type(part) not in ATOMS]
    memo |= {id(part): part.copy() for part in parts if type(part) in _EMPTY and not part}
    held = tensors_of([part for part in parts if id(part) not in memo])
    computed = [tensor for tensor in held if tensor.grad_fn is not None]
    try:
        if share_parameters:
            memo |= {id(parameter): parameter for parameter in parameters}
        else:
            own = [p for p in parameters if isinstance(p, nn.Parameter)]  # those of ScriptModules are none
            memo |= {id(parameter): _copied(parameter, memo) for parameter in own}
            _tie_(own, memo)
        memo |= {id(tensor): _without_history(tensor, memo) for tensor in computed}
        memo |= _scripted(model, memo)
        with seeded():  # a class that builds its copies anew draws random numbers
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be deep-copied ({error}); take what cannot be copied "
            "(a generator, a lock, an open file) off the model first"
        ) from error
    _check_own(model, copied)
    _keep_modes(model, copied)
    rebind_(copied, memo)
    return copied


def check_module(model: object) -> None:
    """Refuse what is no module, or a closed one.

    Raises:
        TraceError: naming its class.
    """
    if not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TraceError(f"the model is a {kind}{', a class' * isinstance(model, type)}; pass an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is a ScriptModule, which is closed; pass the nn.Module it was made of")


def copy_to_run(model: Model) -> Model:
    """A copy for a run; it shares the parameters where ``trace`` has seen that forward does not change them.

    Raises:
        TraceError: when something that the model holds cannot be copied.
    """
    check_module(model)
    return copy_model(model, share_parameters=vars(model).get(KEEPS_PARAMETERS) is True)


@contextmanager
def passing_copy(model: Model) -> Iterator[Model]:
    """``copy_to_run`` for a block, emptied after it: its graphs and hooks hold each other, and weights."""
    copied = copy_to_run(model)
    try:
        yield copied
    finally:
        for module in list(copied.modules()):
            if not isinstance(module, torch.jit.ScriptModule):
                vars(module).clear()


def memory_of(tensor: Tensor) -> int:
    """Where its values begin, the same for tensors that are tied; of one without memory, its id."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return (tensor.data_ptr() if plain and not tensor.is_meta else 0) or id(tensor)


def _copied(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    """With its attributes and the hooks of its gradient, which deepcopy forgets."""
    made: nn.Parameter = copy.deepcopy(parameter, memo)
    if type(made) is type(parameter):
        if vars(parameter):
            vars(made).update(copy.deepcopy(vars(parameter), memo))
        for hook in (parameter._backward_hooks or {}).values():
            made.register_hook(hook)  # type: ignore[no-untyped-call]
        for after in (parameter._post_accumulate_grad_hooks or {}).values():
            made.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]
    return made


def _scripted(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Copies of ScriptModules; those of deepcopy give their gradients to the original's parameters."""
    made: dict[int, Any] = {}
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) and id(module) not in inside:
            inside.update(map(id, module.modules()))
            with torch.no_grad():
                copied = made[id(module)] = copy.deepcopy(module, memo)
            for before, after in zip(module.parameters(), copied.parameters(), strict=True):
                after.requires_grad_(before.requires_grad)
    return made


def _without_history(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A view of a parameter is one of its copy; of another computed tensor only the values are kept."""
    base = tensor._base
    made = memo.get(id(base))
    if base is None or not isinstance(made, nn.Parameter):
        return tensor.detach().clone()
    start = made.storage_offset() - base.storage_offset() + tensor.storage_offset()
    return made.as_strided(tensor.size(), tensor.stride(), start)


def _check_delegation(model: nn.Module) -> None:
    """Refuse a wrapper that answers for what it wraps also when asked how it is copied."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handed = getattr(module, "__deepcopy__", None)
        if handed is not None and not hasattr(type(module), "__deepcopy__"):
            if is_compiled(module):
                raise TraceError(
                    f"{name or 'the model'} is what torch.compile made of a graph, which cannot be copied; "
                    f"pass the graph, {name + '.' * bool(name)}{COMPILED}, and compile the result"
                )
            raise TraceError(
                f"{name or 'the model'} ({type(module).__name__}) hands on __deepcopy__ of what it wraps, so "
                "that a copy would be that alone; let its __getattr__ refuse names that begin with __"
            )


def _check_own(model: nn.Module, copied: nn.Module) -> None:
    """Refuse a copy that has modules of the original, which would be rewritten there too."""
    own = {id(module) for module in model.modules()}
    for name, module in copied.named_modules():
        if id(module) in own:
            raise TraceError(
                f"{name or 'the model'} ({type(module).__name__}) copies itself as itself; "
                "take its own __deepcopy__ off first"
            )


def _keep_modes(model: nn.Module, copied: nn.Module) -> None:
    """Some classes copy themselves in train(), and exchange their graph with the mode."""
    if copied.training != model.training:
        copied.train(model.training)
    modes = {name: module.training for name, module in model.named_modules() if hasattr(module, "training")}
    for name, module in copied.named_modules():
        if name in modes and module.training != modes[name]:
            module.training = modes[name]


def _tie_(parameters: Iterable[nn.Parameter], memo: dict[int, Any]) -> None:
    """Let the copies of parameters that share memory share it too."""
    sharing: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        sharing.setdefault(memory_of(parameter), []).append(parameter)
    for tied in (tied for tied in sharing.values() if len(tied) > 1):
        storage = tied[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
        for one in tied:
            own = torch.empty(0, dtype=one.dtype, device=one.device)
            memo[id(one)].data = own.set_(storage, one.storage_offset(), one.size(), one.stride())
