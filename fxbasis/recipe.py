"""What is done to each convolution of one model: a frozen plan, JSON in and JSON out.

A plan lists every convolution by number, name and shape, those left dense too, with the reason. So it
rebuilds the structure of a compressed model, and refuses a model that it was not made for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .arguments import as_path
from .costs import ConvShape
from .errors import PlanError
from .files import write_whole
from .promises import promised
from .structures import FORMS, Ranks, Step, settled
from .tables import aligned

__all__ = ["DENSE", "FORECAST", "LAYER", "UNFIT", "LayerPlan", "Plan"]

FORMAT = 2
DENSE = "dense"
LAYER = "fxbasis_layer"  # the attribute of a module that holds its LayerPlan
UNFIT = "fxbasis_unfit"  # the attribute of a convolution that says why no form of it could be proven
FORECAST = "fxbasis_forecast"  # the attribute of a compressed model that holds what was expected of it


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One convolution of a plan.

    Attributes:
        number: its number, from 1, in the order of definition.
        name: its qualified name.
        in_channels, out_channels, kernel_size, groups: its shape, by which the model is recognised.
        form: a key of ``structures.FORMS``, or ``"dense"`` for a layer left alone.
        method: how the numbers of the form are found; empty when dense.
        ranks: channels between its steps, over all groups: one for most forms; none when dense. Of the
            reduced form the atoms and the sums, of which there may be none.
        fixed_basis: the first step is not trained.
        reason: why it is left dense, or a remark.
        effective: rewritten is not the stored weight, but the kernel that its own class makes of it.
    """

    number: int
    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int = 1
    form: str = DENSE
    method: str = ""
    ranks: Ranks = ()
    fixed_basis: bool = False
    reason: str = ""
    effective: bool = False

    @property
    def shape(self) -> ConvShape:
        """The shape for the closed forms of ``costs``, without bias."""
        return ConvShape(self.in_channels, self.out_channels, self.kernel_size, self.groups)

    @property
    def compressed(self) -> bool:
        """Whether the layer is rewritten."""
        return self.form != DENSE

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """What tells it from the others that a layer of one model could be."""
        return self.name, self.form, self.ranks

    @property
    def rank(self) -> int:
        """The first rank, of most forms the only one: the number of basis convolutions; 0 when dense."""
        return self.ranks[0] if self.ranks else 0

    @property
    def steps(self) -> tuple[Step, ...]:
        """The convolutions of the form in their order; none when dense."""
        return FORMS[self.form].steps(self.shape, self.ranks) if self.compressed else ()

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the steps that are called one after the other; none when the form itself is called."""
        return () if self.form == "weight" else tuple(step.name for step in self.steps)

    def __str__(self) -> str:
        weight = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return f"conv {self.number} ({self.name}), weight {weight}"


@dataclass(frozen=True)
class Plan:
    """The decision for every convolution of one model, in the order of their numbers.

    Attributes:
        layers: one for each convolution.
        forecast: what a planner expected of it, plain JSON values; empty where none made it.

    >>> plan = Plan((LayerPlan(number=1, name="conv", in_channels=3, out_channels=8, kernel_size=(3, 3)),))
    >>> Plan.from_dict(plan.to_dict()) == plan
    True
    """

    layers: tuple[LayerPlan, ...]
    forecast: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        headers = ("#", "name", "form", "ranks", "why")
        rows = [
            [str(layer.number), layer.name, layer.form, ", ".join(map(str, layer.ranks)), layer.reason]
            for layer in self
        ]
        return "\n".join([aligned(rows, headers, left=("name", "form", "why")), *promised(self.forecast)])

    @property
    def compressed(self) -> tuple[LayerPlan, ...]:
        """The layers that are rewritten."""
        return tuple(layer for layer in self.layers if layer.compressed)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        told = {"forecast": dict(self.forecast)} if self.forecast else {}
        return {"format": FORMAT, **told, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self, path: str | Path) -> None:
        """Write the plan to a file, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode())

    @classmethod
    def from_dict(cls, data: Any, source: str = "the plan") -> Plan:
        """The plan that ``to_dict`` describes; other keys of the outer dict are not looked at.

        Raises:
            PlanError: when something is missing, of the wrong type or out of range.
        """
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
            raise PlanError(f'{source} has no list "layers"; write it again with Plan.to_json or save')
        if data.get("format") != FORMAT:
            raise PlanError(
                f"{source} has format {data.get('format')!r}, this version reads {FORMAT}; "
                "make the plan again"
            )
        layers = tuple(_layer(entry, position, source) for position, entry in enumerate(data["layers"]))
        return cls(layers, _forecast(data.get("forecast", {}), source))

    @classmethod
    def from_json(cls, path: str | Path) -> Plan:
        """Read a plan that ``to_json`` or ``save`` wrote.

        Raises:
            PlanError: when the file is missing, truncated or damaged.
        """
        return cls.from_dict(read_json(as_path(path, PlanError)), str(path))


