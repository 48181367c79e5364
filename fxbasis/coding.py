"""The reduced composition: each output is a copy of one atom or a sum of two; tensors in, tensors out.

The O filters y of a layer are approximated by R atoms z = B y, combinations of the filters themselves,
and a composition A (O, R) with one nonzero in a row (a copy, plain or scaled) or two (a sum), the latter
in exactly n2 = round(beta O) rows (in none where there is a single atom). What is minimised is

    error = tr[(Id - A B) G (Id - A B)^T] / tr G        a ratio of energies: no square root is taken

with G (O, O) the Gram matrix of the filters: W W^T for the weight alone, or the covariance of the layer's
outputs. Where errors of the outputs count with weights D^2, it is D G D that is coded, and D taken off again.
Nothing but G is needed, and the weight of the atoms is B W.

    coding   For fixed atoms, with c = <y_i, z_k> and K = <z_k, z_l>, a scaled copy takes c_k^2 / K_kk off
             the error of filter i, a plain copy 2 c_k - K_kk, and a sum what the 2 x 2 least squares
             takes off. The second term goes to the n2 filters that gain most by it, which is optimal
             for fixed atoms, since the filters are coded apart. At the end all pairs are compared; on the
             way the best atom beside the best one is taken, which costs R times less and rarely more error.
    atoms    Coding and B = (A^T A)^-1 A^T, the least squares for a fixed A whatever G is, alternate; an
             atom without users restarts on the worst filter; the best code met is kept. This is K-SVD
             (Aharon, Elad, Bruckstein 2006) with rows of one or two terms; without sums, k-means.
    subset   The atoms are true filters: coding alternates with the medoid of each atom's copies.
    starts   Both begin once with the filters of a pivoted Cholesky factorisation of G and once with an
             agglomeration of the filters (Ward 1963, or its like for lines where copies are scaled).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .clustering import agglomerate, pivoted_filters
from .errors import InputError, SelectionError

__all__ = ["BASES", "Code", "encode", "encode_groups"]

_PARALLEL = 1e-3  # two atoms are one line where 1 - cos^2 is below: their coefficients would be large
_EXACT = 1e-12  # what a second term must gain, as a part of the filter's energy, to be more than 0
_FAINT = 1e-3  # a copy whose coefficient is below this fraction of its atom's largest does not set its scale
_PATIENCE = 2  # alternations without a lower error before one gives up


@dataclass(frozen=True)
class Code:
    """Output i is ``u[i]`` times atom ``first[i]``, plus ``v[i]`` times atom ``second[i]`` if that is not -1.

    Attributes:
        atoms: B (R, O) float64; atom k is the combination B[k] of the filters.
        first: (O,) long.
        second: (O,) long, -1 for a copy.
        u: (O,) float64. 1 for plain copies; of scaled ones the largest of each atom has exactly 1,
            unless it is faint beside the atom's sums, and a filter that is zero has 0.
        v: (O,) float64, 0 for a copy.
        error: tr[(Id - A B) G (Id - A B)^T] / tr G, 0 for a zero G; a ratio of energies, not of norms.
    """

    atoms: Tensor
    first: Tensor
    second: Tensor
    u: Tensor
    v: Tensor
    error: float

    def composition(self) -> Tensor:
        """The dense composition A (O, R)."""
        found = self.atoms.new_zeros(len(self.first), len(self.atoms))
        index, sums = torch.arange(len(self.first)), self.second >= 0
        found[index, self.first] = self.u
        found[index[sums], self.second[sums]] = self.v[sums]
        return found

    @property
    def distinct_outputs(self) -> int:
        """How many rows of A differ; the other outputs repeat one of these exactly."""
        return len(torch.unique(self.composition(), dim=0))


def _inverse(values: Tensor, floor: float) -> Tensor:
    """1 / values, 0 where they do not exceed the floor."""
    sound = values > floor
    return torch.where(sound, 1.0 / values.where(sound, torch.ones_like(values)), torch.zeros_like(values))


def _error(gram: Tensor, code: Code) -> float:
    gap = torch.eye(len(gram), dtype=gram.dtype) - code.composition() @ code.atoms
    total = float(gram.trace())
    return max(float(((gap @ gram) * gap).sum()) / total, 0.0) if total > 0 else 0.0


def _best_pairs(inner: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each filter the pair of unit atoms that explains most of it: k, l, and its energy.

    ``inner`` (O, R) are the filters' products with the atoms, ``cosines`` (R, R) those of the atoms. After
    atom k, atom l explains another (c_l - rho c_k)^2 / (1 - rho^2).
    """
    scale = _inverse(1.0 - cosines.square(), _PARALLEL).sqrt().fill_diagonal_(0.0)
    shear = cosines * scale
    best, first = inner.new_full((len(inner),), -1.0), torch.zeros(len(inner), dtype=torch.long)
    for k in range(len(cosines) - 1):
        fresh = (inner[:, k + 1 :] * scale[k, k + 1 :]).addr_(inner[:, k], shear[k, k + 1 :], alpha=-1)
        low, high = fresh.aminmax(dim=1)
        energy = inner[:, k].square() + torch.maximum(-low, high).square()
        first[energy > best] = k
        best = torch.maximum(best, energy)
    fresh = (inner * scale[first] - inner.gather(1, first[:, None]) * shear[first]).abs()
    columns = torch.arange(len(cosines))
    second = fresh.masked_fill(columns <= first[:, None], -1.0).argmax(dim=1)
    return first, second, best


