"""L-BFGS: pure functions of float64 d-vectors, for dimensions where a d x d matrix is too much.

B is never formed: it is what the last pairs (s, y) make of a diagonal first guess. Reference:
Nocedal & Wright, Numerical Optimization (2nd edition, 2006), algorithms 7.4 and 7.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor, float]  # s, y, y.s > 0


def apply(pairs: Sequence[Pair], guess: Tensor, c: Tensor) -> Tensor:
    """B c by the two-loop recursion.

    Parameters
    ----------
    pairs : sequence of (s, y, y.s)
        Oldest first, y.s > 0; d-vectors in float64.
    guess : Tensor, shape (d,)
        Diagonal of the first guess, > 0.
    c : Tensor, shape (d,)

    Returns
    -------
    Tensor, shape (d,)
        4 d operations for each pair.

    Notes
    -----
    The guess is scaled by y.s / y.By of the newest pair (Nocedal & Wright, 7.20, for B = I).
    """
    q = c.clone()
    weights = []
    for s, y, sy in reversed(pairs):
        weight = float(torch.dot(s, q)) / sy
        q.add_(y, alpha=-weight)
        weights.append(weight)
    q.mul_(guess)
    if pairs:
        _, y, sy = pairs[-1]
        q.mul_(sy / float(torch.dot(y, guess * y)))
    for (s, y, sy), weight in zip(pairs, reversed(weights), strict=True):
        q.add_(s, alpha=weight - float(torch.dot(y, q)) / sy)
    return q
