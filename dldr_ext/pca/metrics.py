"""Metrics of a run, from the Gram matrix of its snapshots or checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spectrum import Spectrum

# Two checkpoints nearer than this share of the median step between neighbours are as good as one.
_NEAR = 0.01
_MOST_PAIRS = 1000  # that are kept
_SHARES = (0.9, 0.95, 0.99)


def effective_dimension(ratio: Tensor) -> dict[str, float]:
    """Count the directions that shares of the variance take; with the participation ratio.

    Parameters
    ----------
    ratio : Tensor, shape (rank,)
        Explained variance ratios, descending.

    Returns
    -------
    dict
        ``participation_ratio``, and a number of directions under "0.9", "0.95" and "0.99".
    """
    sums = ratio.cumsum(0)
    dimension: dict[str, float] = {"participation_ratio": float(1 / ratio.square().sum())}
    for share in _SHARES:
        dimension[f"{share:g}"] = min(int((sums < share).sum()) + 1, len(ratio))
    return dimension


def drift(gram: Tensor) -> dict[str, list[float]]:
    """Measure the distances from the first checkpoint and between neighbours."""
    distances = pairwise_distances(gram)
    return {"from_first": distances[0].tolist(), "steps": distances.diagonal(1).tolist()}


def step_cosines(gram: Tensor) -> Tensor:
    """Cosines between the steps from one checkpoint to the next, (T - 1, T - 1); 0 for no step."""
    products = gram.diff(dim=0).diff(dim=1)
    norms = products.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    return (products * scale * scale[:, None]).clamp(-1, 1)


def near_duplicates(gram: Tensor) -> list[tuple[int, int, float]]:
    """Find pairs nearer to each other than 1 % of the median step; with that share of a step."""
    distances = pairwise_distances(gram)
    steps = distances.diagonal(1)
    steps = steps[steps > 0]
    if not len(steps):
        return [(s, t, 0.0) for s in range(len(gram)) for t in range(s + 1, len(gram))]
    shares = distances / steps.median()
    pairs = (shares < _NEAR).triu(1).nonzero().tolist()
    return [(s, t, float(shares[s, t])) for s, t in pairs]


def pairwise_distances(gram: Tensor) -> Tensor:
    """|x_s - x_t|, shape (T, T)."""
    squares = gram.diagonal()
    squared = squares[:, None] + squares - 2 * gram
    # What is left of equal rows is the rounding of the sums.
    floor = (squares[:, None] + squares) * 2.0**-44
    return torch.where(squared > floor, squared, 0).sqrt()


def coordinates(spectrum: Spectrum) -> Tensor:
    """Return the path in the plane of the first two directions, (T, 2), its mean at zero."""
    points = spectrum.vectors[:2] * spectrum.values[:2, None].sqrt()
    points[spectrum.rank :] = 0  # rounding
    return points.T


def of_gram(gram: Tensor, ratio: Tensor) -> dict[str, Any]:
    """Collect all metrics as JSON can hold them."""
    cosines, pairs = step_cosines(gram), near_duplicates(gram)
    return {
        "explained_variance_ratio": ratio.tolist(),
        "effective_dimension": effective_dimension(ratio),
        "drift": drift(gram),
        "cosines": {
            "successive": cosines.diagonal(1).tolist(),
            "steps": cosines.tolist(),
        },
        "near_duplicates": [list(pair) for pair in pairs[:_MOST_PAIRS]],
        "near_duplicates_in_all": len(pairs),
        "gram": gram.tolist(),
    }
