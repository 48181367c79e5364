"""Arguments of the traced copy; models and inputs at the edge: refused with a remedy, or as they were."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import pytest
import torch
from behaviour import X, assert_behaves_as, assert_same, quietly
from graph_nets import GRAPHS, Base, Case, Plain, make
from python_nets import EITHER, one_conv
from torch import Tensor, fx, nn

from fxbasis import (
    FxBasisWarning,
    InputError,
    LayerError,
    TraceError,
    compress,
    fold,
    load,
    number_convs,
    parts_of,
    save,
    trace,
)
from fxbasis.forms import BasisConv2d


class KeywordOnly(Base):
    def forward(self, *, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.last(self.body(x)) * scale


def test_example_inputs_are_left_as_they_were() -> None:
    inputs = X.clone()
    quietly(compress, make(GRAPHS["changes its input"]), inputs, layers="re:.*", size=2)
    assert torch.equal(inputs, X)


def test_model_without_conv_is_a_no_op_with_a_message() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.warns(FxBasisWarning, match="nothing is compressed.*no Conv2d"):
        small = compress(model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small, X)
    assert len(number_convs(model, X)) == 0


def test_a_single_conv_becomes_a_form_and_folds_back() -> None:
    conv = one_conv()
    small, _ = quietly(compress, conv, X, layers=[1], size=3)
    assert isinstance(small, BasisConv2d)
    assert [name for name, _ in small.named_parameters()] == [
        "basis.weight",
        "composition.weight",
        "composition.bias",
    ]
    assert type(fold(small)) is nn.Conv2d
    assert_behaves_as(small, fold(small), X)


OPTIONAL: dict[str, Any] = {
    "left out": X,
    "mask by position": (X, torch.rand(2, 1, 8, 8)),
    "mask by name": {"x": X, "mask": torch.rand(2, 1, 8, 8)},
    "both": (X, torch.rand(2, 1, 8, 8), True),
    "flag by name": {"x": X, "double": True},
}


@pytest.mark.parametrize("key", OPTIONAL)
def test_optional_arguments_take_the_way_of_the_example(key: str, tmp_path: Any) -> None:
    given = OPTIONAL[key]
    args, kwargs = (
        ((), given) if isinstance(given, dict) else (given if type(given) is tuple else (given,), {})
    )
    model = make(GRAPHS["optional arguments"]).eval()
    expected = model(*args, **kwargs)
    small, _ = quietly(compress, model, given, layers="re:.*", size=1.0)
    assert_same(expected, small(*args, **kwargs))
    again, _ = quietly(load, model, save(small, tmp_path))
    assert torch.equal(small(*args, **kwargs), again(*args, **kwargs))


@pytest.mark.parametrize("given", [{"x": X}, {"x": X, "scale": 3.0}], ids=["default", "given"])
def test_keyword_only_arguments(given: dict[str, Any]) -> None:
    model = make(Case(KeywordOnly)).eval()
    small, _ = quietly(compress, model, given, layers="re:.*", size=1.0)
    assert isinstance(small, fx.GraphModule)
    assert_same(model(**given), small(**given))


def test_an_argument_that_was_left_out_and_comes_later_takes_its_own_way() -> None:
    model = make(GRAPHS["optional arguments"]).eval()
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert parts_of(small)[0].graph
    for inputs in ((X,), (X, torch.rand(2, 1, 8, 8)), (X, None)):
        assert_same(model(*inputs), small(*inputs))


def test_keyword_arguments_are_used() -> None:
    model = make(EITHER["**kwargs"]).eval()
    given = {"x": X, "scale": torch.rand(2, 1, 1, 1)}
    small, _ = quietly(compress, model, given, layers="re:.*", size=1.0)
    assert_same(model(**given), small(**given))


ERRORS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "lazy conv": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3)),
        LayerError,
        r"0 \(LazyConv2d\).*run one forward",
    ),
    "lazy linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(2)),
        LayerError,
        r"2 \(LazyLinear\).*run one forward",
    ),
    "what cannot be copied": (
        lambda: _with_lock(nn.Sequential(nn.Conv2d(3, 8, 3))),
        TraceError,
        "cannot be deep-copied.*lock.*off the model first",
    ),
    "no module": (lambda: lambda x: x, TraceError, "function; pass an nn.Module"),
    "a state_dict": (lambda: Plain().state_dict(), TraceError, "OrderedDict; pass an nn.Module"),
}


def _with_lock(model: nn.Module) -> nn.Module:
    model.lock = Lock()
    return model


@pytest.mark.parametrize("verb", [trace, compress], ids=["trace", "compress"])
@pytest.mark.parametrize("key", ERRORS)
def test_models_that_cannot_be_used_are_refused(key: str, verb: Any) -> None:
    build, kind, message = ERRORS[key]
    with pytest.raises(kind, match=message):
        verb(build(), X)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.nn.modules.lazy")
def test_lazy_module_works_after_one_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
    model(X)
    small, _ = quietly(compress, model, X, layers="re:.*", size=1.0)
    assert_behaves_as(model, small, X)


WRONG_INPUTS: dict[str, Any] = {
    "channels": torch.zeros(2, 4, 8, 8),
    "dimensions": torch.zeros(2, 3),
    "dtype": X.double(),
    "device": X.to("meta"),
    "a list": [X],
    "a number": 3,
    "too many": (X, X),
    "unknown name": {"image": X},
    "nothing": (),
}


@pytest.mark.parametrize("verb", [trace, compress, number_convs], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("key", WRONG_INPUTS)
def test_wrong_inputs_are_refused_with_a_remedy(key: str, verb: Any) -> None:
    with pytest.raises(InputError, match=r"; pass .+$|pass a tensor"):
        verb(Plain(), WRONG_INPUTS[key])


def test_compress_without_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="pass one batch"):
        compress(Plain(), None)
