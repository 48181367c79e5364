"""fxbasis: compress the convolutions of any CNN by torch.fx graph rewriting."""

from .compression import compress as compress
from .errors import FxBasisError as FxBasisError
from .errors import FxBasisWarning as FxBasisWarning
from .passes.folding import fold as fold
from .passes.numbering import number_convs as number_convs
from .passes.tracing import trace as trace

__version__ = "0.1.0"
