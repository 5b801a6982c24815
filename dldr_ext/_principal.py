"""The principal directions of stored snapshots, or of some of their columns."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from . import _pca
from ._stored_rows import Matrix, combined, formed
from .subspace import Subspace

_DEFAULT_DIM = 40


def principal_subspace(
    snapshots: Matrix,
    gram: Tensor | None,
    origin: Tensor,
    dtype: torch.dtype,
    *,
    double: bool,
    center: bool,
    most: int,
    dim: int | None = None,
    explained: float | None = None,
    **known: Any,
) -> Subspace:
    """The subspace that principal component analysis finds.

    Parameters
    ----------
    snapshots : Tensor, StoredRows or ScaledRows, shape (T, n)
    gram : Tensor, shape (T, T), float64, or None
        Their Gram matrix, if it is known to all digits.
    origin : Tensor, shape (n,)
        A point of the trajectory: w0.
    dtype : torch.dtype
        Of the basis.
    double : bool
        Snapshots and weights are float64.
    center : bool
    most : int
        Number of directions at most.
    dim : int, optional
        The number that was asked for: fewer are worth a warning.
    explained : float, optional
        As few directions as explain this share of the variance.
    **known
        Further arguments of `Subspace`.

    Raises
    ------
    ValueError
        All snapshots are the same.
    """
    # The Gram matrix that recording made serves to watch it; the basis needs more digits.
    gram = _pca.exact_gram(snapshots) if gram is None else gram
    found = _pca.exact_spectrum(gram, double, origin, center=center)
    if found.rank == 0:
        raise ValueError(
            f"the {len(snapshots)} snapshots do not differ (by more than rounding explains): there "
            "is no direction to keep"
        )
    if explained is not None:
        sums = found.explained(found.rank).cumsum(0)
        most = min(int((sums < explained).sum()) + 1, most)
    elif dim is not None and dim > found.rank:
        warnings.warn(
            f"dim = {dim} is above the numerical rank of the trajectory: kept "
            f"{found.rank} directions",
            UserWarning,
            stacklevel=3,
        )
    count = min(most, found.rank)
    coefficients = _pca.coefficients(found, count, center=center).to(snapshots.device)
    basis, scale = formed(snapshots, coefficients, dtype, _pca.column_step(snapshots))
    return Subspace(
        basis,
        origin,
        scale=scale,
        explained_variance_ratio=found.explained(count),
        singular_values=found.values[:count].sqrt(),
        **known,
    )


def asked_count(length: int, dim: int | None, explained: float | None, center: bool) -> int:
    """The most directions of ``length`` snapshots that the arguments ask for."""
    if dim is not None and explained is not None:
        raise ValueError(f"expected dim or explained, got both: {dim} and {explained}")
    if explained is not None and not 0 < explained <= 1:
        raise ValueError(f"explained: expected 0 < explained <= 1, got {explained}")
    limit = length - 1 if center else length
    if dim is None:
        return min(limit, _pca.MAX_DIM if explained is not None else _DEFAULT_DIM)
    return _pca.checked_dim(dim, limit, f"{length} {'centred ' * center}snapshots")


def weights_at(snapshots: Matrix, anchor: Tensor, start: str | int) -> Tensor:
    """The weights (n,) of one snapshot, or their mean, in the dtype of the anchor."""
    count = len(snapshots)
    if start == "mean":
        mean = torch.full((1, count), 1 / count, dtype=torch.float64, device=snapshots.device)
        step = _pca.column_step(snapshots)
        return combined(snapshots, mean, anchor.dtype, step)[0].add_(anchor)
    if isinstance(start, str):
        if start not in ("first", "last"):
            raise ValueError(f"start: expected 'first', 'last', 'mean' or an index, got {start!r}")
        index = 0 if start == "first" else count - 1
    else:
        index = operator.index(start)
        if not -count <= index < count:
            raise ValueError(f"start: expected an index of the {count} snapshots, got {index}")
    return snapshots[index].to(anchor.dtype, copy=True).add_(anchor)
