"""What a user writes on the command line, made into objects: a model, its weights, an example input.

Everything is seeded and leaves the caller's random state alone. Weights are tensors only, unless the user
allows pickle. Nothing is downloaded for plain torchvision and timm names.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy

from .errors import FxBasisWarning, MissingExtraError, UsageError
from .running import load_values, seeded

FORMS = "torchvision:resnet18, timm:resnet50, package.module:callable or path/to/file.py:callable"
WRAPPERS = ("state_dict", "model", "model_state_dict")


def load_model(
    spec: str, *, weights: str | Path | None = None, allow_pickle: bool = False, seed: int = 0
) -> nn.Module:
    """The model that ``spec`` names, in eval mode.

    >>> type(load_model("torchvision:squeezenet1_1")).__name__
    'SqueezeNet'

    Args:
        spec: ``torchvision:resnet18``, ``timm:resnet50``, ``package.module:callable`` (the current folder is
            searched too) or ``path/to/file.py:callable`` (the file may import its neighbours). The callable
            takes no argument. An ``nn.Module`` in its place is copied.
        weights: a file for ``load_weights``; ``None`` leaves the weights as they were made, from ``seed``.
        allow_pickle: let the weight file run code.

    Raises:
        UsageError: no such model, a callable that fails or returns something else, or unusable weights.
        MissingExtraError: a timm model without timm.
    """
    zoo = spec.startswith(("torchvision:", "timm:"))
    source, _, name = spec.partition(":") if zoo else spec.rpartition(":")
    if not source or not name:
        raise UsageError(f"model {spec!r} is not of the form source:name; write {FORMS}")
    folders = [] if zoo else [Path(source).parent.resolve(), Path.cwd()]
    with seeded(seed), _searching(folders):
        model = _build(spec, _builder(spec, source, name))
        if weights is not None:
            load_weights(model, weights, allow_pickle=allow_pickle)
    return model.eval()


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
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote.
        allow_pickle: also read what runs code when read, such as a pickled whole model.

    Raises:
        UsageError: a file that is missing, damaged, without weights, needs pickle, or does not fit.
    """
    path = Path(path)
    state = _without_prefix(_weights_in(_read(path, allow_pickle), path), model, path)
    _check_fit(model, state, path)
    load_values(model, state)


def parse_input(text: str) -> torch.Tensor:
    """A normal random tensor, always the same one, of the shape that ``text`` states.

    >>> parse_input("1x3x8x8").shape
    torch.Size([1, 3, 8, 8])

    Args:
        text: 3 or 4 sizes joined by ``x``, batch first.

    Raises:
        UsageError: anything else, or more than the memory holds.
    """
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){2,3}", text):
        raise UsageError(
            f"input {text!r} is not 3 or 4 whole numbers above 0 joined by x; "
            "write batch, channels, height and width, as in 1x3x224x224"
        )
    try:
        sizes = [int(size) for size in text.split("x")]
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError, ValueError) as error:  # sizes beyond memory, int64 or int()
        raise UsageError(f"input {text!r} does not fit into memory; use smaller sizes") from error


def load_function(spec: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``path/to/file.py:function`` names.

    Raises:
        UsageError: when there is none.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UsageError(f"function {spec!r} is not of the form source:name; write module:function")
    with _searching([Path(source).parent.resolve(), Path.cwd()]):
        found = getattr(_import(source), name, None)
    if not callable(found):
        raise UsageError(
            f"{source} has no function {name!r}; name one that takes a model and returns a score"
        )
    return found  # type: ignore[no-any-return]


@contextmanager
def _searching(folders: list[Path]) -> Iterator[None]:
    entries = [str(folder) for folder in folders]
    sys.path[:0] = entries
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for entry in entries:
            if entry in sys.path:  # the user's code may have taken it out
                sys.path.remove(entry)


def _builder(spec: str, source: str, name: str) -> Callable[[], object]:
    if source == "torchvision":
        return _torchvision_builder(name)
    if source == "timm":
        return _timm_builder(name)
    module = _import(source)
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if key[0] != "_" and callable(value)]
        close = _close(name, public)
        raise UsageError(f"{source} has no {name!r}{close}; name a function in it that returns the model")
    value = getattr(module, name)
    if isinstance(value, nn.Module):
        return lambda: copy.deepcopy(value)
    if not callable(value):
        raise UsageError(f"{spec} is of type {type(value).__name__}; name a function that returns the model")
    return lambda: value()


def _torchvision_builder(name: str) -> Callable[[], object]:
    from torchvision import models

    known = models.list_models()
    if name.lower() not in known:
        close = _close(name.lower(), known)
        raise UsageError(f"no torchvision model {name!r}{close}; torchvision.models.list_models() lists all")
    builder = models.get_model_builder(name)
    takes = {"weights", "weights_backbone"} & set(inspect.signature(builder).parameters)
    return lambda: builder(**dict.fromkeys(takes))  # left out, weights_backbone would be downloaded


def _timm_builder(name: str) -> Callable[[], object]:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(f'timm:{name} needs timm ({error}): pip install "fxbasis[timm]"') from error
    if ":" not in name and not timm.is_model(name):  # hf-hub:... and local-dir:... are timm's affair
        close = _close(name.lower(), timm.list_models())
        raise UsageError(f"no timm model {name!r}{close}; timm.list_models() lists all")
    return lambda: timm.create_model(name, pretrained=False)


def _import(source: str) -> ModuleType:
    try:
        if source.endswith(".py") or Path(source).name != source:
            return _import_file(Path(source))
        return importlib.import_module(source)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{source} cannot be imported in {Path.cwd()}: {type(error).__name__}: {error}; check the "
            "spelling and the folder, mend the code, and write a file of a package as package.module:callable"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no file {path} in {Path.cwd()}; check the path")
    name = f"_fxbasis_file_{uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file; name a file that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(spec: str, builder: Callable[[], object]) -> nn.Module:
    remedy = "name a function that takes no argument and returns the model"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
            model = builder()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec} raised {type(error).__name__}: {error}; {remedy}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned a {type(model).__name__}, not an nn.Module; {remedy}")
    return model


def _read(path: Path, allow_pickle: bool) -> object:
    if not path.is_file():
        raise UsageError(f"no weight file {path} in {Path.cwd()}; check the path")
    try:
        if path.suffix.lower() == ".safetensors":
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


def _close(name: str, names: Iterable[str]) -> str:
    matches = get_close_matches(name, list(names))
    return f", did you mean {' or '.join(matches)}?" if matches else ""
