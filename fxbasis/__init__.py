"""fxbasis: compress the convolutions of any CNN by torch.fx graph rewriting."""

from .errors import FxBasisError as FxBasisError
from .errors import FxBasisWarning as FxBasisWarning

__version__ = "0.1.0"
