"""Subspaces that use the memory of the snapshots they are made of: no second array."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pca.decomposition import _Kind, principal_subspace
from ..pca.dimension import MAX_DIM
from ..pca.form_basis import formed
from ..pca.gram import column_step
from ..subspace.dense import Subspace
from ..subspace.implicit import ImplicitSubspace
from ..tensors.formats import block_range
from ..tensors.matrices import Matrix, as_stored, scaled, stored_pieces
from ..tensors.parameters import dtype_name
from .stores import MemoryStore, SpentStore

if TYPE_CHECKING:
    from .trajectory import Trajectory
import operator
from typing import TYPE_CHECKING

from ..pca.form_basis import combined


def implicit(trajectory: Trajectory, dtype: torch.dtype | None) -> Callable[..., ImplicitSubspace]:
    """What makes an implicit subspace of coefficients, for `principal_subspace`."""
    _check(trajectory, dtype, "materialize=False")
    if len(trajectory) > MAX_DIM:
        raise ValueError(
            f"materialize=False: expected at most {MAX_DIM} snapshots, got {len(trajectory)}"
        )

    def form(
        snapshots: Matrix, coefficients: Tensor, origin: Tensor, _: torch.dtype, **known: Any
    ) -> ImplicitSubspace:
        matrix, scale = _stored(snapshots)
        lent = [rows for rows in trajectory._lent if rows() is not None]
        trajectory._lent = [*lent, weakref.ref(matrix)]
        return ImplicitSubspace(matrix, coefficients, origin, scale=scale, **known)

    return form


def into_subspace(
    self: Trajectory,
    dim: int | str | None = None,
    *,
    explained: float | None = None,
    start: str | int = "first",
    center: bool = True,
    dtype: torch.dtype | None = None,
) -> Subspace:
    """The principal directions, written over the snapshots: no second array.

    The first d rows of the snapshots' memory become the basis, chunk by chunk: to the bit that of
    `subspace`. The trajectory is spent then, and whatever is asked of it an error; a view of
    ``snapshots`` that was kept shows the basis. The memory of the other rows stays in use as long
    as the basis does.

    Parameters
    ----------
    dim, explained, start, center
        As in `subspace`.
    dtype : torch.dtype, optional
        None or that of the snapshots, since the basis takes their place.

    Raises
    ------
    ValueError
        As in `subspace`; for another dtype; for snapshots that are not in the memory that the
        parameters are in; while an `ImplicitSubspace` reads them. Nothing has changed then.
    """
    _check(self, dtype, "into_subspace")
    if any(rows() is not None for rows in self._lent):
        raise ValueError(
            "into_subspace: expected snapshots that nothing else reads, got an implicit subspace "
            "(materialize=False) of them: delete it first, or use subspace()"
        )

    def form(
        snapshots: Matrix, coefficients: Tensor, origin: Tensor, _: torch.dtype, **known: Any
    ) -> Subspace:
        matrix, scale = _stored(snapshots)
        basis, step = matrix[: len(coefficients)], column_step(snapshots)
        scale = None if scale is None else scale[: len(coefficients)]
        self._store, self._anchor = SpentStore(), None  # before anything is overwritten
        for begin, piece, part in stored_pieces(snapshots, step):
            chunk = scaled(piece.contiguous(), part)
            new, factors = formed(chunk, coefficients, self.dtype, step)
            end = begin + new.shape[1]
            basis[:, begin:end] = new
            if scale is not None and factors is not None:
                scale[:, slice(*block_range(begin, end))] = factors
        return Subspace(basis, origin, scale=scale, **known)

    return principal_of(self, form, dim, explained, start, center, dtype)


def _stored(snapshots: Matrix) -> tuple[Tensor, Tensor | None]:
    """The rows of a `MemoryStore`, and their scale in 8 bits."""
    matrix, scale = as_stored(snapshots)
    assert isinstance(matrix, Tensor) and (scale is None or isinstance(scale, Tensor))
    return matrix, scale


def _check(trajectory: Trajectory, dtype: torch.dtype | None, what: str) -> None:
    """Whether the snapshots can serve as they are."""
    len(trajectory)  # an error if it is spent
    if not isinstance(trajectory._store, MemoryStore):
        raise ValueError(
            f"{what}: expected snapshots in the memory that the parameters are in (storage="
            f"'device'), got storage={trajectory.storage!r}; subspace() forms a basis of these "
            "piece by piece"
        )
    if dtype not in (None, trajectory.dtype):
        name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(
            f"{what}: dtype: expected {dtype_name(trajectory.dtype)}, as the snapshots are stored, "
            f"got {name}"
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


def weights_at(snapshots: Matrix, anchor: Tensor, start: str | int) -> Tensor:
    """The weights (n,) of one snapshot, or their mean, in the dtype of the anchor."""
    count = len(snapshots)
    if start == "mean":
        mean = torch.full((1, count), 1 / count, dtype=torch.float64, device=snapshots.device)
        step = column_step(snapshots)
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
