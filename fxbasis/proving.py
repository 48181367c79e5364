"""Proof that a compressed model computes what its folded weights compute in the original.

Whole outputs cannot be compared sharply: a random network behind BatchNorm multiplies a rounding by
hundreds, and a detector sorts its boxes another way. So the reference (the original with every rewritten
convolution exchanged for the folded one) runs first; then the compressed model runs with each form's
output compared on the spot with the folded convolution on the same input, and replaced by it. So each layer
is proven free of what other layers add, and the outputs of the two models, which now see the same numbers
everywhere, must be equal: that proves the wiring. The tolerance of a layer is that of its dtype, of its
output's largest magnitude or, where that is small because terms cancel, of their root sum of squares. A
convolution whose weight comes from hooks, parametrizations or its class is also compared with the kernel
that was taken from it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from .carrying import carry_hooks
from .comparing import Difference, check_equal
from .copying import passing_copy
from .errors import InputError, VerificationError
from .forms import BasisConv2d
from .kernels import kernel_of, makers_of, original_forward, own_class
from .passes.folding import fold, fold_layers
from .passes.numbering import conv_layers
from .passes.tracing import python_in_train
from .recipe import LayerPlan
from .running import ExampleInputs, in_mode, run, telling

__all__ = ["blamed", "rewrite_difference"]

_OF_CONVS = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta")))  # there it draws no random numbers


def rewrite_difference(
    original: nn.Module, compressed: nn.Module, example_inputs: ExampleInputs
) -> Difference:
    """The largest difference of any layer between a compressed model and its folded weights.

    Args:
        original: the uncompressed model, or the folded one.
        compressed: the model to prove; neither is touched.
        example_inputs: what both run on, in eval(), and in train() where Python runs then.

    Raises:
        VerificationError: naming the layer, or the model when its wiring is at fault.
    """
    found = _differences(original, compressed, example_inputs, training=False)
    if python_in_train(compressed):  # its Python may ask what its convolutions are
        found += _differences(original, compressed, example_inputs, training=True)
    return Difference(max(d.absolute for d in found), max(d.relative for d in found))


def blamed(
    error: VerificationError, compressed: nn.Module, example_inputs: ExampleInputs
) -> VerificationError:
    """The error of a proof with the layer that is at fault, as far as one is.

    Where only the outputs of the model differ, something asks what a layer is. Layers are then folded from
    the last on, halving them, until the others are proven: the first of those at fault is left.
    """
    if error.layer:
        return error
    names = [name for name, layer in conv_layers(compressed).items() if isinstance(layer, BasisConv2d)]
    folded, low, high = fold(compressed), 0, len(names)
    while high - low > 1:
        middle = (low + high) // 2
        proven = _is_proven(folded, fold_layers(compressed, names[middle:]), example_inputs)
        low, high = (middle, high) if proven else (low, middle)
    if not names or not _is_proven(folded, fold_layers(compressed, names[low:]), example_inputs):
        return error
    found = VerificationError(
        f"{names[low]}: something asks what it is, or keeps it where it cannot be exchanged, so that the "
        "outputs of the model differ; leave it out of layers="
    )
    found.layer = names[low]
    return found


def _is_proven(original: nn.Module, compressed: nn.Module, example_inputs: ExampleInputs) -> bool:
    try:
        rewrite_difference(original, compressed, example_inputs)
    except VerificationError:
        return False
    return True


def _differences(
    original: nn.Module, compressed: nn.Module, example_inputs: ExampleInputs, *, training: bool
) -> list[Difference]:
    """The difference of each call of a layer, in one mode; none where the original refuses that mode."""
    with passing_copy(original) as reference, passing_copy(compressed) as checked:
        return _compared(reference, checked, example_inputs, training=training)


def _compared(
    reference: nn.Module, checked: nn.Module, example_inputs: ExampleInputs, *, training: bool
) -> list[Difference]:
    """The same of copies, which are changed."""
    dense: dict[str, Any] = dict(conv_layers(reference))
    found = [Difference(0.0, 0.0)]
    calls: Counter[LayerPlan] = Counter()
    for name, form in conv_layers(checked).items():
        if isinstance(form, BasisConv2d):
            folded = _reconstructed(dense[name], form)
            check = None if training else _kernel_check(dense[name], form)
            _watch(form, folded, found, check, training=training)
            dense[name].__class__, dense[name].__dict__ = type(folded), folded.__dict__  # wherever it is held
            dense[name].register_forward_hook(lambda *_, key=form.plan: calls.update([key]))
            form.ends[1].register_forward_hook(lambda *_, key=form.plan: calls.subtract([key]))
    try:
        inputs, expected = _reference_run(reference, example_inputs, calls, training=training)
    except InputError:
        if training:
            return found
        raise
    actual = _run(checked, inputs, training=training)
    lost = [layer for layer, count in calls.items() if count]
    if lost:
        with _naming(lost[0]):
            raise VerificationError(
                f"{lost[0]} is called from outside of the module tree too (a plain list, a closure), or its "
                "class is asked for, where it cannot be exchanged; keep it in an nn.ModuleList, or leave it "
                "out of layers="
            )
    what = f"compressed {type(reference).__name__} against the original with the folded weights"
    what += " in train()" * training
    check_equal(expected, actual, what, "leave it as it is and report the model")
    return found


def _reference_run(
    reference: nn.Module, example_inputs: ExampleInputs, calls: Counter[LayerPlan], *, training: bool
) -> tuple[ExampleInputs, Any]:
    """Inputs that tell something, or else the example, and what the reference makes of them."""
    drawn = telling(example_inputs)
    with suppress(InputError):
        return drawn, run(reference, drawn, training=training)
    calls.clear()
    return example_inputs, run(reference, example_inputs, training=training)


def _run(compressed: nn.Module, example_inputs: ExampleInputs, *, training: bool) -> Any:
    """Its output on inputs that the original takes."""
    try:
        return run(compressed, example_inputs, training=training)
    except InputError as error:
        raise VerificationError(
            f"compressed, the model fails where the original runs: {error}; leave the layer out of layers="
        ) from error


def _reconstructed(conv: nn.Conv2d, form: BasisConv2d) -> nn.Conv2d:
    """The folded weight in the convolution's kernel: class, options, bias, hooks are not the form's word."""
    folded, kernel = form.to_conv2d(), kernel_of(conv).conv
    folded.__class__ = type(kernel) if form.plan.effective else own_class(conv)
    carry_hooks(conv, folded)
    own = vars(kernel).keys() & vars(conv).keys() - _OF_CONVS
    vars(folded).update({key: vars(conv)[key] for key in own})
    for option in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
        setattr(folded, option, getattr(kernel, option))
    folded.bias = kernel.bias
    return folded


def _kernel_check(conv: nn.Conv2d, form: BasisConv2d) -> Callable[[Tensor], object] | None:
    """Compare what the convolution computes by itself with its kernel, where these are not the same code."""
    kernel = kernel_of(conv).conv
    if type(conv) is nn.Conv2d and not makers_of(conv):
        return None
    itself, what = original_forward(conv), f"{form.plan} by itself against its effective kernel"
    return lambda input: check_equal(itself(input), kernel.forward(input), what, "leave it out of layers=")


def _watch(
    form: BasisConv2d,
    folded: nn.Conv2d,
    found: list[Difference],
    check: Callable[[Tensor], object] | None,
    *,
    training: bool,
) -> None:
    """Compare each output of the form with that of the folded convolution, and replace it.

    Of an input that tells nothing, the form gets another in its place.
    """
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def expect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["input"]
        input = cast(Tensor, telling(given))
        if check is not None:
            with _naming(form.plan):
                check(input)
        with in_mode(folded, training):
            with torch.random.fork_rng():  # the form draws the same numbers
                expected = folded.forward(input)
            with torch.random.fork_rng():
                waiting.append((input, expected, expected if input is given else folded.forward(given)))
        return (input,), {}

    def compare(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        input, expected, handed = waiting.pop()
        what, remedy = f"{form.plan} against its fold", "leave it out of layers="
        with _naming(form.plan):
            found.append(check_equal(expected, output, what, remedy, lambda: _size_of_terms(folded, input)))
        return handed

    first, last = form.ends
    first.register_forward_pre_hook(expect, with_kwargs=True)
    last.register_forward_hook(compare, prepend=True)  # before the hooks that the layer has


@contextmanager
def _naming(layer: LayerPlan) -> Iterator[None]:
    """Tell errors which layer they are of."""
    try:
        yield
    except VerificationError as error:
        error.layer = layer.name
        raise


def _size_of_terms(conv: nn.Conv2d, input: Tensor) -> float:
    """The largest root of a sum of squares over the terms of an output: its size under random signs.

    Rounding follows the terms, not their sum, which may be much smaller by chance. In float64.
    """
    squares = copy.copy(conv)
    parameters = {name: nn.Parameter(p.detach().double().square()) for name, p in conv.named_parameters()}
    vars(squares)["_parameters"] = {"bias": None, **parameters}
    with torch.no_grad():
        return float(squares.forward(input.detach().double().square()).max().sqrt())
