"""The principal directions of stored snapshots, or of some of their columns."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import _pca
from ._choice import checked_auto, choose
from ._stored_rows import Matrix, combined, formed
from .subspace import Subspace

if TYPE_CHECKING:
    from .trajectory import Trajectory

_DEFAULT_DIM = 40
_Kind = TypeVar("_Kind")


def principal_subspace(
    snapshots: Matrix,
    gram: Tensor | None,
    origin: Tensor,
    dtype: torch.dtype,
    form: Callable[..., _Kind],
    *,
    double: bool,
    center: bool,
    most: int,
    dim: int | str | None = None,
    explained: float | None = None,
    stacklevel: int,
    **known: Any,
) -> _Kind:
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
    form : callable
        Makes the subspace of the coefficients, as `dense` does.
    double : bool
        Snapshots and weights are float64.
    center : bool
    most : int
        Number of directions at most.
    dim, explained
        What was asked for: as in `Trajectory.subspace`.
    stacklevel : int
        Of a warning; 0 for none.
    **known
        Further arguments of ``form``.

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
    count, facts, warning = choose(found, len(snapshots), most, dim, explained, center)
    if warning is not None and stacklevel:
        warnings.warn(warning, UserWarning, stacklevel=stacklevel)
    coefficients = _pca.coefficients(found, count, center=center).to(snapshots.device)
    return form(
        snapshots,
        coefficients,
        origin,
        dtype,
        explained_variance_ratio=found.explained(count),
        singular_values=found.values[:count].sqrt(),
        choice=facts,
        **known,
    )


def principal_of(
    trajectory: Trajectory,
    form: Callable[..., _Kind],
    dim: int | str | None,
    explained: float | None,
    start: str | int,
    center: bool,
    dtype: torch.dtype | None,
) -> _Kind:
    """`principal_subspace` of a trajectory; arguments as of `Trajectory.subspace`."""
    count, dtype, origin = trajectory._asked(dim, explained, start, center, dtype)
    return principal_subspace(
        trajectory.snapshots,
        trajectory.gram if trajectory.dtype == torch.float64 else None,
        origin,
        dtype,
        form,
        double=trajectory._double(),
        center=center,
        most=count,
        dim=dim,
        explained=explained,
        shapes=trajectory.shapes,
        names=trajectory.names,
        stacklevel=4,
    )


def dense(
    snapshots: Matrix,
    coefficients: Tensor,
    origin: Tensor,
    dtype: torch.dtype,
    **known: Any,
) -> Subspace:
    """The subspace with the basis coefficients @ snapshots, formed chunk by chunk."""
    basis, scale = formed(snapshots, coefficients, dtype, _pca.column_step(snapshots))
    return Subspace(basis, origin, scale=scale, **known)


def asked_count(length: int, dim: int | str | None, explained: float | None, center: bool) -> int:
    """The most directions of ``length`` snapshots that the arguments ask for."""
    if dim is not None and explained is not None:
        raise ValueError(f"expected dim or explained, got both: {dim} and {explained}")
    if explained is not None and not 0 < explained <= 1:
        raise ValueError(f"explained: expected 0 < explained <= 1, got {explained}")
    limit = length - 1 if center else length
    if isinstance(dim, str):
        if dim != "auto":
            raise ValueError(f"dim: expected a number or 'auto', got {dim!r}")
        checked_auto(length, center)
        return min(limit, _pca.MAX_DIM)
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
