"""Two runs of one architecture beside each other.

One more pass over the files of both gives the Gram matrix of all their points together, from which
everything follows: the plane in which both paths lie, and what one run's directions explain of the
other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series
from ..pca.gram import column_step, exact_gram
from ..pca.metrics import pairwise_distances
from ..pca.spectrum import Spectrum, coefficients, exact_spectrum
from .analysis import Chunks, described_path, described_plane
from .layers import Layers

Progress = Callable[[str, int, int], None]


def compare(
    first: Series,
    second: Series,
    kept: int,
    *,
    double: bool = False,
    chunk_bytes: int = 112 << 20,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare two runs.

    Parameters
    ----------
    first, second : Series
        With the same tensors in the same order: see `Series.match`.
    kept : int
        Directions of each run that the other is projected on.
    double : bool
        Differences in float64, no longer float32.
    chunk_bytes : int
        As in `Analysis`.
    skip_bad : bool
        Start again without a checkpoint of the second run that cannot be used.
    progress : callable, optional
        As in `Analysis`.

    Returns
    -------
    other, together : dict
        What `Analysis` says of the first run, of the second; and of both together.

    Raises
    ------
    CheckpointError
    ValueError
        Fewer than two checkpoints in the second run; all the same.
    """
    while True:
        if len(second) < 2:
            raise ValueError(f"compare: expected at least two checkpoints, got {len(second)}")
        try:
            joint, square, squares = _joint_gram(first, second, double, chunk_bytes, progress)
            break
        except CheckpointError as error:
            if not skip_bad or error.path not in second.paths:
                raise
            second.drop(error)
    split = len(first)
    grams = joint[:split, :split], joint[split:-1, split:-1]
    one, two = (exact_spectrum(gram, square, double=double, center=True) for gram in grams)
    if two.rank == 0:
        raise ValueError("compare: the checkpoints do not differ: there is no direction")
    other = {
        "checkpoints": [str(path) for path in second.paths],
        "skipped": [str(error) for error in second.skipped],
        "notes": list(dict.fromkeys(second.notes)),
        **described_path(grams[1], two),
        "layers": Layers(second.names, second.shapes).described(squares),
    }
    # Both runs as differences from the first point of the first run.
    moves = torch.eye(len(joint) - 1, len(joint), dtype=torch.float64)
    moves[split:, -1] = 1
    gram = moves @ joint @ moves.T
    spectrum = exact_spectrum(gram, square, double=double, center=True)
    apart = pairwise_distances(gram)
    cross = joint[:split, split:-1]
    together = {
        "path": described_plane(spectrum),
        "kept": kept,
        "distance_of_first": float(apart[0, split]),
        "distance_of_last": float(apart[split - 1, -1]),
        "second_in_first": _share(one, two, cross, grams[1], kept),
        "first_in_second": _share(two, one, cross.T, grams[0], kept),
    }
    return other, together


def _joint_gram(
    first: Series, second: Series, double: bool, chunk_bytes: int, progress: Progress | None
) -> tuple[Tensor, float, Tensor]:
    """Return the Gram matrix of both runs' differences from their own first points.

    The last row is the difference of these. Also |w|^2 of the first point, and the squared norms of
    the second run's steps by layer.
    """
    dtype = torch.float64 if double else torch.float32
    count = len(first) + len(second) + 1
    step = column_step(torch.empty(count, 0, device="cpu"))
    width = min(Chunks.width_of(run, dtype, chunk_bytes // 4, step) for run in (first, second))
    chunks = [Chunks(run, dtype, width) for run in (first, second)]
    layers = Layers(second.names, second.shapes)
    gram = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    squares, square = gram.new_zeros(len(layers.names), len(second) - 1), 0.0
    size = sum(run.row_bytes(t) for run in (first, second) for t in range(len(run)))
    with CheckpointReader() as reader:
        for begin in range(0, first.numel, width):
            (a, rows), (b, others) = (chunk.read(reader, begin) for chunk in chunks)
            gram = exact_gram(torch.cat([rows[:], others[:], (b - a)[None]]), total=gram)
            squares += layers.squares(others, begin)
            square += float(torch.linalg.vector_norm(a, dtype=torch.float64)) ** 2
            if progress is not None:
                progress("both runs", size * (begin + len(a)) // first.numel, size)
    for run in (first, second):
        run.check_unchanged()
    return gram, square, squares


def _share(one: Spectrum, two: Spectrum, cross: Tensor, gram: Tensor, kept: int) -> float:
    """Return the share of the second run's variance along the first one's directions."""
    rows = coefficients(one, min(kept, one.rank)) @ cross
    rows = rows - rows.mean(1, keepdim=True)
    return float(rows.square().sum() / two.values.sum())