def _greedy_pairs(inner: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_best_pairs``, with the best single atom as the first (orthogonal matching pursuit)."""
    scale = _inverse(1.0 - cosines.square(), _PARALLEL).sqrt().fill_diagonal_(0.0)
    first = inner.abs().argmax(dim=1)
    one = inner.gather(1, first[:, None])
    rest, second = ((inner - one * cosines[first]) * scale[first]).abs().max(dim=1)
    return first, second, one[:, 0].square() + rest.square()


Pairs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _code(
    gram: Tensor, atoms: Tensor, terms: int, scaled: bool, pairs: Pairs = _greedy_pairs
) -> tuple[Code, Tensor]:
    """The best code for fixed atoms, ``terms`` of its rows with two terms, and each filter's residual."""
    inner = gram @ atoms.mT
    products = atoms @ inner
    squares, total = products.diagonal(), float(gram.trace())
    inverse = _inverse(squares, 1e-14 * total)
    gain, first = (inner.square() * inverse if scaled else 2 * inner - squares).max(dim=1)
    u = (inner * inverse).gather(1, first[:, None])[:, 0] if scaled else torch.ones_like(gain)
    v, second = torch.zeros_like(u), torch.full_like(first, -1)
    if terms:
        unit = inverse.sqrt()
        inner, cosines = inner * unit, products * unit * unit[:, None]
        one, two, energy = pairs(inner, cosines)
        chosen = (energy - gain).argsort(descending=True, stable=True)[:terms]
        second[chosen] = (first[chosen] + 1) % len(atoms)
        chosen = chosen[(energy - gain - _EXACT * gram.diagonal())[chosen] > 0]
        one, two = one[chosen], two[chosen]
        first[chosen], second[chosen], gain[chosen] = one, two, energy[chosen]
        rho = cosines[one, two]
        v[chosen] = (inner[chosen, two] - rho * inner[chosen, one]) * _inverse(1 - rho.square(), _PARALLEL)
        u[chosen] = (inner[chosen, one] - rho * v[chosen]) * unit[one]
        v[chosen] *= unit[two]
    residual = gram.diagonal() - gain
    error = max(float(residual.sum()) / total, 0.0) if total > 0 else 0.0
    return Code(atoms, first, second, u, v, error), residual


def _least_squares(gram: Tensor, code: Code, residual: Tensor, scaled: bool) -> Tensor:
    """B = (A^T A)^-1 A^T; an atom without users first takes over one of the worst filters."""
    composition = code.composition()
    dead = (composition == 0).all(dim=0).nonzero()[:, 0]
    worst = residual.argsort(descending=True, stable=True)[: len(dead)]
    composition[worst] = 0.0
    composition[worst, dead] = 1.0
    inverse: Tensor = torch.linalg.pinv(composition.mT @ composition, rtol=1e-12, hermitian=True)
    return inverse @ composition.mT


def _medoids(gram: Tensor, owner: Tensor, rank: int, scaled: bool) -> Tensor:
    """For each atom the filter that serves its owned filters best, (R,); -1 where it owns none."""
    found = torch.full((rank,), -1)
    for atom in range(rank):
        users = (owner == atom).nonzero()[:, 0]
        if not len(users):
            continue
        part = gram[users][:, users]
        squares = part.diagonal()
        gains = part.square() * _inverse(squares, 0.0) if scaled else 2 * part - squares
        found[atom] = users[gains.sum(dim=0).argmax()]
    return found


def _exchanged(gram: Tensor, code: Code, residual: Tensor, scaled: bool) -> Tensor:
    """Each atom (a true filter) gives way to the medoid of its copies."""
    medoids = _medoids(gram, code.first.where(code.second < 0, -1), len(code.atoms), scaled)
    filters = torch.where(medoids < 0, code.atoms.argmax(dim=1), medoids)
    return torch.eye(len(gram), dtype=gram.dtype)[filters]


BASES: dict[str, Callable[[Tensor, Code, Tensor, bool], Tensor]] = {
    "atoms": _least_squares,
    "subset": _exchanged,
}


def _starts(gram: Tensor, rank: int, scaled: bool, basis: str) -> list[Tensor]:
    identity = torch.eye(len(gram), dtype=gram.dtype)
    atoms, owner = agglomerate(gram, rank, scaled)
    if basis == "subset":
        atoms = identity[_medoids(gram, owner, rank, scaled)]
    return [identity[pivoted_filters(gram, rank)], atoms]


def _alternate(gram: Tensor, atoms: Tensor, terms: int, scaled: bool, basis: str, steps: int) -> Code:
    """The best code met while coding and the update of the atoms take turns."""
    best, residual = _code(gram, atoms, terms, scaled)
    code, idle = best, 0
    for _ in range(steps):
        code, residual = _code(gram, BASES[basis](gram, code, residual, scaled), terms, scaled)
        idle = 0 if code.error < best.error * (1 - 1e-4) else idle + 1
        best = min(best, code, key=lambda found: found.error)
        if idle == _PATIENCE:
            break
    return best


def _with_real_copies(code: Code, scaled: bool) -> Code:
    """The same code, its atoms rescaled: the largest copy of each atom gets the coefficient 1 exactly.

    An atom whose copies are all below a thousandth of its largest coefficient, as those of dead filters
    are, is scaled by the latter: the coefficients of its sums would be huge.
    """
    composition, copies = code.composition(), code.second < 0
    floor = composition.abs().amax(dim=0) * (_FAINT if scaled else 0.0)
    alone = composition.where(copies[:, None] & (composition.abs() >= floor), 0.0)
    alone = torch.where((alone == 0).all(dim=0), composition, alone)
    scale = alone.gather(0, alone.abs().argmax(dim=0)[None])[0]
    scale = scale.where(scale != 0, torch.ones_like(scale))
    u, v = code.u / scale[code.first], torch.where(copies, 0.0, code.v / scale[code.second])
    return replace(code, atoms=code.atoms * scale[:, None], u=u, v=v)


def encode(
    gram: Tensor,
    rank: int,
    beta: float = 0.25,
    basis: str = "atoms",
    scaled: bool = True,
    steps: int = 15,
    weights: Tensor | None = None,
) -> Code:
    """R atoms for O filters, and one or two of them for each filter.

    Args:
        gram: G (O, O), symmetric, positive semidefinite and finite, any floating dtype and device.
        rank: R, 1 to O.
        beta: the fraction of the outputs that are sums of two atoms, 0 to 1; the others are copies.
        basis: "atoms" learns them; "subset" takes true filters.
        scaled: copies may have a coefficient; otherwise it is 1 for all of them.
        steps: alternations from each start, at most; 0 codes over the starts as they are.
        weights: (O,), positive, of the outputs' squared errors; all alike by default. Not for plain copies.

    >>> weight = torch.randn(16, 27)
    >>> code = encode(weight @ weight.T, rank=8, beta=0.25)
    >>> code.atoms.shape, int((code.second >= 0).sum())
    (torch.Size([8, 16]), 4)
    >>> basis = code.atoms @ weight.double()
    >>> loss = (weight - code.composition() @ basis).square().sum() / weight.square().sum()
    >>> bool((loss - code.error).abs() < 1e-6)
    True

    Raises:
        InputError: for a Gram matrix that is not square or not finite.
        SelectionError: for a rank, beta, basis or number of steps that means nothing here.
    """
    _check(gram, rank, beta, basis, steps)
    gram = gram.detach().to("cpu", torch.float64)
    scale = torch.ones_like(gram[0]) if weights is None else weights.to("cpu", torch.float64).sqrt()
    gram = (gram + gram.mT) / 2 * scale * scale[:, None]
    terms = round(beta * len(gram)) if rank > 1 else 0
    if rank == len(gram):
        return _every_filter(gram, terms)
    found = [_alternate(gram, s, terms, scaled, basis, steps) for s in _starts(gram, rank, scaled, basis)]
    best = min(found, key=lambda code: code.error)
    code, _ = _code(gram, best.atoms, terms, scaled, _best_pairs)
    code, error = _with_real_copies(code, scaled), _error(gram, code)
    code = replace(code, atoms=code.atoms * scale, u=code.u / scale, v=code.v / scale, error=error)
    return code if weights is None else _with_real_copies(code, scaled)


def _every_filter(gram: Tensor, terms: int) -> Code:
    """Each filter is its own atom, exactly: the Gram matrix tells errors only down to 1e-8 of the norm."""
    atoms, first = torch.eye(len(gram), dtype=gram.dtype), torch.arange(len(gram))
    second = torch.where(first < terms, (first + 1) % len(gram), -1)
    return Code(atoms, first, second, torch.ones_like(gram[0]), torch.zeros_like(gram[0]), 0.0)


def _check(gram: Tensor, rank: int, beta: float, basis: str, steps: int) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise InputError(f"gram of shape {tuple(gram.shape)} is not square; pass (O, O), for example W W^T")
    if not gram.isfinite().all():
        raise InputError(f"gram {tuple(gram.shape)} holds values that are not finite; pass finite ones")
    if not 1 <= rank <= len(gram):
        raise SelectionError(f"rank={rank!r} does not fit {len(gram)} filters; choose 1 to {len(gram)}")
    if not 0 <= beta <= 1:
        raise SelectionError(f"beta={beta!r} is no fraction of the outputs; choose 0 to 1")
    if basis not in BASES:
        raise SelectionError(f"basis={basis!r} is not known; choose one of {', '.join(BASES)}")
    if steps < 0:
        raise SelectionError(f"steps={steps!r} is negative; choose 0 or more")


def encode_groups(
    grams: Tensor, rank: int, beta: float = 0.25, basis: str = "atoms", weights: Tensor | None = None
) -> tuple[Code, ...]:
    """``encode`` for each of g groups: grams (g, O, O), weights (g, O), with ``rank`` atoms in every group.

    >>> weight = torch.randn(2, 6, 9)
    >>> [code.error < 1e-12 for code in encode_groups(weight @ weight.mT, rank=6, beta=0.0)]
    [True, True]

    Raises:
        InputError: for Gram matrices that are not square or not finite.
        SelectionError: as ``encode``.
    """
    if grams.ndim != 3:
        raise InputError(f"grams of shape {tuple(grams.shape)} are not a batch; pass (g, O, O)")
    each = [None] * len(grams) if weights is None else weights
    return tuple(encode(gram, rank, beta, basis, weights=one) for gram, one in zip(grams, each, strict=True))
