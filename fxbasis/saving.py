"""``save`` and ``load``: a folder with ``plan.json`` and ``model.safetensors``, and no pickle in it.

The plan rebuilds the structure, the safetensors file holds the weights. ``plan.json`` keeps the SHA-256
of the weights, so that a truncated, altered or mixed-up pair is refused. Each file is written whole or not
at all, the plan last.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .compression import plan_of
from .errors import PlanError, UsageError
from .files import made_folder, write_through, write_whole
from .passes.rewriting import check_plan, rewrite
from .passes.tracing import parts_of, retrace
from .recipe import FORECAST, Plan, read_json
from .running import load_values

__all__ = ["load", "save"]

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a compressed model to a folder, which is made if needed; returns the folder.

    Raises:
        PlanError: when the model was not made by ``compress`` or ``load``.
        UsageError: when the folder cannot be written; what was there stays as it was.

    >>> import tempfile, torch, fxbasis
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    >>> small = fxbasis.compress(model, torch.zeros(1, 3, 8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load(model, save(small, folder))
    >>> bool((again(torch.ones(1, 3, 8, 8)) == small(torch.ones(1, 3, 8, 8))).all())
    True
    """
    plan = plan_of(model)
    with made_folder(Path(folder)) as folder:
        save_state(model, folder / WEIGHTS_FILE)
        content = plan.to_dict() | {
            "graphs": {part.name: list(part.given) for part in parts_of(model) if part.graph},
            "weights_sha256": _sha256(folder / WEIGHTS_FILE),
        }
        write_whole(folder / PLAN_FILE, json.dumps(content, indent=1).encode())
    return folder


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """The compressed model that ``save`` wrote, on the structure of a fresh uncompressed one.

    Needs no data and decomposes nothing. Outputs are bit-equal to those of the saved model.

    Args:
        model: the model that was compressed, with any weights; it is not touched.
        folder: what ``save`` wrote.

    Raises:
        PlanError: when a file is missing, truncated or altered, or belongs to another model.
    """
    folder = Path(folder)
    content = read_json(folder / PLAN_FILE)
    plan = Plan.from_dict(content, str(folder / PLAN_FILE))
    _check_hash(folder / WEIGHTS_FILE, content.get("weights_sha256"))
    check_plan(model, plan)
    loaded = retrace(model, _graphs(content.get("graphs"), folder / PLAN_FILE))
    rewrite(loaded, plan, empty=True)
    _load_state(loaded, folder / WEIGHTS_FILE)
    if plan.forecast:
        setattr(loaded, FORECAST, dict(plan.forecast))
    return loaded


def _graphs(found: Any, path: Path) -> dict[str, list[str]]:
    """The submodules that were graphs, each with the arguments that it is given."""
    sound = isinstance(found, dict) and all(isinstance(given, list) for given in found.values())
    if not sound or not all(isinstance(name, str) for given in found.values() for name in given):
        raise PlanError(f"{path}: graphs is {found!r}; save the model again")
    return dict(found)


def save_state(model: nn.Module, path: Path) -> None:
    """Write the state_dict as safetensors, whole or not at all; a tensor of several names under the first."""
    tensors, _ = _distinct(model)
    plain = {
        key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    write_through(path, lambda temporary: save_file(plain, temporary))


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor of the state_dict once; and for every other name of it, the one it has there."""
    state = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{key} is a {type(value).__name__}, which safetensors cannot hold; "
                "keep it in a buffer, or use torch.save"
            )
        if value.layout is not torch.strided:
            raise UsageError(
                f"{key} has the layout {value.layout}, which safetensors cannot hold; make it dense, or use "
                "torch.save"
            )
    first: dict[int, str] = {}
    names = {key: first.setdefault(id(tensor), key) for key, tensor in state.items()}
    return {key: state[key] for key in first.values()}, names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_hash(path: Path, expected: object) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}; give a folder that save wrote") from error
    if found != expected:
        raise PlanError(
            f"{path} is not the file that {PLAN_FILE} beside it was written for (its SHA-256 differs): it is "
            "truncated, altered or from another save; save the model again"
        )


def _load_state(model: nn.Module, path: Path) -> None:
    """Compare names, shapes and dtypes, then load."""
    state, names = _distinct(model)
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise PlanError(f"{path} is damaged ({error}); save the model again") from error
    missing = sorted(set(state) - set(stored))
    unknown = sorted(set(stored) - set(state))
    if missing or unknown:
        raise PlanError(
            f"{path} lacks {missing[:3]} and has {unknown[:3]} beyond what {type(model).__name__} has; "
            "use the model that was compressed"
        )
    for key, tensor in stored.items():
        if (tensor.shape, tensor.dtype) != (state[key].shape, state[key].dtype):
            raise PlanError(
                f"{path}: {key} is {tuple(tensor.shape)} {tensor.dtype}, the model has "
                f"{tuple(state[key].shape)} {state[key].dtype}; use the model that was compressed, "
                f"in that dtype (model.to(...))"
            )
    load_values(model, {key: stored[name] for key, name in names.items()})
