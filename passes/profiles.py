"""What a profile says: the work of each layer by its formula and by the count; prints as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..tables import aligned

__all__ = ["LayerProfile", "Profile"]


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One layer: MACs for the whole batch, parameters, and elements of the outputs it makes.

    Attributes:
        number: the convolution's number; None for another layer.
        name, kind, shape, form, ranks: what it is; shape is that of its dense weight; form is ``dense``
            and without ranks for a convolution left alone.
        macs_before, params_before, activations_before: of the dense layer, by the closed form.
        macs, params: of the layer as it is, by the closed form.
        counted: MACs counted from the operations that ran.
        activations: elements of all its outputs, the basis convolution's included.
        break_even_rank: R*, below which its form (the output form, if dense) is cheaper than dense; None for
            forms with several ranks.
        note: why it is left dense, or a remark.
    """

    number: int | None
    name: str
    kind: str
    shape: tuple[int, ...]
    form: str
    ranks: tuple[int, ...]
    macs_before: int
    macs: int
    counted: int
    params_before: int
    params: int
    activations_before: int
    activations: int
    break_even_rank: float | None
    note: str


@dataclass(frozen=True)
class Profile:
    """Work and size of a model, layer by layer. Prints as a table.

    Attributes:
        layers: convolutions in the order of their numbers, then every other layer with counted work.
        batch: samples in the example inputs, over which MACs and activations are summed.
        params, params_before: of the whole model, shared ones once.
        uncounted: how often each operation ran that is not counted.
        training: the MACs are those of a training step.
    """

    layers: tuple[LayerProfile, ...]
    batch: int
    params: int
    params_before: int
    uncounted: Counter[str]
    training: bool = False

    @property
    def macs(self) -> int:
        """MACs of the model as it is, by the closed forms."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_before(self) -> int:
        """MACs of the model with every convolution dense."""
        return sum(layer.macs_before for layer in self.layers)

    @property
    def counted(self) -> int:
        """MACs counted from the operations that ran."""
        return sum(layer.counted for layer in self.layers)

    @property
    def convs(self) -> tuple[LayerProfile, ...]:
        """The numbered convolutions."""
        return tuple(layer for layer in self.layers if layer.number is not None)

    @property
    def conv_ratio(self) -> float:
        """MACs of all convolutions as they are over those of the dense ones; 1 without any."""
        before = sum(layer.macs_before for layer in self.convs)
        return sum(layer.macs for layer in self.convs) / before if before else 1.0

    @property
    def disagreements(self) -> tuple[LayerProfile, ...]:
        """Layers whose count is not their formula; empty in every case that is understood."""
        return tuple(layer for layer in self.layers if layer.counted != layer.macs)

    @property
    def _of(self) -> str:
        return " of a training step" if self.training else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values: totals, one dict for each layer, and what was not counted."""
        totals = ("macs_before", "macs", "counted", "conv_ratio", "params_before", "params", "batch")
        return {
            "unit": f"MACs{self._of} (FLOPs = 2 x MACs), whole batch",
            **{name: getattr(self, name) for name in totals},
            "layers": [asdict(layer) for layer in self.layers],
            "uncounted": dict(self.uncounted),
        }

    def table(self, tablefmt: str = "simple") -> str:
        """The layers as text; ``tablefmt`` is one of tabulate's, for example ``"github"``."""
        rows = [_row(layer) for layer in self.layers]
        return aligned(rows, _HEADERS, left=("name", "kind", "form", "note"), tablefmt=tablefmt)

    def __str__(self) -> str:
        lines = [self.table(), "", self.summary()]
        if self.uncounted:
            parts = ", ".join(f"{name} x{count}" for name, count in self.uncounted.most_common())
            lines.append(f"not counted: {parts}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Totals in one line, with the convention."""
        agree = "formula = count" if not self.disagreements else "FORMULA DIFFERS FROM COUNT"
        return (
            f"MACs{self._of} {self.macs_before:,} -> {self.macs:,} ({_ratio(self.macs, self.macs_before)}; "
            f"convolutions {self.conv_ratio:.3f}; batch {self.batch}; FLOPs = 2 x MACs; {agree}), parameters "
            f"{self.params_before:,} -> {self.params:,} ({_ratio(self.params, self.params_before)})"
        )


_HEADERS = (
    *("#", "name", "kind", "weight", "form", "rank", "R*", "MACs before", "MACs formula", "MACs counted"),
    *("ratio", "params before", "params", "note"),
)


def _ratio(after: int, before: int) -> str:
    return f"{after / before:.3f}" if before else "-"


def _row(layer: LayerProfile) -> list[str]:
    return [
        "" if layer.number is None else str(layer.number),
        layer.name,
        layer.kind,
        "x".join(map(str, layer.shape)),
        layer.form,
        ", ".join(map(str, layer.ranks)),
        "" if layer.break_even_rank is None else f"{layer.break_even_rank:.1f}",
        f"{layer.macs_before:,}",
        f"{layer.macs:,}",
        f"{layer.counted:,}",
        _ratio(layer.macs, layer.macs_before),
        f"{layer.params_before:,}",
        f"{layer.params:,}",
        layer.note,
    ]
