"""How many directions a spectrum speaks for, measured against that of a random walk.

A random walk of many weights has no directions of its own, and yet most of its variance along a
few: 61 % in the first, 95 % in twelve, however long it is (Antognini, Sohl-Dickstein, "PCA of high
dimensional random walks with comparison to neural network training", NeurIPS 2018,
arXiv:1806.08805). The share of the variance alone, then, does not tell the directions of a training
from those of its noise. docs/dimension.md says what the rule was tested on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHORTEST = 8  # snapshots: fewer have no spectrum to speak of
_ENOUGH = 0.01  # share of the variance that may be left
_WALK = 0.05  # the same, for the walk that bounds the number
_NOISE = 2.0  # a flat rest: no direction above this many times its median
_GAP = 2.0  # a gap: the step to the next direction is this many times that of a walk
_NOTHING = 0.001  # gaps where less than this is left do not count


def walk_spectrum(length: int) -> Tensor:
    """Return the spectrum of a walk of ``length`` points: eigenvalues (length - 1,), descending.

    For steps of unit length, orthogonal to each other: what independent steps come to in high
    dimension. With D the difference matrix of a path, the Gram matrix is the pseudo-inverse of
    D^T D, whose eigenvalues are 2 - 2 cos(pi k / T), k = 1 .. T - 1.
    """
    k = torch.arange(1, length, dtype=torch.float64, device="cpu")
    return 1 / (2 - 2 * torch.cos(k * (math.pi / length)))


def left_over(values: Tensor) -> Tensor:
    """Return the share of the variance beyond the first 1, 2, ... directions, (len(values),)."""
    beyond = values.flip(0).cumsum(0).flip(0)
    return torch.cat([beyond[1:], beyond.new_zeros(1)]) / beyond[0]


def supported(values: Tensor, rank: int) -> tuple[int, str]:
    """Return how many leading directions to keep, and why no more.

    Parameters
    ----------
    values : Tensor, shape (T - 1,)
        Eigenvalues of a centred Gram matrix, descending.
    rank : int
        At least 1. Directions beyond it are rounding.

    Returns
    -------
    int
        0 if no direction stands out from noise.
    str
    """
    length = len(values) + 1
    values = torch.where(torch.arange(length - 1, device="cpu") < rank, values, 0)
    walk, left = walk_spectrum(length), left_over(values)
    enough = _first(left <= _ENOUGH) + 1
    bound = _first(left_over(walk) <= _WALK) + 1
    medians = torch.stack([values[k:].median() for k in range(rank)])
    noise = _first(values[:rank] <= _NOISE * medians, otherwise=length)
    kept, why = min(
        (noise, "what is left is flat, as noise is"),
        (enough, f"at most {100 * _ENOUGH:g} % of the variance is left"),
        (
            bound,
            f"a random walk of {length} snapshots, too, has {100 * (1 - _WALK):g} % of its "
            "variance along as many",
        ),
        key=lambda bound: bound[0],
    )
    gap = _last_gap(values, walk, left)
    return (gap, "a gap in the spectrum follows") if gap > kept else (kept, why)


def _last_gap(values: Tensor, walk: Tensor, left: Tensor) -> int:
    """Return the last of the first half of the directions that a gap follows; 0 without one.

    In the other half a spectrum ends, and steps are those of its end.
    """
    half = len(values) // 2
    steps = values[:half] * walk[1 : half + 1] >= _GAP * values[1 : half + 1] * walk[:half]
    before = torch.cat([left.new_ones(1), left])[:half]
    gaps = (steps & (before > _NOTHING)).nonzero()
    return int(gaps.max()) + 1 if len(gaps) else 0


def _first(true: Tensor, otherwise: int = -1) -> int:
    """Return the index of the first true element."""
    indices = true.nonzero()
    return int(indices[0]) if len(indices) else otherwise
