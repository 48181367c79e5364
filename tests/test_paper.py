"""Where the paper's formulas are right and where they are not, against what PyTorch really does."""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxbasis import paper
from fxbasis.errors import SelectionError

# in_channels, out_channels, kernel, width, height
SMALL = (8, 12, 3, 10, 10)
LAYERS = [SMALL, (8, 12, 1, 10, 7), (12, 8, 5, 9, 9), (64, 64, 3, 56, 56), (512, 512, 3, 7, 7)]
# Layers as exact numbers: a Fraction as in_channels or basis keeps every formula exact.
GRID = [
    (Fraction(c_in), c_out, kernel)
    for c_in, c_out, kernel in itertools.product((1, 3, 8, 16, 64), (2, 8, 32, 64), (1, 3, 7))
]
layers = pytest.mark.parametrize("layer", LAYERS, ids=str)


def dense(layer):
    c_in, c_out, kernel, _, _ = layer
    return nn.Conv2d(c_in, c_out, kernel, padding="same", bias=False, device="meta")


def output_composition(layer, basis):
    c_in, c_out, kernel, _, _ = layer
    return nn.Sequential(
        nn.Conv2d(c_in, basis, kernel, padding="same", bias=False, device="meta"),
        nn.Conv2d(basis, c_out, 1, bias=False, device="meta"),
    )


class WeightComposition(nn.Module):
    def __init__(self, layer, basis):
        super().__init__()
        c_in, c_out, kernel, _, _ = layer
        self.basis = nn.Parameter(torch.empty(basis, c_in, kernel, kernel, device="meta"))
        self.coefficients = nn.Parameter(torch.empty(c_out, basis, device="meta"))

    def forward(self, x):
        weight = (self.coefficients @ self.basis.flatten(1)).unflatten(1, self.basis.shape[1:])
        return F.conv2d(x, weight, padding="same")


class Reduced(nn.Module):
    """Round-robin copies of the basis outputs, then two-term sums of them."""

    def __init__(self, layer, basis, sums, device="meta"):
        super().__init__()
        c_in, c_out, kernel, _, _ = layer
        self.conv = nn.Conv2d(c_in, basis, kernel, padding="same", bias=False, device=device)
        self.copied = [i % basis for i in range(c_out - sums)]
        self.first = [i % basis for i in range(sums)]
        self.second = [(i + 1) % basis for i in range(sums)]
        self.coefficients = nn.Parameter(torch.rand(2, sums, 1, 1, device=device))

    def forward(self, x):
        z = self.conv(x)
        u, v = self.coefficients
        return torch.cat([z[:, self.copied], u * z[:, self.first] + v * z[:, self.second]], 1)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def measured(module, layer, batch=1, input_grad=True):
    """Forward and backward MACs; FlopCounterMode counts two for each."""
    c_in, _, _, width, height = layer
    x = torch.empty(batch, c_in, height, width, device="meta", requires_grad=input_grad)
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.empty_like(y))
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


@layers
def test_parameter_counts_are_right(layer):
    assert paper.parameters_dense(*layer[:3]) == parameters(dense(layer))
    assert paper.parameters_basis(*layer[:3], basis=5) == parameters(output_composition(layer, 5))


def test_parameter_threshold_is_exact():
    for layer in GRID:
        threshold = paper.parameter_threshold(*layer)
        for basis in range(1, layer[1] + 1):
            fewer = paper.parameters_basis(*layer, basis) < paper.parameters_dense(*layer)
            assert fewer == (basis < threshold), (layer, basis)