def _forecast(found: Any, source: str) -> Mapping[str, Any]:
    """What was expected, if it can be told beside what is measured."""
    if not isinstance(found, dict):
        raise PlanError(f"{source}: its forecast is damaged ({found!r:.80} is no dict); make the plan again")
    try:
        promised(found, {"macs": 1.0, "params": 1.0, "latency": 1.0})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{source}: its forecast is damaged ({type(error).__name__}: {error}); make the plan again"
        ) from error
    return dict(found)


def read_json(path: Path) -> Any:
    """The content of a JSON file, with errors that name it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"cannot read {path}: {error.strerror or error}; give the file that save wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is damaged ({error}); write it again with Plan.to_json or save") from error


_TYPES: dict[str, type] = {
    "number": int,
    "name": str,
    "in_channels": int,
    "out_channels": int,
    "groups": int,
    "form": str,
    "method": str,
    "fixed_basis": bool,
    "reason": str,
    "effective": bool,
}


def _layer(entry: Any, position: int, source: str) -> LayerPlan:
    where = f"{source}, layer entry {position + 1}"
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(LayerPlan)}:
        raise PlanError(f"{where} does not have the keys of a layer; make the plan again")
    for key, kind in _TYPES.items():
        if type(entry[key]) is not kind or (kind is int and entry[key] < 0):
            raise PlanError(f"{where}: {key} is {entry[key]!r}; make the plan again")
    kernel = entry["kernel_size"]
    if not isinstance(kernel, (list, tuple)) or [type(size) for size in kernel] != [int, int]:
        raise PlanError(f"{where}: kernel_size is {kernel!r}; make the plan again")
    ranks = entry["ranks"]
    if not isinstance(ranks, (list, tuple)) or any(type(rank) is not int for rank in ranks):
        raise PlanError(f"{where}: ranks is {ranks!r}; make the plan again")
    layer = LayerPlan(**{**entry, "kernel_size": (kernel[0], kernel[1]), "ranks": tuple(ranks)})
    _check_shape(layer, where)
    _check_ranks(layer, where)
    return layer


def _check_shape(layer: LayerPlan, where: str) -> None:
    sizes = (layer.number, layer.in_channels, layer.out_channels, layer.groups, *layer.kernel_size)
    if min(sizes) < 1 or layer.in_channels % layer.groups or layer.out_channels % layer.groups:
        raise PlanError(f"{where}, {layer.name}: not the shape of a convolution; make the plan again")


def _check_ranks(layer: LayerPlan, where: str) -> None:
    if layer.form not in (DENSE, *FORMS) or (
        layer.compressed and layer.method not in FORMS[layer.form].methods
    ):
        raise PlanError(
            f"{where}: {layer}: form is {layer.form!r}, method is {layer.method!r}; make the plan again"
        )
    if not layer.compressed:
        if layer.ranks:
            raise PlanError(f"{where}: {layer} is dense and has ranks {layer.ranks}; make the plan again")
        return
    _check_range(layer, where)
    groups = layer.steps[-1].groups
    if any(rank % groups for rank in layer.ranks):
        raise PlanError(
            f"{where}: {layer}: ranks {layer.ranks} are no multiples of its {groups} groups; "
            "make the plan again"
        )


def _check_range(layer: LayerPlan, where: str) -> None:
    reduced, largest = layer.form == "reduced", FORMS[layer.form].largest_ranks(layer.shape, layer.method)
    least = (1, 0) if reduced else (1,) * len(largest)
    if len(largest) != len(layer.ranks) or not all(
        low <= rank <= most for low, rank, most in zip(least, layer.ranks, largest, strict=True)
    ):
        raise PlanError(
            f"{where}: {layer}: ranks {layer.ranks} are not between {least if reduced else 1} and {largest}, "
            f"the largest useful ranks of the {layer.form} form; make the plan again"
        )
    if reduced and settled(layer.form, layer.shape, layer.ranks) != layer.ranks:
        raise PlanError(
            f"{where}: {layer}: ranks {layer.ranks} ask for sums of two where a group has one atom; "
            "make the plan again"
        )
