"""Recorded training trajectories and their principal directions (DLDR, arXiv:2103.11154)."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..collectives.partition import ColumnShard
from ..collectives.process_group import Ranks, as_list, failing_together, ranks_for
from ..distributed.local import LocalSubspace
from ..distributed.sharded import ShardedSubspace
from ..pca.dimension import Request
from ..pca.spectrum import stored_spectrum
from ..reporting.notebook import Shown, View
from ..subspace.dense import Subspace
from ..subspace.grouped import GroupedSubspace
from ..subspace.implicit import ImplicitSubspace
from ..tensors.formats import wide_dtype
from ..tensors.matrices import Matrix
from ..tensors.parameters import dtype_name, named_parameters, numel
from ..tensors.watch import Watch
from . import files, principal, shown
from .checks import (
    check_device,
    check_in_memory,
    checked_capacity,
    checked_dtype,
    flat_anchor,
    why_not_finite,
)
from .from_checkpoints import (
    Progress,
    checked_options,
    open_series,
    placeholder,
    ranks_of_model,
    record_checked,
    was_recorded_to,
)
from .recorder import OnFull, Recorder
from .stores import (
    RecordingCost,
    ShardedStore,
    Store,
    StoreSpec,
    check_storage,
    new_store,
)


class Trajectory(Shown):
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

    See Also
    --------
    Subspace.from_snapshots : For weights that were kept by other means.
    Trajectory.from_checkpoints : For checkpoints that a run left behind.

    References
    ----------
    Li, Tan, Huang, Tao, Liu, Huang, "Low Dimensional Trajectory Hypothesis is True: DNNs Can Be
    Trained in Tiny Subspaces", IEEE TPAMI 2022 (arXiv:2103.11154), algorithm 1.

    Examples
    --------
    Ten steps of gradient descent, and the few directions that they went along:

    >>> import torch
    >>> from dldr_ext import Trajectory
    >>> _ = torch.manual_seed(0)
    >>> model, inputs = torch.nn.Linear(8, 1), torch.randn(64, 8)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> trajectory = Trajectory(model.named_parameters(), capacity=20, dtype=torch.float32)
    >>> first = trajectory.record()
    >>> recorder = trajectory.attach(optimizer, every=1)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
    ...     optimizer.step()
    >>> trajectory
    Trajectory(11 of 20 snapshots, numel=9, dtype=float32, device=cpu)
    >>> trajectory.subspace(dim=3)
    Subspace(dim=3, numel=9, dtype=float32, device=cpu)

    Notes
    -----
    A stored row is ``round_to(dtype, w_t - a)``, computed in float32 (float64 for float64
    snapshots). The Gram matrix is that of the stored rows and grows with each snapshot in the
    same pass over memory.
    """

    _borrowed: Sequence[weakref.ref[Tensor]] = ()  # rows that implicit subspaces read

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
        params = as_list(params)
        ranks = _ranks(params, process_group)
        with failing_together(ranks):
            shard = self._set_parameters(params, ranks)
            self.capacity = checked_capacity(capacity)
            self.dtype = checked_dtype(dtype)
            check_storage(storage, path)
            self.storage = storage
            flat = None if anchor is None else flat_anchor(self, anchor, shard)
            if ranks is not None and shard is not None:
                ranks.check_consistent({**self._facts(shard), "anchor": anchor is not None})
        spec = StoreSpec(self.numel, self.capacity, dtype, self.device)
        self._kept: Store | None = new_store(
            storage, path, spec, self._metadata(), flat, ranks, shard
        )

    def _set_parameters(self, params: Iterable[Any], ranks: Ranks | None) -> ColumnShard | None:
        self.params, self.names = named_parameters(params)
        self._watch = Watch(params, self.params, self.names, "trajectory")
        self.shapes = [tuple(p.shape) for p in self.params]
        self.numel = numel(self.params)
        self.device = self.params[0].device
        if self.numel == 0:
            raise ValueError("params: expected at least one element, got tensors of size 0")
        if ranks is None:
            return None
        return ColumnShard(self.params, self.names, ranks.rank, ranks.size)

    def _metadata(self) -> dict[str, Any]:
        return {
            "shapes": self.shapes,
            "names": self.names,
            "dtype": dtype_name(self.dtype),
            "capacity": self.capacity,
        }

    def _facts(self, shard: ColumnShard) -> dict[str, Any]:
        """Return what must be the same on every rank."""
        facts = {key: str(value) for key, value in self._metadata().items()}
        sharded = "sharded" if shard.mesh is not None else "whole"
        return {**facts, "storage": self.storage, "parameters": sharded}

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled; in a copy that is made with them they live on.
        return {
            **self.__dict__,
            "_borrowed": [rows for ref in self._borrowed if (rows := ref()) is not None],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._borrowed = [weakref.ref(rows) for rows in state["_borrowed"]]

    @property
    def _store(self) -> Store:
        if self._kept is None:
            raise ValueError(
                "the trajectory is consumed: into_subspace() has overwritten its snapshots with "
                "the basis; record another one, or keep the snapshots with subspace()"
            )
        return self._kept

    def __len__(self) -> int:
        """Return the number of snapshots, T."""
        return self._store.length

    def __repr__(self) -> str:
        if self._kept is None:
            return f"Trajectory(consumed, numel={self.numel})"
        return (
            f"Trajectory({len(self)} of {self.capacity} snapshots, numel={self.numel}, "
            f"dtype={dtype_name(self.dtype)}, device={self.device}"
            f"{'' if self.storage == 'device' else f', storage={self.storage}'})"
        )

    @property
    def anchor(self) -> Tensor | None:
        """The anchor, (n,) float32 (float64 for float64 snapshots); None before the first one."""
        return None if self._kept is None else self._kept.anchor

    @property
    def snapshots(self) -> Matrix:
        """The stored deltas X, shape (T, n): a view.

        On disk, and for parameters on CUDA in host memory, an array that reads what it is asked
        for: ``snapshots[t]`` is a row, ``snapshots[:, a:b]`` some columns, each a copy on the
        parameters' device. In 8 bits too: what is read is float32, ``snapshots.codes`` and
        ``snapshots.scale`` are what is stored. Over ranks (T, columns of this rank).
        """
        return self._store.snapshots()

    @property
    def gram(self) -> Tensor:
        """K = X X^T of the stored rows, shape (T, T), float64: a copy.

        Over ranks it is that of all columns, the same bits on every rank; with ``storage="disk"``,
        and "host" for parameters on CUDA, every rank must ask for it.
        """
        return self._store.gram().clone()

    @property
    def cost(self) -> RecordingCost:
        """Snapshots, seconds, bytes read and bytes written of the recording so far."""
        return self._store.cost

    def close(self) -> None:
        """Give a folder back, so that it can be loaded again. Nothing is lost."""
        if self._kept is not None:
            self._kept.close()

    def record(self) -> int:
        """Store the current parameters as one more snapshot.

        Returns
        -------
        int
            Its index.

        Raises
        ------
        ValueError
            The trajectory is full; a parameter was replaced, added, frozen, unfrozen, resized or
            moved since the trajectory was made; a delta is NaN or Inf. The trajectory is then as it
            was before.
        """
        store, index = self._store, len(self)
        with store.transaction("record", self.params):
            if index == self.capacity:
                raise ValueError(
                    f"the trajectory is full: it holds {self.capacity} snapshots, its capacity; a "
                    "larger capacity takes more"
                )
            self._watch.check()
            check_device(self, self.params)
            if not store.append(self.params):
                params, names = store.local_part(self.params, self.names)
                raise ValueError(why_not_finite(params, names, store.anchor, self.dtype))
        store.settle()
        return index

    def attach(self, optimizer: Any, every: int = 1, on_full: OnFull = "thin") -> Recorder:
        """Record after every ``every``-th step of an optimizer, from the next one on.

        Call `record` before it for a snapshot of the weights that training starts from. Steps that
        a GradScaler skips do not count.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            That trains parameters of the trajectory.
        every : int
        on_full : "thin", "stop" or "error"
            Once it is full: `thin` it and double the stride; record no more; or raise. Unless
            "error", recording never ends the training: a snapshot that is not finite is left out,
            and any other failure ends the recording, with a warning.

        Returns
        -------
        Recorder
            Its ``remove()`` ends the recording, ``every`` is the stride now.

        Raises
        ------
        TypeError, ValueError
            No optimizer, or one of other parameters; attached twice; a folder that is only read.
        """
        store = self._store
        with store.transaction("attach"):
            store.check_writable()
            self._watch.check()
            check_device(self, self.params)
            recorder = Recorder(self, optimizer, every, on_full)
        store.check_consistent({"every": every, "on_full": on_full}, "attach")
        recorder.attach()
        return recorder

    def thin(self) -> None:
        """Keep snapshots 0, 2, 4, ..., to the bit as if only these had been recorded."""
        self._store.thin(in_place=all(rows() is None for rows in self._borrowed))

    def explained_variance_ratio(self) -> Tensor:
        """Return the share of the variance along each principal direction.

        From the Gram matrix alone, hence cheap at any time during training; directions below 2^-22
        of the largest (2^-44 for float64 snapshots) are not told from its rounding.

        Returns
        -------
        Tensor, shape (rank,), float64 on the CPU
            Descending.

        Raises
        ------
        ValueError
            Fewer than two snapshots.
        """
        self._check_length()
        spectrum = stored_spectrum(self.gram, self.dtype)
        return spectrum.explained(spectrum.rank)

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
    ) -> Subspace | ImplicitSubspace | ShardedSubspace | LocalSubspace:
        """Return the principal directions of the trajectory.

        Parameters
        ----------
        dim : int or "auto", optional
            Number of directions, at most T - 1 (T if not centred). Default: 40, or as many as
            there are. "auto": as many as the spectrum speaks for beside that of a random walk of
            T snapshots, 8 or more: see docs/dimension.md.
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
            Over ranks a `ShardedSubspace` of whole parameters, a `LocalSubspace` of DTensors; the
            T x T problem is solved by rank 0 for all.
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
        store, request = self._store, Request(dim, explained, center)
        with store.transaction("subspace"):
            if not materialize:
                check_in_memory(store, self.storage, dtype, "materialize=False")
            dtype, origin = self._checked(request, start, dtype)
        options = {"dim": dim, "explained": explained, "start": start, "center": center}
        facts = {name: str(value) for name, value in options.items()}
        store.check_consistent({**facts, "dtype": dtype_name(dtype)}, "subspace")
        components = self._components(origin, request, start)
        described = self.shapes, self.names
        if isinstance(store, ShardedStore):
            return principal.subspace_over_ranks(store, components, origin, dtype, *described)
        if materialize:
            return principal.dense_subspace(self.snapshots, components, origin, dtype, *described)
        result = principal.implicit_subspace(self.snapshots, components, origin, *described)
        borrowed = [rows for rows in self._borrowed if rows() is not None]
        self._borrowed = [*borrowed, weakref.ref(result.snapshots)]
        return result

    def into_subspace(
        self,
        dim: int | str | None = None,
        *,
        explained: float | None = None,
        start: str | int = "first",
        center: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Subspace:
        """Return the principal directions, written over the snapshots: no second array.

        The first d rows of the snapshots' memory become the basis, chunk by chunk: to the bit that
        of `subspace`. The trajectory is consumed then, and whatever is asked of it an error; a view
        of ``snapshots`` that was kept shows the basis. The memory of the other rows stays in use as
        long as the basis does.

        Parameters
        ----------
        dim, explained, start, center
            As in `subspace`.
        dtype : torch.dtype, optional
            None or that of the snapshots, since the basis takes their place.

        Returns
        -------
        Subspace

        Raises
        ------
        ValueError
            As in `subspace`; for another dtype; for snapshots that are not in the memory that the
            parameters are in; while an `ImplicitSubspace` reads them. Nothing has changed then.
        """
        check_in_memory(self._store, self.storage, dtype, "into_subspace")
        if any(rows() is not None for rows in self._borrowed):
            raise ValueError(
                "into_subspace: expected snapshots that nothing else reads, got an implicit "
                "subspace (materialize=False) of them: delete it first, or use subspace()"
            )
        request = Request(dim, explained, center)
        _, origin = self._checked(request, start, dtype)
        components = self._components(origin, request, start)

        def consume() -> None:
            self._kept = None

        return principal.subspace_in_place(
            self.snapshots, components, origin, self.shapes, self.names, consume
        )

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
        """Return the principal directions of each of several groups of parameters.

        Parameters
        ----------
        groups : sequence of int
            The number of parameters in each group: see `layer_groups`.
        dim, explained
            As in `subspace`, for each group; a group of lower rank has fewer directions.
        start, center, dtype
            As in `subspace`.

        Returns
        -------
        GroupedSubspace

        Raises
        ------
        ValueError
            As in `subspace`, and for ``groups`` that are not all parameters.
        """
        if self._store.spans_ranks:
            raise ValueError(
                "process_group: expected a trajectory of one process, got one whose columns are on "
                "several ranks; save it, and load it on one process for a GroupedSubspace"
            )
        request = Request(dim, explained, center)
        dtype, origin = self._checked(request, start, dtype)
        result, notes = principal.grouped_subspace(
            self.snapshots, groups, origin, start, request, dtype, self.shapes, self.names,
            double=self._is_double(),
        )  # fmt: skip
        for note in notes if dim == "auto" else ():
            warnings.warn(note, UserWarning, stacklevel=2)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the trajectory as a safetensors file; an earlier file is replaced at the end.

        Over ranks it is one file too, as one process saves it: written by rank 0, and loaded by one
        process or any number of ranks.

        Parameters
        ----------
        path : path

        Raises
        ------
        ValueError
            Nothing was recorded; snapshots of 8 bits over ranks.
        """
        store = self._store
        with store.transaction("save"):
            if len(self) == 0:
                raise ValueError("the trajectory is empty: nothing to save")
            if store.spans_ranks and self.dtype.itemsize == 1:
                raise ValueError(
                    f"save: expected snapshots of 16 bits or more, got {dtype_name(self.dtype)}: "
                    "their blocks are those of this cut; a folder (storage='disk') keeps them"
                )
        store.gram()  # which the ranks complete together
        with store.transaction("save"):
            store.save(path, files.KIND, files.VERSION, self._metadata())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], params: Iterable[Any], *, process_group: Any = None
    ) -> Trajectory:
        """Load a saved trajectory onto ``params``, to go on with it as if never interrupted.

        Parameters
        ----------
        path : path
            A file that `save` has written, or the folder of a trajectory that was recorded with
            ``storage="disk"``: every snapshot in it is read and checked once. One that may not be
            written to, an archive or another user's run, is opened to read; `record` refuses.
        params : iterable of Tensor
            As in the constructor: the same shapes (and names, where both are known) in the same
            order. Their values do not matter.
        process_group : ProcessGroup, DeviceMesh, module, "world" or None
            As in the constructor: any number of ranks for a file, and for a folder as many as
            recorded to it.

        Returns
        -------
        Trajectory

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
        params = as_list(params)
        ranks = _ranks(params, process_group)
        result = cls.__new__(cls)
        with failing_together(ranks):
            shard = result._set_parameters(params, ranks)
            shapes = [str(shape) for shape in result.shapes]
            if ranks is not None:
                ranks.check_consistent({"params": shapes, "names": result.names}, "load")
        saved = files.load(path, result.params, result.names, ranks, shard)
        result.names, result.storage, result._kept = saved
        result.capacity, result.dtype = saved.store.capacity, saved.store.dtype
        return result

    @classmethod
    def from_checkpoints(
        cls,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        model: nn.Module,
        *,
        dtype: torch.dtype = torch.bfloat16,
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
        capacity: int | None = None,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        key: str | None = None,
        skip_bad: bool = False,
        resume: bool = False,
        progress: Progress | None = None,
        process_group: Any = None,
    ) -> Trajectory:
        """Record the checkpoints that a run left behind, streamed from their files.

        Parameters
        ----------
        paths : path or iterable of paths
            Files written by ``torch.save``, safetensors files, indices of shards; or folders of
            these, put in the order of their steps: see docs/checkpoints.md.
        model : nn.Module
            Names the parameters and their order: its trainable ones are recorded. May be on the
            meta device; its weights do not matter and stay as they are.
        dtype, storage, path
            As in the constructor.
        capacity : int, optional
            Default: the number of checkpoints.
        include, exclude : str or sequence of str
            Patterns of names (``encoder.*``) of the parameters to record, and of those not to.
        key : str, optional
            Where the state dict is in a file, nested keys joined by dots, or what precedes the
            names of its tensors. Default: it is found; a warning says what was passed over.
        skip_bad : bool
            Go on without checkpoints that cannot be used, with a warning for each.
        resume : bool
            With ``storage="disk"``: go on in the folder that an earlier call with the same
            checkpoints, interrupted, has left; the first and the latest one in it are compared.
        progress : callable, optional
            Called with the bytes read so far and in all (of this rank's columns).
        process_group : ProcessGroup, DeviceMesh, module, "world" or None
            As in the constructor. Each rank reads its own columns of every checkpoint; of a
            compressed file it also unpacks what is before them in each tensor.

        Returns
        -------
        Trajectory

        Raises
        ------
        checkpoints.CheckpointError
            A ValueError: missing, truncated, corrupt, not finite, or not of this model: with the
            index of the checkpoint, its path and the tensor.
        """
        ranks = None if process_group is None else ranks_of_model(process_group, model)
        with failing_together(ranks):
            params, series = open_series(paths, model, include, exclude, key, skip_bad)
            capacity = checked_options(series, capacity, resume, storage, path, ranks)
        named = [(name, placeholder(p)) for name, p in params.items()]
        if resume and path is not None and was_recorded_to(path, ranks):
            result = cls.load(path, named, process_group=process_group)
        else:
            result = cls(named, capacity, dtype, storage, path, process_group=process_group)
        result.params = list(params.values())
        result._watch = Watch(params.items(), result.params, list(params), "trajectory")
        try:
            record_checked(result._store, series, skip_bad, progress, dtype, capacity, result)
        except BaseException:
            result.close()
            raise
        for note in [*(f"left out {error}" for error in series.skipped), *series.decisions]:
            warnings.warn(note, UserWarning, stacklevel=2)
        return result

    def _check_length(self) -> None:
        if len(self) < 2:
            raise ValueError(
                f"expected at least two snapshots, the trajectory holds {len(self)}: call record()"
            )

    def _checked(
        self, request: Request, start: str | int, dtype: torch.dtype | None
    ) -> tuple[torch.dtype, Tensor]:
        """Return the dtype of the basis and the origin, if the request can be met."""
        dtype = checked_dtype(self.dtype if dtype is None else dtype)
        self._check_length()
        request.limit(len(self))
        assert self.anchor is not None
        return dtype, principal.weights_at(self.snapshots, self.anchor, start).to(wide_dtype(dtype))

    def _components(
        self, origin: Tensor, request: Request, start: str | int
    ) -> principal.Decomposition:
        double = self._is_double()
        found = principal.principal_components(self._store, origin, request, double=double)
        if found.warning is not None:
            warnings.warn(found.warning, UserWarning, stacklevel=3)
        return found.seen_from(start)

    def _view(self, at_once: bool) -> View:
        return shown.view_of(self, self._kept, at_once)

    def _is_double(self) -> bool:
        """Whether neither the weights nor the snapshots were ever rounded to less than float64."""
        dtypes = (self.dtype, *(p.dtype for p in self.params))
        return all(dtype == torch.float64 for dtype in dtypes)


def _ranks(params: Any, process_group: Any) -> Ranks | None:
    return None if process_group is None else ranks_for("Trajectory", process_group, params)
