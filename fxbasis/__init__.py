"""fxbasis: compress the convolutions of any CNN by torch.fx graph rewriting.

The way of a model:

    trace -> number_convs -> compress -> (train) -> fold -> profile -> export_onnx -> measure -> report

``compress`` does the first two by itself. Every verb copies; none touches the model it is given, but for
``recalibrate_batchnorm_``, whose name ends in an underscore for that.
"""

from .compression import compress, plan_of
from .diagnosis import Diagnosis, doctor
from .errors import (
    ExportError,
    FxBasisError,
    FxBasisWarning,
    InputError,
    LayerError,
    MissingExtraError,
    PlanError,
    SelectionError,
    TraceError,
    UsageError,
    VerificationError,
)
from .export.exporting import OnnxFile, export_onnx
from .export.layer_times import LayerTimes, measure_layer
from .export.measuring import Latency, measure
from .passes.folding import fold
from .passes.numbering import ConvRecord, ConvTable, number_convs
from .passes.profiling import LayerProfile, Profile, profile
from .passes.tracing import Part, parts_of, trace
from .planning import ParetoFront, pareto, plan
from .recalibration import recalibrate_batchnorm_
from .recipe import LayerPlan, Plan
from .reporting import report
from .reports import Report
from .saving import load, save
from .sensitivities import Sensitivities, Sensitivity, sensitivities

__version__ = "0.1.0"

__all__ = [
    "ConvRecord",
    "ConvTable",
    "Diagnosis",
    "ExportError",
    "FxBasisError",
    "FxBasisWarning",
    "InputError",
    "Latency",
    "LayerError",
    "LayerPlan",
    "LayerProfile",
    "LayerTimes",
    "MissingExtraError",
    "OnnxFile",
    "ParetoFront",
    "Part",
    "Plan",
    "PlanError",
    "Profile",
    "Report",
    "SelectionError",
    "Sensitivities",
    "Sensitivity",
    "TraceError",
    "UsageError",
    "VerificationError",
    "compress",
    "doctor",
    "export_onnx",
    "fold",
    "load",
    "measure",
    "measure_layer",
    "number_convs",
    "pareto",
    "parts_of",
    "plan",
    "plan_of",
    "profile",
    "recalibrate_batchnorm_",
    "report",
    "save",
    "sensitivities",
    "trace",
]
