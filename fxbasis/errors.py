"""Every refusal of fxbasis: one base class, and one child for each kind of mistake.

A message names the thing (layer, shape, value) and ends with the remedy.
"""

from __future__ import annotations


class FxBasisError(Exception):
    """Base class of every error that fxbasis raises on purpose."""


class InputError(FxBasisError):
    """Example inputs or data that the model, or the call, cannot use."""


class TraceError(FxBasisError):
    """A model that cannot be copied or traced."""


class SelectionError(FxBasisError):
    """A ``layers=``, ``size=``, ``form=`` or ``method=`` that means nothing for this model."""


class LayerError(FxBasisError):
    """A convolution that was asked for and cannot be rewritten."""


class PlanError(FxBasisError):
    """A plan that cannot be met, or, like a saved folder, is damaged or belongs to another model."""


class VerificationError(FxBasisError):
    """A rewrite, fold, load or export whose outputs differ from what they must equal.

    Attributes:
        layer: the name of the convolution at fault; empty where it is not known.
    """

    layer: str = ""


class ExportError(FxBasisError):
    """A model that could not be exported to ONNX or measured."""


class MissingExtraError(FxBasisError):
    """An optional package that is needed here and is not installed."""


class UsageError(FxBasisError):
    """A command line, model name or weight file that cannot be used."""


class FxBasisWarning(UserWarning):
    """Something was done, or left undone, that the user should know of."""