@pytest.mark.parametrize(("c_in", "c_out", "share"), [(16, 16, 2), (16, 32, 3), (16, 64, 5)])
def test_parameter_threshold_is_not_always_met(c_in, c_out, share):
    layer = (c_in, c_out, 1, 4, 4)
    assert paper.parameter_threshold(c_in, c_out, 1) == pytest.approx(c_out / share, rel=1e-14)
    assert parameters(output_composition(layer, c_out // share)) <= parameters(dense(layer))
    assert parameters(output_composition(layer, c_out // share + 1)) > parameters(dense(layer))


def test_parameter_and_forward_threshold_are_the_same_number():
    for layer in GRID:
        c_in, c_out, kernel = layer
        fan_in = c_in * kernel**2
        assert paper.parameter_threshold(*layer) == paper.forward_threshold(*layer)
        assert paper.forward_threshold(*layer) == c_out * fan_in / (fan_in + c_out)


@layers
def test_forward_counts_are_right_for_one_sample(layer):
    assert paper.forward_dense(*layer) == measured(dense(layer), layer)[0]
    composed = measured(WeightComposition(layer, 5), layer)[0]
    assert paper.forward_weight_composition(*layer, basis=5) == composed
    assert (
        paper.forward_output_composition(*layer, basis=5) == measured(output_composition(layer, 5), layer)[0]
    )


@pytest.mark.parametrize("batch", [2, 16])
def test_weight_composition_overhead_is_overstated_by_the_batch(batch):
    printed = paper.forward_weight_composition(*SMALL, basis=6) / paper.forward_dense(*SMALL) - 1
    forward = measured(WeightComposition(SMALL, 6), SMALL, batch)[0]
    real = forward / measured(dense(SMALL), SMALL, batch)[0] - 1
    assert printed == pytest.approx(6 / 100, rel=1e-12)
    assert real == pytest.approx(printed / batch, rel=1e-12)


@layers
def test_forward_threshold_is_where_the_measured_forward_breaks_even(layer):
    threshold = paper.forward_threshold(*layer[:3])
    limit = measured(dense(layer), layer)[0]
    below, above = int(threshold), int(threshold) + 1
    assert measured(output_composition(layer, below), layer)[0] < limit
    assert measured(output_composition(layer, above), layer)[0] > limit


@layers
def test_dense_backward_is_half_of_autograd(layer):
    printed = paper.backward_dense(*layer)
    assert measured(dense(layer), layer)[1] == 2 * printed
    assert measured(dense(layer), layer, input_grad=False)[1] == printed


@layers
def test_output_composition_backward_is_twice_its_forward(layer):
    forward, backward = measured(output_composition(layer, 5), layer)
    assert backward == 2 * forward


@layers
@pytest.mark.parametrize("basis", [1, 2, 7])
def test_output_composition_backward_is_printed_too_big_whatever_the_basis(layer, basis):
    c_in, c_out, kernel, _, _ = layer
    factor = c_out / (2 * (1 + c_out / (c_in * kernel**2)))
    backward = measured(output_composition(layer, basis), layer)[1]
    assert paper.backward_output_composition(*layer, basis) / backward == pytest.approx(factor, rel=1e-12)


def test_output_composition_difference_follows_from_the_printed_counts():
    for c_in, c_out, kernel in GRID:
        layer = (c_in, c_out, kernel, 10, 7)
        basis = Fraction(3)
        change = paper.forward_output_composition(*layer, basis) + paper.backward_output_composition(
            *layer, basis
        )
        change -= paper.forward_dense(*layer) + paper.backward_dense(*layer)
        assert paper.output_composition_difference(*layer, basis) == change


def test_output_composition_threshold_follows_from_the_difference():
    for c_in, c_out, kernel in GRID:
        threshold = paper.output_composition_threshold(c_in, Fraction(c_out), kernel)
        for basis in map(Fraction, (1, 2, 3)):
            faster = paper.output_composition_difference(c_in, c_out, kernel, 10, 7, basis) < 0
            assert faster == (basis < threshold)


@layers
def test_two_basis_convolutions_do_not_accelerate_in_the_printed_count(layer):
    c_in, c_out, kernel, width, height = layer
    slower = 2 * width * height * (c_out + c_in * kernel**2)
    assert paper.output_composition_difference(*layer, Fraction(2)) == slower
    assert paper.output_composition_difference(*layer, Fraction(1)) < 0
    assert 1 < paper.output_composition_threshold(*layer[:3]) < 2


@layers
def test_training_accelerates_up_to_the_forward_threshold(layer):
    limit = sum(measured(dense(layer), layer))
    below = int(paper.forward_threshold(*layer[:3]))
    assert sum(measured(output_composition(layer, below), layer)) < limit
    assert sum(measured(output_composition(layer, below + 1), layer)) > limit
    assert paper.output_composition_difference(*layer, below) > 0


@pytest.mark.parametrize(("basis", "sums"), [(6, 6), (9, 3), (3, 6)])
def test_reduced_forward_adds_copies_and_sums_to_the_convolution(basis, sums):
    convolution = measured(Reduced(SMALL, basis, sums), SMALL)[0]
    printed = paper.forward_reduced(*SMALL, basis, Fraction(sums, 12))
    assert printed - convolution == 100 * ((12 - sums) + 2 * sums)


@pytest.mark.parametrize(("basis", "sums"), [(6, 6), (9, 3), (3, 6)])
def test_reduced_backward_depends_on_the_basis_and_not_on_the_terms(basis, sums):
    beta = Fraction(sums, 12)
    backward = measured(Reduced(SMALL, basis, sums), SMALL)[1]
    assert backward == 2 * paper.forward_dense(8, basis, 3, 10, 10)
    assert paper.backward_reduced(*SMALL, beta) == (1 + beta) * paper.backward_dense(*SMALL)


def test_reduced_condition_follows_from_the_printed_counts():
    for basis, sums in itertools.product(range(1, 13), range(13)):
        alpha, beta = Fraction(basis, 12), Fraction(sums, 12)
        for c_in, kernel in [(Fraction(8), 3), (Fraction(3), 3), (Fraction(8), 1), (Fraction(1), 3)]:
            difference = paper.reduced_difference(c_in, 12, kernel, 10, 10, basis, beta)
            assert paper.reduced_accelerates(c_in, kernel, alpha, beta) == (difference < 0)


@pytest.mark.parametrize("basis", range(1, 12))
def test_copying_each_basis_output_once_never_accelerates_in_the_printed_count(basis):
    alpha = Fraction(basis, 12)
    beta = 1 - alpha
    assert paper.reduced_difference(*SMALL, basis, beta) == 100 * 12 * (2 - alpha)
    assert not paper.reduced_accelerates(Fraction(8), 3, alpha, beta)


@pytest.mark.parametrize("basis", range(1, 12))
def test_copying_each_basis_output_once_accelerates_real_training(basis):
    sums = 12 - basis
    convolutions = sum(measured(Reduced(SMALL, basis, sums), SMALL))
    others = 100 * (2 * sums + 4 * sums + basis)  # sums forward, sums backward, copies backward
    full = sum(measured(dense(SMALL), SMALL))
    beta = Fraction(sums, 12)
    assert Fraction(convolutions + others, full) == 1 - beta + (1 + 5 * beta) / (3 * 8 * 9)
    assert convolutions + others < full


@pytest.mark.parametrize(
    ("c_in", "kernel", "least", "most"),
    [(16, 3, 0.007, 0.014), (3, 3, 0.037, 0.075), (16, 1, 0.062, 0.125), (1, 3, 0.11, 0.223)],
)
def test_simplified_condition_drops_a_term_that_matters(c_in, kernel, least, most):
    none, half, every = (Fraction(1 + beta, c_in * kernel**2) for beta in (0, Fraction(1, 2), 1))
    assert float(none) == pytest.approx(least, rel=0.02)
    assert float(every) == pytest.approx(most, rel=0.02)
    alpha = Fraction(1, 2) - half
    assert paper.reduced_accelerates_simplified(alpha, Fraction(1, 2))
    assert not paper.reduced_accelerates(Fraction(c_in), kernel, alpha, Fraction(1, 2))
    assert paper.reduced_accelerates(Fraction(c_in), kernel, alpha - Fraction(1, 10**9), Fraction(1, 2))


@pytest.mark.parametrize("beta", [0, 0.25, 0.5, 0.75])
def test_alpha_plus_beta_of_one_never_accelerates(beta):
    assert not paper.reduced_accelerates_simplified(1 - beta, beta)
    assert not paper.reduced_accelerates(10**6, 7, 1 - beta, beta)


@pytest.mark.parametrize(("basis", "sums"), [(3, 3), (6, 3), (4, 0), (6, 4)])
def test_accelerated_reduced_mode_repeats_outputs(basis, sums):
    alpha, beta = Fraction(basis, 12), Fraction(sums, 12)
    assert paper.reduced_accelerates(8, 3, alpha, beta)
    torch.manual_seed(0)
    with torch.no_grad():
        y = Reduced(SMALL, basis, sums, device="cpu")(torch.randn(1, 8, 10, 10))
    repeated = 12 - torch.unique(y, dim=1).shape[1]
    assert repeated == (1 - alpha - beta) * 12 > 0


def test_no_choice_of_copies_avoids_repeated_outputs():
    copies = 5  # of 8 outputs, 3 of them sums: alpha = beta = 3/8
    assert paper.reduced_accelerates(8, 3, 3 / 8, 3 / 8)
    repeated = {copies - len(set(choice)) for choice in itertools.product(range(3), repeat=copies)}
    assert min(repeated) == (1 - 3 / 8 - 3 / 8) * 8


def test_paper_average_is_the_baseline_plus_the_mean_change():
    generator = torch.Generator().manual_seed(0)
    one_layer = (100 + torch.randn(6, generator=generator, dtype=torch.float64)).tolist()
    for size in range(7):
        for chosen in itertools.combinations(range(1, 7), size):
            change = sum(one_layer[layer - 1] - 100 for layer in chosen) / 6
            assert paper.paper_average(100, one_layer, chosen) == pytest.approx(100 + change, rel=1e-14)


def test_paper_average_divides_savings_by_the_number_of_layers():
    layer, count = (8, 12, 3, 10, 10), 4
    full = measured(dense(layer), layer)[0]
    basis = measured(output_composition(layer, 3), layer)[0]
    one_layer = [(count - 1) * full + basis] * count
    predicted = paper.paper_average(count * full, one_layer, chosen={1, 2, 3, 4})
    assert count * full - predicted == pytest.approx((count * full - count * basis) / count, rel=1e-12)


@pytest.mark.parametrize("wrong", [0, 4])
def test_paper_average_refuses_a_layer_that_was_not_measured(wrong):
    with pytest.raises(SelectionError, match=rf"layers \[{wrong}\] are not among the 3 measured ones"):
        paper.paper_average(1.0, [1.0, 2.0, 3.0], chosen={2, wrong})
