"""Recorded training trajectories and their principal directions (DLDR, arXiv:2103.11154)."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..pca.decomposition import principal_subspace
from ..pca.dimension import asked_count
from ..pca.spectrum import stored_spectrum
from ..subspace.dense import Subspace, dense
from ..subspace.grouped import GroupedSubspace, group_slices
from ..subspace.implicit import ImplicitSubspace
from ..tensors.formats import STORED, wide_dtype
from ..tensors.matrices import Matrix, columns
from ..tensors.parameters import dtype_name, dtype_names, flatten, named_parameters, numel
from .checks import check_current, checked_capacity, given_anchor, why_not_finite
from .files import load_trajectory, save_trajectory
from .from_checkpoints import from_checkpoints
from .principal import implicit, into_subspace, principal_of, weights_at
from .stores import RecordingCost, SpentStore, check_storage, new_store


class Trajectory:
    """Snapshots of a list of parameters, as deltas from an anchor, with their Gram matrix.

    Parameters
    ----------
    params : iterable of Tensor
        The parameters to record, n elements in all: ``model.parameters()``, or
        ``model.named_parameters()`` to keep the names too. Tied ones count once, frozen ones not.
    capacity : int
        Most snapshots. Memory is touched only as snapshots come in.
    dtype : torch.dtype
        Of the stored deltas: float32, bfloat16, float16 or float64; int8 or float8_e4m3fn, with a
        float32 scale for each block of 256.
    storage : "device", "host" or "disk"
        Where the snapshots are kept: with the parameters; in (pinned) memory of the host; in files
        of the folder ``path``, where they outlive the process. All give the same numbers to the
        bit: see docs/trajectories.md.
    path : path, optional
        For "disk": a folder, made if it is not there; this trajectory alone records to it until
        `close`. `load` goes on with one that holds a trajectory.
    anchor : Tensor of shape (n,) or list of tensors like ``params``, optional
        What the deltas are taken from. Default: the first snapshot.
    process_group : ProcessGroup, DeviceMesh, module, "world" or None
        Ranks that record together, each keeping its own columns of every snapshot: see
        docs/distributed.md. `subspace` then gives a `ShardedSubspace`, or for DTensors a
        `LocalSubspace`; ``snapshots`` and ``anchor`` are of this rank's columns.

    Notes
    -----
    A stored row is ``round_to(dtype, w_t - a)``, computed in float32 (float64 for float64
    snapshots). The Gram matrix is that of the stored rows and grows with each snapshot in the
    same pass over memory.
    """

    _lent: Sequence[weakref.ref[Tensor]] = ()  # snapshots that implicit subspaces read

    def __new__(cls, *_: Any, process_group: Any = None, **__: Any) -> Trajectory:
        if process_group is None or cls is not Trajectory:
            return object.__new__(cls)
        from .stores.sharded import SharedTrajectory

        return object.__new__(SharedTrajectory)

    def __init__(
        self,
        params: Iterable[Any],
        capacity: int = 81,
        dtype: torch.dtype = torch.bfloat16,
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
        *,
        anchor: Tensor | Sequence[Tensor] | None = None,
        process_group: Any = None,
    ) -> None:
        if process_group is not None:
            raise TypeError(f"process_group: expected None for a {type(self).__name__}")
        self._describe(params, capacity, dtype)
        check_storage(storage, path)
        self.storage = storage
        self._anchor = None if anchor is None else given_anchor(self, anchor)
        sizes = self.numel, self.capacity, self.dtype, self.device
        self._store = new_store(storage, path, sizes, self._metadata())

    def _describe(self, params: Iterable[Any], capacity: int, dtype: torch.dtype) -> None:
        """What the trajectory is of."""
        self.params, self.names = named_parameters(params)
        self.shapes = [tuple(p.shape) for p in self.params]
        self.numel = numel(self.params)
        self.device = self.params[0].device
        self.capacity = checked_capacity(capacity)
        if dtype not in STORED:
            found = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
            raise ValueError(f"dtype: expected one of {dtype_names(STORED)}, got {found}")
        if self.numel == 0:
            raise ValueError("params: expected at least one element, got tensors of size 0")
        self.dtype = dtype

    def _metadata(self) -> dict[str, Any]:
        return {
            "shapes": self.shapes,
            "names": self.names,
            "dtype": dtype_name(self.dtype),
            "capacity": self.capacity,
        }

    def __len__(self) -> int:
        """Number of snapshots, T."""
        return self._store.length

    def __repr__(self) -> str:
        if isinstance(self._store, SpentStore):
            return f"Trajectory(spent, numel={self.numel})"
        return (
            f"Trajectory({len(self)} of {self.capacity} snapshots, numel={self.numel}, "
            f"dtype={dtype_name(self.dtype)}, device={self.device}"
            f"{'' if self.storage == 'device' else f', storage={self.storage}'})"
        )

    @property
    def anchor(self) -> Tensor | None:
        """The anchor, (n,) float32 (float64 for float64 snapshots); None before the first one."""
        return self._anchor

    @property
    def snapshots(self) -> Matrix:
        """The stored deltas X, shape (T, n): a view.

        On disk, and for parameters on CUDA in host memory, an array that reads what it is asked
        for: ``snapshots[t]`` is a row, ``snapshots[:, a:b]`` some columns, each a copy on the
        parameters' device. In 8 bits too: what is read is float32, ``snapshots.codes`` and
        ``snapshots.scale`` are what is stored.
        """
        return self._store.snapshots()

    @property
    def gram(self) -> Tensor:
        """K = X X^T of the stored rows, shape (T, T), float64: a copy."""
        return self._store.gram().clone()

    @property
    def cost(self) -> RecordingCost:
        """Snapshots, seconds, bytes read and bytes written of the recording so far."""
        return self._store.cost

    def close(self) -> None:
        """Gives a folder back, so that it can be loaded again. Nothing is lost."""
        self._store.close()

    def record(self) -> int:
        """Stores the current parameters as one more snapshot.

        Returns
        -------
        int
            Its index.

        Raises
        ------
        ValueError
            The trajectory is full; a parameter changed its shape or device since the trajectory
            was made; a delta is NaN or Inf. The trajectory is then as it was before.
        """
        return self._record(self.params)

    def _record(self, params: Sequence[Tensor]) -> int:
        """`record` of other tensors of the same shapes."""
        index = len(self)
        if index == self.capacity:
            raise ValueError(
                f"the trajectory is full: it holds {self.capacity} snapshots, its capacity; a "
                "larger capacity takes more"
            )
        check_current(self, params)
        anchor = (
            self._anchor if self._anchor is not None else flatten(params, wide_dtype(self.dtype))
        )
        before, self._anchor = self._anchor, anchor
        try:
            if not self._store.append(params, anchor):
                raise ValueError(why_not_finite(self, params, anchor))
        finally:
            if len(self) == 0:
                self._anchor = before
        return index

    def explained_variance_ratio(self) -> Tensor:
        """Share of the variance along each principal direction, shape (rank,), float64, descending.

        On the CPU. From the Gram matrix alone, hence cheap at any time during training; directions
        below 2^-22 of the largest (2^-44 for float64 snapshots) are not told from its rounding.

        Raises
        ------
        ValueError
            Fewer than two snapshots.
        """
        self._check_length()
        found = stored_spectrum(self.gram, self.dtype)
        return found.explained(found.rank)

    @overload
    def subspace(
        self, dim: int | str | None = ..., *, materialize: Literal[True] = ...,
        explained: float | None = ..., start: str | int = ..., center: bool = ...,
        dtype: torch.dtype | None = ...,
    ) -> Subspace: ...  # fmt: skip
    @overload
    def subspace(
        self, dim: int | str | None = ..., *, materialize: Literal[False],
        explained: float | None = ..., start: str | int = ..., center: bool = ...,
        dtype: torch.dtype | None = ...,
    ) -> ImplicitSubspace: ...  # fmt: skip
    def subspace(
        self,
        dim: int | str | None = None,
        *,
        explained: float | None = None,
        start: str | int = "first",
        center: bool = True,
        dtype: torch.dtype | None = None,
        materialize: bool = True,
    ) -> Subspace | ImplicitSubspace:
        """The principal directions of the trajectory.

        Parameters
        ----------
        dim : int or "auto", optional
            Number of directions, at most T - 1 (T if not centred). Default: 40, or as many as
            there are. "auto": as many as the spectrum speaks for beside that of a random walk of
            T snapshots, 8 or more: see docs/trajectories.md.
        explained : float in (0, 1], optional
            Instead of ``dim``: as many directions as explain this share of the variance.
        start : "first", "last", "mean" or int
            The snapshot that theta = 0 stands for. It is rebuilt from the anchor and the stored
            delta, hence rounded to ``dtype`` in what it differs from the anchor.
        center : bool
            Subtract the mean of the snapshots, as a principal component analysis does.
        dtype : torch.dtype, optional
            Of the basis: any that snapshots may have. Default: theirs.
        materialize : bool
            False: no basis is stored, the snapshots stand in for it: see `ImplicitSubspace`. For
            snapshots in the memory that the parameters are in.

        Returns
        -------
        Subspace, or ImplicitSubspace unless materialised
            Signs are such that the largest entry, by magnitude, of each eigenvector over the
            snapshots is positive.

        Raises
        ------
        ValueError
            Fewer than two snapshots; ``dim`` out of range, or together with ``explained``; all
            snapshots the same.

        Warns
        -----
        UserWarning
            ``dim`` is above the numerical rank: the directions up to the rank are returned.
            "auto" finds nothing but noise: one direction is returned.
        """
        form: Callable[..., Any] = dense if materialize else implicit(self, dtype)
        return principal_of(self, form, dim, explained, start, center, dtype)

    into_subspace = into_subspace

    def grouped_subspace(
        self,
        groups: Sequence[int],
        dim: int | str | None = None,
        *,
        explained: float | None = None,
        start: str | int = "first",
        center: bool = True,
        dtype: torch.dtype | None = None,
    ) -> GroupedSubspace:
        """The principal directions of each of several groups of parameters.

        Parameters
        ----------
        groups : sequence of int
            The number of parameters in each group: see `layer_groups`.
        dim, explained
            As in `subspace`, for each group; a group of lower rank has fewer directions.
        start, center, dtype
            As in `subspace`.

        Raises
        ------
        ValueError
            As in `subspace`, and for ``groups`` that are not all parameters.
        """
        count, dtype, origin = self._asked(dim, explained, start, center, dtype)
        parts = group_slices(groups, len(self.params))
        spaces, end = [], 0
        for i, part in enumerate(parts):
            begin, end = end, end + numel(self.params[part])
            try:
                one = principal_subspace(
                    columns(self.snapshots, begin, end),
                    None,
                    origin[begin:end],
                    dtype,
                    dense,
                    double=self._double(),
                    center=center,
                    most=count,
                    dim=dim,
                    explained=explained,
                    stacklevel=3 if dim == "auto" else 0,
                    shapes=self.shapes[part],
                    names=None if self.names is None else self.names[part],
                )
            except ValueError as error:
                raise ValueError(f"groups[{i}]: {error}") from None
            spaces.append(one)
        return GroupedSubspace(spaces)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the trajectory as a safetensors file; an earlier file is replaced at the end.

        Raises
        ------
        ValueError
            Nothing was recorded.
        """
        if len(self) == 0 or self._anchor is None:
            raise ValueError("the trajectory is empty: nothing to save")
        save_trajectory(path, self._metadata(), self.snapshots, self.gram, self._anchor)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], params: Iterable[Any], *, process_group: Any = None
    ) -> Trajectory:
        """Loads a saved trajectory onto ``params``, to go on with it as if never interrupted.

        Parameters
        ----------
        path : path
            A file that `save` has written, or the folder of a trajectory that was recorded with
            ``storage="disk"``: every snapshot in it is read and checked once.
        params : iterable of Tensor
            As in the constructor: the same shapes (and names, where both are known) in the same
            order. Their values do not matter.
        process_group : ProcessGroup, DeviceMesh, module, "world" or None
            As in the constructor: any number of ranks for a file, and for a folder as many as
            recorded to it.

        Raises
        ------
        ValueError
            The file is truncated, corrupt or something else; the parameters do not match; another
            trajectory has the folder open.

        Warns
        -----
        UserWarning
            A snapshot in the folder is not whole: it is left out.
        """
        if process_group is not None:
            from .stores.sharded import SharedTrajectory

            return SharedTrajectory.opened(path, params, process_group)
        found = load_trajectory(path, params)
        result = cls.__new__(cls)
        result._describe(found.params, found.capacity, found.dtype)
        result.names, result.storage = found.names, found.storage
        result._anchor, result._store = found.anchor, found.store
        return result

    from_checkpoints = classmethod(from_checkpoints)

    def _check_length(self) -> None:
        if len(self) < 2:
            raise ValueError(
                f"expected at least two snapshots, the trajectory holds {len(self)}: call record()"
            )

    def _asked(
        self,
        dim: int | str | None,
        explained: float | None,
        start: str | int,
        center: bool,
        dtype: torch.dtype | None,
    ) -> tuple[int, torch.dtype, Tensor]:
        """The most directions that were asked for, the dtype of the basis and the origin."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in STORED:
            raise ValueError(f"dtype: expected one of {dtype_names(STORED)}, got {dtype}")
        self._check_length()
        count = asked_count(len(self), dim, explained, center)
        assert self._anchor is not None
        return count, dtype, weights_at(self.snapshots, self._anchor, start).to(wide_dtype(dtype))

    def _double(self) -> bool:
        """Whether neither the weights nor the snapshots were ever rounded to less than float64."""
        return all(
            dtype == torch.float64 for dtype in (self.dtype, *(p.dtype for p in self.params))
        )
