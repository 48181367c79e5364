"""Weight files read without running code, unless the user allows pickle, and put into a model whole."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy

from .arguments import as_path, check_flags
from .errors import FxBasisWarning, UsageError
from .running import load_values

__all__ = ["load_weights"]

WRAPPERS = ("state_dict", "model", "model_state_dict")


def load_weights(model: nn.Module, path: str | Path, *, allow_pickle: bool = False) -> None:
    """Put the weights of a file into the model, in place: all of them, or none when anything differs.

    A checkpoint's "state_dict", "model" or "model_state_dict" is unwrapped. DataParallel's "module." before
    every key is left out, with a warning.

    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file(nn.Linear(2, 1).state_dict(), f"{folder}/linear.safetensors")
    ...     load_weights(nn.Linear(2, 1), f"{folder}/linear.safetensors")

    Args:
        model: takes the weights.
        path: a safetensors file under any name, or one that ``torch.save`` wrote.
        allow_pickle: also read what runs code when read, such as a pickled whole model.

    Raises:
        UsageError: a file that is missing, damaged, without weights, needs pickle, or does not fit.
    """
    check_flags(allow_pickle=allow_pickle)
    path = as_path(path)
    state = _without_prefix(_weights_in(_read(path, allow_pickle), path), model, path)
    _check_fit(model, state, path)
    load_values(model, state)


def _read(path: Path, allow_pickle: bool) -> object:
    if not path.is_file():
        raise UsageError(f"no weight file {path} in {Path.cwd()}; check the path")
    try:
        if path.suffix.lower() == ".safetensors" or _is_safetensors(path):
            return load_file(path)
        loaded: object = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        return loaded
    except (Exception, SystemExit) as error:
        if isinstance(error, pickle.UnpicklingError) and not allow_pickle and _is_pickle(path):
            culprit = re.search(r"GLOBAL (\S+)", str(error))
            raise UsageError(
                f"weights {path} hold more than tensors{f' ({culprit[1]})' if culprit else ''}; save the "
                "model's state_dict() alone, or, if you trust the file, pass --allow-pickle "
                "(allow_pickle=True), which runs the code in it"
            ) from error
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}".rstrip(": ")
        raise UsageError(
            f"weights {path} are damaged or no weight file ({reason}); copy the file again, or save the "
            "model's state_dict() with torch.save or safetensors"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """By the length of its header, and the bracket that begins it, whatever the file is called."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x80", b"PK\x03\x04"))


def _weights_in(loaded: object, path: Path) -> dict[str, Any]:
    wrapped = [loaded.get(key) for key in WRAPPERS] if isinstance(loaded, dict) else []
    for held in [*wrapped, loaded]:
        state = held.state_dict() if isinstance(held, nn.Module) else held
        tensors = isinstance(state, dict) and any(isinstance(value, torch.Tensor) for value in state.values())
        if isinstance(state, dict) and tensors and all(isinstance(key, str) for key in state):
            return state
    keys = f" of {list(loaded)[:3]}" if isinstance(loaded, dict) else ""
    raise UsageError(
        f"{path} holds a {type(loaded).__name__}{keys} and no weights; "
        f"save the model's state_dict() itself, or in a dict under {' or '.join(WRAPPERS)}"
    )


def _without_prefix(state: dict[str, Any], model: nn.Module, path: Path) -> dict[str, Any]:
    prefix = "module."
    own = any(key.startswith(prefix) for key in model.state_dict())
    if not own and all(key.startswith(prefix) for key in state):
        text = f"{path}: every key begins with {prefix!r} (DataParallel); loaded without it"
        warnings.warn(text, FxBasisWarning, stacklevel=3)
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _check_fit(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    own = model.state_dict(keep_vars=True)
    given = {id(own[key]) for key in state if key in own}  # safetensors names a tied weight once
    counter = "num_batches_tracked"  # not in files from before torch 0.4.1, and no weight
    pairs = [(key, _shape(state[key]), _shape(own[key])) for key in state if key in own]
    found = {
        "missing": [key for key in own if id(own[key]) not in given and not key.endswith(counter)],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [f"{k}: file {a}, model {b}" for k, a, b in pairs if b is not None and a != b],
    }
    if any(found.values()):
        parts = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in found.items() if keys]
        raise UsageError(
            f"weights {path} do not fit {type(model).__name__}: {'; '.join(parts)}; build the model with the "
            "settings that the file was saved with, or name the file of this model"
        )


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not is_lazy(value) else None
