"""How much a model changes when one layer alone is compressed: for each layer, form and rank.

Estimators, in nats for each image (``divergence``) unless said otherwise:

    fisher    half the mean square, over the images, of the inner product of the weight's shift with the
              gradient of the weight: the exact second order of the change. One forward and one backward pass
              for all layers, forms and ranks. The default.
    kfac      the same with positions and inputs taken as independent: half the positions times tr[G D M D^T]
    output    relative squared error of the layer's outputs, tr[D M D^T] / tr[W M W^T]
    weight    relative squared error of the weight; the only one without calibration data
    measured  the change itself: one model built and run for each layer, form and rank
    evaluate  the fall of a score, ``evaluate(model) -> float``, higher is better, in its unit. A function
              that trains the model before it scores it gives the sensitivities of arXiv 2408.06024.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from torch import nn

from .candidates import Candidate
from .errors import InputError, SelectionError
from .estimating import Estimate, Fitted, by_fisher, by_running, by_statistics
from .files import check_target, write_whole
from .passes.rewriting import check_weight
from .passes.selection import Layers, matches
from .passes.settings import check_multiple
from .proposals import PROPOSED, excluded, proposals_of
from .recipe import LayerPlan
from .running import ExampleInputs, batch_size
from .screening import fitted_all
from .structures import FORMS
from .subjects import IMAGES, Subject, first_images, subject_of
from .tables import aligned

__all__ = [
    "ESTIMATORS",
    "Sensitivities",
    "Sensitivity",
    "estimated",
    "estimator_for",
    "fitted_for",
    "sensitivities",
]

ESTIMATORS = ("fisher", "kfac", "output", "weight", "measured", "evaluate")
CHANGES = ("fisher", "measured")
"""The estimators of the change of the model's outputs, which not all outputs have."""
RUN = ("measured", "evaluate")
"""The estimators that build a model for each point, and keep the points in a file."""
_UNITS = {
    "output": "of the output's squares",
    "weight": "of the weight's squares",
    "evaluate": "of the score",
}


@dataclass(frozen=True)
class Sensitivity:
    """What compressing one layer does.

    Attributes:
        layer: number, name, form and ranks.
        macs, params: of the layer then, for the example inputs' batch. macs_ratio: over the dense layer's.
        change: the estimate. error: its standard error over the images, 0 where it has none.
    """

    layer: LayerPlan
    macs: int
    params: int
    macs_ratio: float
    change: float
    error: float

    def candidate(self) -> Candidate:
        """For the planner."""
        costs = {"macs": float(self.macs), "params": float(self.params)}
        return Candidate(self.layer.number, self.layer.form, self.layer.ranks, costs, self.change, self.error)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        layer = self.layer
        named = {"number": layer.number, "name": layer.name, "form": layer.form, "ranks": list(layer.ranks)}
        own = {key: value for key, value in vars(self).items() if key != "layer"}
        return {**named, **own}


