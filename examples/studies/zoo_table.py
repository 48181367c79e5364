"""The table of the zoo study, with its totals above it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """The totals, and a line for each model, by name."""
    return "\n".join([*totals(rows), "", *table(sorted(rows, key=lambda row: row["name"]))]) + "\n"


def totals(rows: list[Row]) -> list[str]:
    """What the table shows, in sentences."""
    lines = [_passes(rows, source) for source in ("torchvision", "timm")]
    lines += [_graphs(rows), *_offenders(rows), _convolutions(rows), *_left(rows), *_not_run(rows)]
    lines += _onnx([row for row in rows if "onnx_original" in row])
    total = sum(row.get("seconds", 0) for row in rows) / 60
    lines.append(f"All rows together took {total:.0f} minutes of one core.")
    return [line if line.startswith(" ") else f"- {line}" for line in lines]


def _passes(rows: list[Row], source: str) -> str:
    ours = [row for row in rows if row["name"].startswith(f"{source}:")]
    some = [row for row in ours if row["status"] != "no Conv2d"]
    passed = sum(row["status"] == "pass" for row in some)
    failed = [row["name"].partition(":")[2] for row in some if row["status"] == "FAIL"]
    text = f"{passed} of {len(some)} {source} models with a Conv2d pass ({len(ours) - len(some)} have none)."
    return f"{text} FAIL: {', '.join(failed)}." if failed else text


def _graphs(rows: list[Row]) -> str:
    traced = [row for row in rows if "graph" in row]
    whole = sum(row["graph"] for row in traced)
    plain = [row for row in traced if row.get("plain")]
    inside = sum(row["convs_in_graphs"] for row in traced)
    return (
        f"{whole} of {len(traced)} models are one graph, and {inside} of "
        f"{sum(row['convs'] for row in traced)} convolutions are inside of a graph. Plain tracing is right "
        f"for {len(plain)}; {sum(row['graph'] for row in plain)} of these are one graph."
    )


def _offenders(rows: list[Row]) -> list[str]:
    """The models that plain tracing gets right in eval() and that stay Python."""
    found = [row for row in rows if row.get("plain") and "graph" in row and not row["graph"]]
    names = [
        f"{row['name']}{'' if row['plain_everywhere'] else ' (plain is wrong on other inputs)'}"
        for row in found
    ]
    return [f"Plain tracing is right, and they stay Python: {', '.join(names) or 'none'}."]


def _convolutions(rows: list[Row]) -> str:
    counts = Counter[str]()
    for row in rows:
        counts.update({key: row.get(key, 0) for key in ("executed", "rewritten")})
    left = counts["executed"] - counts["rewritten"]
    return (
        f"{counts['executed']} executed convolutions are numbered: {counts['rewritten']} are rewritten, "
        f"{left} left alone:"
    )


def _left(rows: list[Row]) -> list[str]:
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row.get("left", {}))
    return [f"    - {count}: {reason}" for reason, count in reasons.most_common()]


def _not_run(rows: list[Row]) -> list[str]:
    missing = [f"{row['name']} ({row['error'][:60]})" for row in rows if row["status"] == "not run"]
    return [f"Not run to the end: {', '.join(missing) or 'none'}."]


def _onnx(rows: list[Row]) -> list[str]:
    original = [row for row in rows if "error" not in row["onnx_original"]]
    both = [row for row in original if "error" not in row["onnx_compressed"]]
    if not rows:
        return []
    worst = max((row["onnx_compressed"]["difference"] for row in both), default=0.0)
    dynamic = sum(row["onnx_compressed"]["dynamic"] for row in both)
    return [
        f"ONNX: {len(original)} of {len(rows)} export uncompressed; {len(both)} of these export compressed, "
        f"{dynamic} with a dynamic batch; the largest difference from eager is {worst:.0e}."
    ]


def table(rows: list[Row]) -> list[str]:
    """A line for each model."""
    heads = "model status inputs plain graph convs run rewritten full allowed elsewhere half-MACs ONNX s why"
    lines = ["| " + " | ".join(heads.split()) + " |", "|---" * len(heads.split()) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in _cells(row)) + " |" for row in rows]


def _cells(row: Row) -> list[str]:
    yes = {True: "yes", False: "no", None: ""}
    cells = [row["name"], row["status"], row.get("inputs", ""), yes[row.get("plain")], yes[row.get("graph")]]
    cells += [str(row.get(key, "")) for key in ("convs", "executed", "rewritten")]
    cells += [_figure(row.get(key, "")) for key in ("full", "allowed")]
    cells.append("; ".join(f"{key} {_figure(value)}" for key, value in row.get("elsewhere", {}).items()))
    cells += [str(row.get("half_macs", "")), _export(row), str(row.get("seconds", ""))]
    left = "; ".join(f"{reason} ({count})" for reason, count in row.get("left", {}).items())
    failed = ", ".join(row.get("failed", []))
    why = (failed and f"failed: {failed}", row.get("error", ""), row.get("python", ""), left)
    return [*cells, re.sub(r"[^ (]*/site-packages/", "", "; ".join(filter(None, why)))]


def _figure(value: Any) -> str:
    return f"{value:.0e}" if isinstance(value, float) else str(value)


def _export(row: Row) -> str:
    parts = [row[key] for key in ("onnx_original", "onnx_compressed") if key in row]
    return ", ".join(part.get("error") or f"{part['exporter']} {part['difference']:.0e}" for part in parts)
