"""Passes on torch.fx graphs, for use alone or in fx's PassManager."""

from .base import CONV_NUMBER as CONV_NUMBER
from .base import FxPass as FxPass
from .converting import convert as convert
from .folding import FoldPass as FoldPass
from .numbering import NumberingPass as NumberingPass
from .rewriting import RewritePass as RewritePass
