"""What a user writes on the command line, made into objects: a model, its weights, an example input.

Everything is seeded and leaves the caller's random state alone. Weights are tensors only, unless the user
allows pickle. Nothing is downloaded for plain torchvision and timm names.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
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
from torch import nn

from .errors import MissingExtraError, UsageError
from .running import seeded
from .weights import load_weights

FORMS = "torchvision:resnet18, timm:resnet50, package.module:callable or path/to/file.py:callable"


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
    zoo = of_zoo(spec)
    source, _, name = spec.partition(":") if zoo else spec.rpartition(":")
    if not source or not name:
        raise UsageError(f"model {spec!r} is not of the form source:name; write {FORMS}")
    folders = [] if zoo else [Path(source).parent.resolve(), Path.cwd()]
    with seeded(seed), _searching(folders):
        model = _build(spec, _builder(spec, source, name))
        if weights is not None:
            load_weights(model, weights, allow_pickle=allow_pickle)
    return model.eval()


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


def of_zoo(spec: str) -> bool:
    """Whether torchvision or timm makes the model."""
    return spec.startswith(("torchvision:", "timm:"))


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


def transform_of(spec: str) -> Callable[[Any], Any] | None:
    """What is called ``transform`` in the module or file of a user's own model; None without it."""
    if of_zoo(spec):
        return None
    source = spec.rpartition(":")[0]
    with _searching([Path(source).parent.resolve(), Path.cwd()]):
        found = getattr(_import(source), "transform", None)
    return found if callable(found) else None


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


def _close(name: str, names: Iterable[str]) -> str:
    matches = get_close_matches(name, list(names))
    return f", did you mean {' or '.join(matches)}?" if matches else ""