@dataclass(frozen=True)
class Sensitivities(Sequence[Sensitivity]):
    """One table over layers, forms and ranks. Prints as a table.

    Attributes:
        rows: in the order of the layers.
        estimator: which. unit: of the changes. images: that they were taken over.
        left_out: by the name of a layer, why it has no rows.
        missing: rows that were not computed for want of time.
        ruled_out: by the name of a layer, the forms that lost at a first look.
    """

    rows: tuple[Sensitivity, ...]
    estimator: str
    unit: str
    images: int
    left_out: Mapping[str, str]
    missing: int = 0
    ruled_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> Sensitivity: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sensitivity]: ...
    def __getitem__(self, index: int | slice) -> Sensitivity | Sequence[Sensitivity]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Sensitivity]:
        return iter(self.rows)

    def __str__(self) -> str:
        headers = ("#", "name", "form", "ranks", "MACs", "change", "+-")
        table = aligned([_text(row) for row in self], headers, left=("name", "form"))
        over = f", over {self.images} images" if self.images else ""
        lines = [table, f"change: {self.estimator}, {self.unit}{over}"]
        lines += [f"- {name}: {why}" for name, why in self.left_out.items()]
        if self.ruled_out:
            lines.append(f"ruled out at a first look: {_counted(self.ruled_out)}")
        if self.missing:
            lines.append(f"{self.missing} were not computed for want of time")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {key: value for key, value in vars(self).items() if key != "rows"}
        ruled_out = {name: list(forms) for name, forms in self.ruled_out.items()}
        return {
            **own,
            "left_out": dict(self.left_out),
            "ruled_out": ruled_out,
            "rows": [row.to_dict() for row in self],
        }

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV with a header line, whole or not at all."""
        text, rows = io.StringIO(), [row.to_dict() for row in self]
        names = list(rows[0]) if rows else ["number"]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue().encode())


def _counted(ruled_out: Mapping[str, tuple[str, ...]]) -> str:
    counts = Counter(form for forms in ruled_out.values() for form in forms)
    return ", ".join(f"{form} in {many} layer{'s' * (many > 1)}" for form, many in counts.items())


def _text(row: Sensitivity) -> list[str]:
    ranks = ", ".join(map(str, row.layer.ranks))
    named = [str(row.layer.number), row.layer.name, row.layer.form, ranks]
    return [*named, f"{row.macs_ratio:.3f}", f"{row.change:.3g}", f"{row.error:.1g}"]


def sensitivities(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    statistics: str | Path | None = None,
    layers: Layers = "all",
    forms: Sequence[str] | None = None,
    estimator: str | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    multiple: int = 1,
    path: str | Path | None = None,
    executor: Executor | None = None,
    minutes: float | None = None,
) -> Sensitivities:
    """The change of the model when one layer alone is compressed, over layers, forms and ranks.

    Every form is fitted to the calibration data as ``compress`` fits it, so the changes are those of the
    fits that a plan will use; without data, to the weights.

    Args:
        model: any; not touched.
        example_inputs: one batch, by which costs are counted.
        calibration: batches of inputs, without labels (what follows the input in a batch is ignored).
        statistics: a file for the sums of the calibration pass (safetensors, 8 q^2 bytes for each group of
            fan-in q), with a hash of model and data: read where that fits, otherwise written.
        layers: which; as of ``compress``, without settings.
        forms: that are tried; for 1x1 kernels those with a kernel to take apart are replaced by gauge. By
            default all (``proposals.PROPOSED``), of which each layer drops those that lose at a first look
            (``screening``).
        estimator: one of ``ESTIMATORS``; by default evaluate if that is given, else fisher, and without
            calibration data weight.
        evaluate: a score of a model, higher is better; it gets a copy that it may change, and a fixed seed.
        multiple: of which every rank is one.
        path: a file that keeps each point of measured and evaluate as it is done; such a run resumes. Points
            are found again by the model, the data, and the source of ``evaluate``; not by what it reads.
        executor: for measured and evaluate, any of ``concurrent.futures``, or a Dask client's. Workers use as
            many threads as ``torch.get_num_threads()`` says here; those of one process take turns, so it is
            processes that save time.
        minutes: for measured and evaluate, after which no point is started.

    Source: arXiv 2408.06024 section 3.2 for the question; the estimators stand at the top of the module.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    >>> data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    >>> table = sensitivities(model, data[0], calibration=data, forms=["gauge"])
    >>> table.estimator, table[0].layer.name, table[0].change >= table[-1].change * 0
    ('fisher', '0', True)

    Raises:
        InputError: for data that an estimator needs and does not get.
        SelectionError: for an unknown estimator or form, layers that do not exist, or what the estimator
            does not use of ``path``, ``executor`` and ``minutes``.
        LayerError: for a weight that is not finite.
    """
    how = {"evaluate": evaluate, "path": path, "executor": executor, "minutes": minutes}
    name = estimator_for(estimator, calibration, how)
    subject = subject_of(model, example_inputs, calibration, statistics)
    if name in CHANGES:
        subject.check_comparable()
    fitted, ruled_out = fitted_for(subject, forms, multiple, layers)
    return estimated(subject, fitted, ruled_out, name, **how)


def estimator_for(estimator: str | None, calibration: Any, how: Mapping[str, Any]) -> str:
    """The estimator that is meant, when it has what it needs, and needs what it has."""
    name = _estimator(estimator, calibration, how["evaluate"])
    told = {"path": "path= (--jsonl)", "executor": "executor=", "minutes": "minutes="}
    given = [text for what, text in told.items() if how[what] is not None]
    if given and name not in RUN:
        raise SelectionError(
            f"{given[0]} is for the estimators {' and '.join(RUN)}, this one is {name}; "
            "leave it out, or choose one of them"
        )
    if how["path"] is not None:
        check_target(how["path"])
    return name


def _estimator(estimator: str | None, calibration: Any, evaluate: Any) -> str:
    if estimator is None:
        return "evaluate" if evaluate is not None else "weight" if calibration is None else "fisher"
    if estimator not in ESTIMATORS:
        raise SelectionError(f"estimator={estimator!r} is not known; choose one of {', '.join(ESTIMATORS)}")
    if estimator == "evaluate" and evaluate is None:
        raise InputError("the estimator evaluate needs evaluate=, a function of a model to a score")
    if estimator in ("fisher", "kfac", "output", "measured") and calibration is None:
        raise InputError(f"the estimator {estimator} needs calibration=, some batches of inputs")
    return estimator


def _checked_forms(forms: Iterable[str]) -> tuple[str, ...]:
    """The forms; refuses, by a SelectionError, those that no plan can use."""
    found = tuple(forms) if isinstance(forms, Iterable) and not isinstance(forms, str) else ()
    if not found:
        raise SelectionError(f"forms={forms!r} is no list of forms; pass for example forms=['cp', 'gauge']")
    for form in found:
        if not isinstance(form, str) or form not in FORMS or form == "weight":
            known = ", ".join(name for name in FORMS if name != "weight")
            raise SelectionError(f"the form {form!r} cannot be planned; choose of {known}")
    return found


def fitted_for(
    subject: Subject, forms: Sequence[str] | None, multiple: int, layers: Layers
) -> tuple[dict[str, list[Fitted]], dict[str, tuple[str, ...]]]:
    """What stands for each of the layers that can be compressed, by name; and the forms ruled out there.

    Raises:
        SelectionError: for layers that do not exist, or with settings.
        LayerError: for a weight that is not finite.
    """
    tried = PROPOSED if forms is None else _checked_forms(forms)
    check_multiple(multiple)
    if isinstance(layers, Mapping):
        raise SelectionError("layers= has settings, which are what is looked for here; pass a list of layers")
    numbers = matches(layers, subject.table)
    records = [r for r in subject.table if r.name in subject.layers and r.index in numbers]
    for record in records:
        check_weight(subject.layers[record.name], record)
    proposals = {record.name: proposals_of(record, tried, multiple) for record in records}
    return fitted_all(subject, proposals, screen=forms is None)


def estimated(
    subject: Subject,
    fitted: Mapping[str, Sequence[Fitted]],
    ruled_out: Mapping[str, tuple[str, ...]],
    estimator: str,
    **how: Any,
) -> Sensitivities:
    """The table of fitted proposals by one estimator; ``how`` as of ``by_running``."""
    found: Mapping[str, Sequence[Estimate | None]]
    if estimator == "fisher":
        found = by_fisher(subject, fitted)
    elif estimator in RUN:
        found = by_running(subject, fitted, **how)
    else:
        found = {name: by_statistics(subject, name, rows, estimator) for name, rows in fitted.items()}
    dense = {record.name: record.macs or 1 for record in subject.table}
    rows = [
        Sensitivity(one.layer, one.macs, one.params, one.macs / dense[name], *estimate)
        for name in fitted
        for (one, _), estimate in zip(fitted[name], found[name], strict=True)
        if estimate is not None
    ]
    images = 0 if estimator == "evaluate" else sum(map(batch_size, first_images(subject.batches, IMAGES)))
    left_out = {r.name: excluded(r) or "not asked for" for r in subject.table if r.name not in fitted}
    missing = sum(map(len, fitted.values())) - len(rows)
    unit = _UNITS.get(estimator, "nats")
    return Sensitivities(tuple(rows), estimator, unit, images, left_out, missing, ruled_out)
