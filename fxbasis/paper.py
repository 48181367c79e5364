"""The formulas of arXiv 2408.06024 (Alekseev, Lukashevich, Zharikov, Vasiliev 2024), as printed.

They stand here for comparison, wrong ones included; each docstring gives the verdict and each test shows
where the formula fails. The corrected counts, which the library uses, are in :mod:`fxbasis.costs`.

The paper assumes stride 1, "same" output size, square kernels, one group and no bias, and drops the batch
from every count. It counts one multiply-add, or one copy, as one operation. Arguments and printed symbols:

    in_channels    C_in     basis    C'_out, the number of basis convolutions
    out_channels   C_out    alpha    C'_out / C_out
    kernel         K        beta     the share of outputs that are two-term sums; the others are copies
    width, height  W, H

Counts are primed by mode: N_0 dense, N' weight composition, N'' output composition, N''' reduced
coefficients; _f is forward, _b backward. Delta = (N_f + N_b) - (N_f0 + N_b0) is negative where a mode
accelerates training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

from .errors import SelectionError

__all__ = [
    "backward_dense",
    "backward_output_composition",
    "backward_reduced",
    "forward_dense",
    "forward_output_composition",
    "forward_reduced",
    "forward_threshold",
    "forward_weight_composition",
    "output_composition_difference",
    "output_composition_threshold",
    "paper_average",
    "parameter_threshold",
    "parameters_basis",
    "parameters_dense",
    "reduced_accelerates",
    "reduced_accelerates_simplified",
    "reduced_difference",
]


def parameters_dense(in_channels: int, out_channels: int, kernel: int) -> int:
    """Weights of the convolution: C_out C_in K K. Right.

    >>> parameters_dense(64, 64, 3)
    36864
    """
    return out_channels * in_channels * kernel * kernel


def parameters_basis(in_channels: int, out_channels: int, kernel: int, basis: int) -> int:
    """Weights of basis and coefficients: C'_out C_in K K + C'_out C_out. Right.

    >>> parameters_basis(64, 64, 3, basis=32)
    20480
    """
    return basis * in_channels * kernel * kernel + basis * out_channels


def parameter_threshold(in_channels: int, out_channels: int, kernel: int) -> float:
    """A basis has fewer weights for C'_out < C_out [1 - 1 / ((C_in / C_out) K K + 1)].

    The expression is exact. "~ C_out, which is always the case" is wrong: it needs C_in K K >> C_out, and
    a 1x1 layer that doubles the channels must stay under a third of C_out.

    >>> round(parameter_threshold(64, 64, 3), 9), round(parameter_threshold(64, 128, 1), 9)
    (57.6, 42.666666667)
    """
    return out_channels * (1 - 1 / (in_channels / out_channels * kernel * kernel + 1))


def forward_dense(in_channels: int, out_channels: int, kernel: int, width: int, height: int) -> int:
    """N_f0 = K K W H C_in C_out. Right for one sample and one group.

    >>> forward_dense(64, 64, 3, 56, 56)
    115605504
    """
    return kernel * kernel * width * height * in_channels * out_channels


def forward_weight_composition(
    in_channels: int, out_channels: int, kernel: int, width: int, height: int, basis: int
) -> int:
    """N'_f = C_out C'_out C_in K K + N_f0.

    Right for one sample. The first term is paid once a batch, so relative to N_f0 it is C'_out / (B W H): the
    count overstates it B times for a batch of B, and after folding it is zero.

    >>> forward_weight_composition(64, 64, 3, 56, 56, basis=32) - forward_dense(64, 64, 3, 56, 56)
    1179648
    """
    composition = out_channels * basis * in_channels * kernel * kernel
    return composition + forward_dense(in_channels, out_channels, kernel, width, height)


def forward_output_composition(
    in_channels: int, out_channels: int, kernel: int, width: int, height: int, basis: int
) -> int:
    """N''_f = K K W H C_in C'_out + C_out C'_out W H. Right for one sample and one group.

    >>> forward_output_composition(64, 64, 3, 56, 56, basis=32) / forward_dense(64, 64, 3, 56, 56)
    0.5555555555555556
    """
    return kernel * kernel * width * height * in_channels * basis + out_channels * basis * width * height


def forward_threshold(in_channels: int, out_channels: int, kernel: int) -> float:
    """The forward of output composition is cheaper for C'_out < C_out (1 + C_out / (C_in K K))^-1.

    Right, and the same number as :func:`parameter_threshold`, though the paper concludes "just for relatively
    small values" here and "always the case" there.

    >>> round(forward_threshold(64, 64, 3), 9), round(forward_threshold(64, 128, 1), 9)
    (57.6, 42.666666667)
    """
    return out_channels / (1 + out_channels / (in_channels * kernel * kernel))


def backward_dense(in_channels: int, out_channels: int, kernel: int, width: int, height: int) -> int:
    """N_b0 = W H C_out K K C_in.

    Half of what autograd does: the gradients of the input and of the weight cost N_f0 each. It is right for a
    first layer, whose input needs no gradient.

    >>> backward_dense(64, 64, 3, 56, 56) == forward_dense(64, 64, 3, 56, 56)
    True
    """
    return width * height * out_channels * kernel * kernel * in_channels


def backward_output_composition(
    in_channels: int, out_channels: int, kernel: int, width: int, height: int, basis: int
) -> int:
    """N''_b = W H C_out C'_out K K C_in.

    Wrong: it multiplies the two stages, where reverse accumulation adds them, 2 N''_f in all. It is too big
    by C_out / (2 (1 + C_out / (C_in K K))), whatever the basis.

    >>> counted = backward_output_composition(64, 64, 3, 56, 56, basis=32)
    >>> round(counted / (2 * forward_output_composition(64, 64, 3, 56, 56, basis=32)), 9)
    28.8
    """
    return width * height * out_channels * basis * kernel * kernel * in_channels


def output_composition_difference(
    in_channels: int, out_channels: int, kernel: int, width: int, height: int, basis: int
) -> float:
    """Delta'' = K K W H C_in C_out {C'_out + C'_out / C_out + C'_out / (K K C_in) - 2}.

    The algebra follows from N_b0 and N''_b and is wrong with them: autograd trains faster at every basis
    below :func:`forward_threshold`.

    >>> output_composition_difference(64, 64, 3, 56, 56, basis=1) < 0
    True
    >>> output_composition_difference(64, 64, 3, 56, 56, basis=2) < 0
    False
    """
    per_output = basis + basis / out_channels + basis / (kernel * kernel * in_channels) - 2
    return forward_dense(in_channels, out_channels, kernel, width, height) * per_output


def output_composition_threshold(in_channels: int, out_channels: int, kernel: int) -> float:
    """Delta'' < 0 for C'_out < 2 (1 + 1 / C_out + 1 / (K K C_in))^-1, "as long as C'_out <= 2".

    Follows from Delta'', but the conclusion does not: the bound is below 2, so even this count leaves no
    basis but a single convolution.

    >>> round(output_composition_threshold(64, 64, 3), 3)
    1.966
    """
    return 2 / (1 + 1 / out_channels + 1 / (kernel * kernel * in_channels))


def forward_reduced(
    in_channels: int, out_channels: int, kernel: int, width: int, height: int, basis: int, beta: float
) -> float:
    """N'''_f = K K W H C_in C'_out + (1 - beta) C_out W H + beta C_out 2 W H.

    Right if a copy is one operation. A copy is memory traffic and no multiply-add.

    >>> forward_reduced(64, 64, 3, 56, 56, basis=32, beta=0.5) / forward_dense(64, 64, 3, 56, 56)
    0.5026041666666666
    """
    area = width * height
    copies_and_sums = (1 - beta) * out_channels * area + beta * out_channels * 2 * area
    return kernel * kernel * area * in_channels * basis + copies_and_sums


def backward_reduced(
    in_channels: int, out_channels: int, kernel: int, width: int, height: int, beta: float
) -> float:
    """N'''_b = W H (1 - beta) C_out K K C_in + W H beta C_out 2 K K C_in.

    Wrong: it runs the convolution once for each term of each output. Autograd first adds the gradients of the
    outputs that share a basis convolution, then goes back through C'_out convolutions, twice.

    >>> backward_reduced(64, 64, 3, 56, 56, beta=0.5) / backward_dense(64, 64, 3, 56, 56)
    1.5
    """
    one_term = width * height * (1 - beta) * out_channels * kernel * kernel * in_channels
    two_terms = width * height * beta * out_channels * 2 * kernel * kernel * in_channels
    return one_term + two_terms


def reduced_difference(
    in_channels: int, out_channels: int, kernel: int, width: int, height: int, basis: int, beta: float
) -> float:
    """Delta''' = N'''_f + N'''_b - N_f0 - N_b0.

    Wrong with N_b0 and N'''_b. The paper's own figure, each basis output copied once and so beta = 1 - alpha,
    gives W H C_out (2 - alpha) > 0: never an acceleration.

    >>> reduced_difference(64, 64, 3, 56, 56, basis=32, beta=0.5) == 56 * 56 * 64 * 1.5
    True
    """
    size = (in_channels, out_channels, kernel, width, height)
    reduced = forward_reduced(*size, basis, beta) + backward_reduced(*size, beta)
    return reduced - forward_dense(*size) - backward_dense(*size)


def reduced_accelerates(in_channels: int, kernel: int, alpha: float, beta: float) -> bool:
    """Delta''' < 0 if beta {1 + 1 / (K K C_in)} + alpha < 1 - 1 / (K K C_in).

    Follows from Delta''' and is wrong with it. Where it holds, more than C'_out outputs are copies, so at
    least (1 - alpha - beta) C_out of them repeat another output.

    >>> reduced_accelerates(64, 3, alpha=0.5, beta=0.25), reduced_accelerates(64, 3, alpha=0.5, beta=0.5)
    (True, False)
    """
    share = 1 / (kernel * kernel * in_channels)
    return beta * (1 + share) + alpha < 1 - share


def reduced_accelerates_simplified(alpha: float, beta: float) -> bool:
    """The condition above "simplified just as alpha + beta < 1".

    Necessary, not sufficient: the dropped term (1 + beta) / (K K C_in) is about 1 % for a 3x3 layer of 16
    channels, 4 to 7 % for a 3x3 layer on an image and 6 to 12 % for a 1x1 layer of 16 channels.

    >>> reduced_accelerates_simplified(0.5, 0.45), reduced_accelerates(3, 3, 0.5, 0.45)
    (True, False)
    """
    return alpha + beta < 1


def paper_average(baseline: float, one_layer: Sequence[float], chosen: Collection[int]) -> float:
    """Section 3.2: the metric of a set of layers is the mean of ``one_layer`` if chosen, else ``baseline``.

    ``one_layer[l - 1]`` is the time, size or accuracy drop measured with a basis in layer l alone, and
    ``chosen`` holds layer numbers from 1. It ranks sets as the sum of the changes does, but divides that sum
    by the number of layers: the savings of 2 and 4 minutes below come out as 1.5, not 6.

    Raises SelectionError for a layer number outside 1..len(one_layer).

    >>> paper_average(100.0, [98.0, 96.0, 101.0, 100.0], chosen={1, 2})
    98.5
    """
    layers = range(1, len(one_layer) + 1)
    unknown = sorted(set(chosen).difference(layers))
    if unknown:
        raise SelectionError(
            f"layers {unknown} are not among the {len(one_layer)} measured ones; number them from 1"
        )
    return fmean(one_layer[layer - 1] if layer in chosen else baseline for layer in layers)
