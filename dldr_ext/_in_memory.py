"""Subspaces that use the memory of the snapshots they are made of: no second array."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _pca, ops
from ._params import dtype_name
from ._principal import principal_of
from .implicit import ImplicitSubspace
from .stores import MemoryStore, SpentStore
from .subspace import Subspace

if TYPE_CHECKING:
    from .trajectory import Trajectory


def implicit(trajectory: Trajectory, dtype: torch.dtype | None) -> Callable[..., ImplicitSubspace]:
    """What makes an implicit subspace of coefficients, for `principal_subspace`."""
    _check(trajectory, dtype, "materialize=False")
    if len(trajectory) > _pca.MAX_DIM:
        raise ValueError(
            f"materialize=False: expected at most {_pca.MAX_DIM} snapshots, got {len(trajectory)}"
        )

    def form(
        snapshots: Tensor, coefficients: Tensor, origin: Tensor, _: torch.dtype, **known: Any
    ) -> ImplicitSubspace:
        lent = [rows for rows in trajectory._lent if rows() is not None]
        trajectory._lent = [*lent, weakref.ref(snapshots)]
        return ImplicitSubspace(snapshots, coefficients, origin, **known)

    return form


def into_subspace(
    self: Trajectory,
    dim: int | None = None,
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
        snapshots: Tensor, coefficients: Tensor, origin: Tensor, _: torch.dtype, **known: Any
    ) -> Subspace:
        self._store, self._anchor = SpentStore(), None  # before anything is overwritten
        basis, step = snapshots[: len(coefficients)], _pca.column_step(snapshots)
        for begin in range(0, snapshots.shape[1], step):
            chunk = snapshots[:, begin : begin + step].contiguous()
            basis[:, begin : begin + step] = ops.form_basis(chunk, coefficients)
        return Subspace(basis, origin, **known)

    return principal_of(self, form, dim, explained, start, center, dtype)


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
