"""``Report``: what is known about one compression, as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .comparing import Difference
from .export.exporting import OnnxFile
from .export.measuring import Latency
from .passes.profiling import LayerProfile, Profile
from .promises import promised

__all__ = ["Report"]

NOISY = 1.3
"""Upper over lower quartile above which a time is called noisy."""

FEW_RUNS = 10
"""Fewer runs than these are called too few."""


@dataclass(frozen=True)
class Report:
    """Everything that is known about one compression.

    Attributes:
        title: the model. inputs: shapes of the example inputs.
        profile: work and size of each layer, before and after.
        original, compressed: measured latencies, taken in turn in one loop.
        original_onnx, compressed_onnx: the checked ONNX files.
        differences: the largest difference after rewrite, fold, load; and of each export in ONNX Runtime.
        machine: processor, operating system and versions.
        remarks: what a reader must know, such as random weights or accuracies, in sentences.
        forecast: what was planned and predicted, and how it was fitted; empty without a plan.
    """

    title: str
    inputs: str
    profile: Profile
    original: Latency
    compressed: Latency
    original_onnx: OnnxFile
    compressed_onnx: OnnxFile
    differences: Mapping[str, Difference]
    machine: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    forecast: Mapping[str, Any] = field(default_factory=dict)

    def _ratios(self) -> dict[str, float]:
        work = self.profile
        return {"macs": work.macs / work.macs_before, "params": work.params / work.params_before}

    @property
    def time_ratio(self) -> float:
        """Time of the compressed model over that of the original: median of the ratios run by run."""
        return self.compressed.ratio_to(self.original)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What forbids to trust the time; empty when nothing does."""
        noisy = [time for time in (self.original, self.compressed) if time.spread > NOISY]
        few = self.original.runs < FEW_RUNS
        found = [f"**{self.original.runs} runs are too few to compare times by.**"] if few else []
        if noisy:
            found.append(
                f"**The times are noisy (upper over lower quartile {max(t.spread for t in noisy):.2f}): "
                "measure again on a quieter machine, or with more runs.**"
            )
        return tuple(found)

    def _exported(self) -> str:
        pairs = (("original", self.original_onnx), ("compressed", self.compressed_onnx))
        return "; ".join(f"{name} by the {f.exporter} exporter, opset {f.opset}" for name, f in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "title": self.title,
            "inputs": self.inputs,
            "remarks": list(self.remarks),
            "time_ratio": self.time_ratio,
            "cautions": list(self.cautions),
            "exporter": {
                "original": self.original_onnx.exporter,
                "compressed": self.compressed_onnx.exporter,
            },
            "original": self.original.to_dict(),
            "compressed": self.compressed.to_dict(),
            "size_bytes": {
                "original": self.original_onnx.size_bytes,
                "compressed": self.compressed_onnx.size_bytes,
            },
            "differences": {key: asdict(value) for key, value in self.differences.items()},
            "profile": self.profile.to_dict(),
            "forecast": dict(self.forecast),
            "machine": dict(self.machine),
        }

    def to_csv(self) -> str:
        """One line for each layer, with a header."""
        text = io.StringIO()
        rows = [asdict(layer) | {"ranks": " ".join(map(str, layer.ranks))} for layer in self.profile.layers]
        writer = csv.DictWriter(text, list(LayerProfile.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """The report as a reader sees it."""
        kept = [layer for layer in self.profile.convs if layer.form == "dense"]
        sections = [
            f"# {self.title}: compressed by fxbasis",
            f"Example inputs: {self.inputs}.",
            *self.remarks,
            "## Whole model",
            self._totals(),
            *promised(self.forecast, {**self._ratios(), "latency": self.time_ratio}),
            f"Work: {self.profile.summary()}.",
            f"Time: {self.original}; {self.compressed}. Both ran in turn in one loop; the ratio "
            f"{self.time_ratio:.3f} is the median over the runs, pair by pair.",
            *([] if self.time_ratio < 1 else ["**The compressed model is not faster on this machine.**"]),
            *self.cautions,
            f"Files: {self._exported()}.",
            "## Checks",
            self._checks(),
            "## Layers",
            "MACs of the whole batch; R* is the break-even rank, below which the form is cheaper than dense.",
            self.profile.table("github"),
            f"{len(self.profile.convs) - len(kept)} of {len(self.profile.convs)} convolutions are rewritten; "
            "the others stay dense for the reason in their row.",
            "Not counted: " + ", ".join(f"{k} x{v}" for k, v in self.profile.uncounted.most_common()) + ".",
            "Machine: " + ", ".join(f"{key} {value}" for key, value in self.machine.items()) + ".",
        ]
        return "\n\n".join(sections) + "\n"

    def _totals(self) -> str:
        size, small = self.original_onnx.size_bytes, self.compressed_onnx.size_bytes
        before, after = self.original.median_ms, self.compressed.median_ms
        work = self.profile
        rows = [
            ("", "original", "compressed", "ratio"),
            ("---",) * 4,
            ("MACs", f"{work.macs_before:,}", f"{work.macs:,}", f"{work.macs / work.macs_before:.3f}"),
            (
                "parameters",
                f"{work.params_before:,}",
                f"{work.params:,}",
                f"{work.params / work.params_before:.3f}",
            ),
            ("median time, ms", f"{before:.3f}", f"{after:.3f}", f"{self.time_ratio:.3f}"),
            ("ONNX file, bytes", f"{size:,}", f"{small:,}", f"{small / size:.3f}"),
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def _checks(self) -> str:
        rows = [f"| {key} | {d.absolute:.2e} | {d.relative:.2e} |" for key, d in self.differences.items()]
        return "\n".join(
            ["| compared | largest difference | relative to the largest output |", "|---|---|---|", *rows]
        )

    def __str__(self) -> str:
        return (
            f"{self.title}: {self.profile.summary()}\n"
            f"time {self.time_ratio:.3f} of the original ({self.compressed.median_ms:.3f} against "
            f"{self.original.median_ms:.3f} ms, {self.original.runtime}, {self.original.threads} thread(s), "
            f"batch {self.original.batch}, {self.original.runs} runs in turn)\n"
            f"ONNX file {self.compressed_onnx.size_bytes:,} of {self.original_onnx.size_bytes:,} bytes"
            + "".join(f"\n{caution.strip('*')}" for caution in self.cautions)
        )
