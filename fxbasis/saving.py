"""``save`` and ``load``: a folder with ``plan.json`` and ``model.safetensors``, and no pickle in it.

The plan rebuilds the structure, the safetensors file holds the weights. ``plan.json`` keeps the SHA-256
of the weights, so that a truncated, altered or mixed-up pair is refused. Both are written whole under other
names, then renamed, the plan last.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.utils import _pair

from .arguments import as_path
from .compression import plan_of
from .copying import copy_model
from .errors import PlanError
from .files import made_folder, replacing
from .passes.numbering import conv_layers
from .passes.rewriting import check_plan, rewrite
from .passes.tracing import Part, parts_of, retrace_
from .recipe import FORECAST, Plan, read_json
from .stored_state import StoredState, save_state

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
    graphs = {part.name: {"given": part.given, "calls": part.calls} for part in parts_of(model) if part.graph}
    content = plan_of(model).to_dict() | {"graphs": graphs, "options": _options(model)}
    with (
        made_folder(folder) as folder,
        replacing(folder / PLAN_FILE) as plan,
        replacing(folder / WEIGHTS_FILE) as weights,
    ):
        save_state(model, weights)
        content["weights_sha256"] = _sha256(weights)
        plan.write_text(json.dumps(content, indent=1), encoding="utf-8")
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
    folder = as_path(folder, PlanError)
    content = read_json(folder / PLAN_FILE)
    plan = Plan.from_dict(content, str(folder / PLAN_FILE))
    _check_hash(folder / WEIGHTS_FILE, content.get("weights_sha256"))
    check_plan(model, plan)
    _check_options(model, plan, content.get("options"))
    stored, loaded = StoredState(folder / WEIGHTS_FILE), copy_model(model)
    stored.load_as_the_original(loaded, plan)  # a graph keeps what its hooks set
    retrace_(loaded, _graphs(content.get("graphs"), folder / PLAN_FILE))
    rewrite(loaded, plan, empty=True)
    stored.load_forms(loaded)
    if plan.forecast:
        setattr(loaded, FORECAST, dict(plan.forecast))
    return loaded


def _graphs(found: Any, path: Path) -> list[Part]:
    """The submodules that were graphs, the arguments that they are given, the calls that they serve."""
    with suppress(AttributeError, KeyError, TypeError):
        parts = [
            Part(name, True, given=tuple(part["given"]), calls=tuple(part["calls"]))
            for name, part in found.items()
        ]
        if all(isinstance(text, str) for part in parts for text in (*part.given, *part.calls)):
            return parts
    raise PlanError(f"{path}: graphs is {found!r}; save the model again")


def _options(model: nn.Module) -> dict[str, list[Any]]:
    """Stride, padding, dilation and padding mode of each layer by name, as JSON gives them back."""
    found: dict[str, list[Any]] = {}
    for name, layer in conv_layers(model).items():
        sizes = (layer.stride, layer.padding, layer.dilation)
        pairs = [size if isinstance(size, str) else list(_pair(size)) for size in sizes]
        found[name] = [*pairs, layer.padding_mode]
    return found


def _check_options(model: nn.Module, plan: Plan, expected: object) -> None:
    own = _options(model)
    for layer in plan:
        saved = expected.get(layer.name) if isinstance(expected, dict) else None
        if saved != own[layer.name] and not layer.effective:  # whose class has options of its own
            raise PlanError(
                f"{layer}: stride, padding, dilation and padding mode are {own[layer.name]}, in the saved "
                f"model {saved}; use the model that was compressed"
            )


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
