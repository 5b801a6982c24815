"""Trajectories of which every rank keeps some columns: `Trajectory` with ``process_group``."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...collectives.dtensors import entries
from ...collectives.partition import Layout, Share, stand_ins
from ...collectives.process_group import Ranks, listed, together
from ...collectives.transaction import all_or_none
from ...distributed.local import LocalSubspace
from ...distributed.sharded import ShardedSubspace
from ...pca.dimension import choose
from ...pca.form_basis import formed
from ...pca.gram import column_step, exact_gram
from ...pca.spectrum import Spectrum, coefficients, exact_spectrum, square_of
from ...tensors.formats import wide_dtype
from ...tensors.parameters import check_matches, dtype_name, flatten
from ..checks import check_current, given_anchor
from ..files import _told, open_file, open_folder, write_file
from ..trajectory import Trajectory
from . import DiskStore, Store, check_storage
from .disk import RANK_FOLDERS

_MARKS = 16  # parameters of which two elements are compared at each record


class SharedTrajectory(Trajectory):
    """A trajectory over several ranks, which all make the same calls.

    Each rank records its columns as a `Trajectory` of its own; sums over the ranks are added in
    their order, in float64. An error on one rank is raised on all, and nothing is recorded then.

    Attributes
    ----------
    ranks : Ranks
    share : Share
        The columns of this rank.
    """

    _inner: Piece | None
    _rows: list[Tensor]  # of the lower half of the Gram matrix

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
        self._join(params, process_group)
        with self.ranks.agreeing():
            self._describe(self._listed, capacity, dtype)
            check_storage(storage, path)
            self.storage = storage
            self.share = Share(self.params, self.names, self.ranks.rank, self.ranks.size)
            self._store = NoColumns(self)
            given = None if anchor is None else self._own_anchor(anchor)
            self.ranks.agree({**self._claims(), "anchor": anchor is not None})
        run = self.ranks.exchange({"run": secrets.token_hex(8)}, "construction")[0]["run"]
        with self.all_or_none("construction", self.close):
            folder = None if path is None else rank_folder(path, self.ranks)
            self._inner = self.piece(folder, given, {"run": run, "ranks": self.ranks.size})
            self._store = self._store if self._inner is None else self._inner._store
        self._anchor = given

    @classmethod
    def opened(
        cls, path: str | os.PathLike[str], params: Iterable[Any], process_group: Any
    ) -> SharedTrajectory:
        """`Trajectory.load`: a file of any number of ranks, or a folder of as many as here."""
        self = cls._of(params, process_group)
        (open_folder if os.path.isdir(path) else open_file)(self, path)
        return self

    @classmethod
    def of_parts(cls, part: Trajectory | None, params: Iterable[Any]) -> SharedTrajectory:
        """Of trajectories that each rank recorded of its local shards; None where it has none."""
        params = listed(params)
        mesh = getattr(entries(params)[0][0], "device_mesh", None)
        if mesh is None:
            raise ValueError("params[0]: expected a DTensor (fully_shard), got a plain tensor")
        self = cls._of(params, mesh)
        join_parts(self, part)
        return self

    @classmethod
    def _of(cls, params: Iterable[Any], process_group: Any) -> SharedTrajectory:
        self = object.__new__(cls)
        self._join(params, process_group)
        with self.ranks.agreeing():
            self._describe(self._listed, 1, torch.float32)  # until somebody has told
            self.share = Share(self.params, self.names, self.ranks.rank, self.ranks.size)
            shapes = [str(shape) for shape in self.shapes]
            self.ranks.agree({"params": shapes, "names": self.names}, "load")
        self._store = NoColumns(self)
        return self

    @property
    def snapshots(self) -> Any:
        """The stored deltas, shape (T, columns of this rank): see `Trajectory.snapshots`."""
        return self._store.snapshots()

    @property
    def gram(self) -> Tensor:
        """K, shape (T, T), float64, of all columns: the same bits on every rank.

        With ``storage="disk"``, and "host" for parameters on CUDA, every rank must ask for it.
        """
        self._complete_gram()
        if not self._rows:
            return torch.zeros((0, 0), dtype=torch.float64, device=self.device)
        lower = pad_sequence(self._rows, batch_first=True)
        return lower + lower.tril(-1).T

    def _record(self, params: Sequence[Tensor]) -> int:
        index = len(self)
        with self.all_or_none("record", self._undo, self._mark(params)):
            if index == self.capacity:
                raise ValueError(
                    f"the trajectory is full: it holds {index} snapshots, its capacity"
                )
            check_current(self, params)
            if self._inner is not None:
                self._inner._record(self.share.own(params))
            else:
                self._store.length += 1
                self._anchor = self.no_columns()
        self.take_over()
        return index

    def subspace(  # type: ignore[override]
        self,
        dim: int | str | None = None,
        *,
        explained: float | None = None,
        start: str | int = "first",
        center: bool = True,
        dtype: torch.dtype | None = None,
        materialize: bool = True,
    ) -> ShardedSubspace | LocalSubspace:
        """The principal directions, each rank with its columns: see `Trajectory.subspace`.

        The T x T problem is solved by rank 0 for all.

        Returns
        -------
        ShardedSubspace
            Of whole parameters; its ``whole()`` is a `Subspace`.
        LocalSubspace
            Of DTensors.
        """
        asked = {"dim": dim, "explained": explained, "start": start, "center": center}
        with self.all_or_none("subspace"):
            if not materialize:
                raise ValueError("materialize: expected True for a trajectory of ranks, got False")
            most, dtype, origin = self._asked(dim, explained, start, center, dtype)
        told = {key: str(value) for key, value in asked.items()}
        self.ranks.agree({**told, "dtype": dtype_name(dtype)}, "subspace")
        found = self._spectrum(origin, center)
        count, facts, warning = choose(found, len(self), most, dim, explained, center)
        if warning is not None:
            warnings.warn(warning, UserWarning, stacklevel=2)
        basis, scale = torch.empty((count, 0), dtype=dtype, device=self.device), None
        if self.share.numel:
            rows, combine = self.snapshots, coefficients(found, count, center=center)
            basis, scale = formed(rows, combine.to(self.device), dtype, column_step(rows))
        known: dict[str, Any] = {
            "scale": scale,
            "explained_variance_ratio": found.explained(count),
            "singular_values": found.values[:count].sqrt(),
            "choice": facts,
        }
        if self.share.mesh is None:
            known |= {"shapes": self.shapes, "names": self.names}
            return ShardedSubspace.of_columns(basis, origin, self.share.total, self.ranks, **known)
        known |= {"shapes": self.share.shapes, "names": self.share.names}
        group, replicas = self.ranks.group, self.share.replicas
        result = LocalSubspace(basis, origin, group, replicas=replicas, **known)
        result.layout = Layout(self.share.runs, self.shapes)
        return result

    def _spectrum(self, origin: Tensor, center: bool) -> Spectrum:
        """Of all columns; the same bits on every rank."""
        count = len(self)
        gram = torch.zeros((count, count), dtype=torch.float64, device=self.device)
        if self.share.numel:
            gram += exact_gram(self.snapshots)
        gram = self._sum(gram)
        square = self._sum(square_of(origin)[None])
        flat = torch.empty(count * (count + 1) + 1, dtype=torch.float64, device=self.device)
        with self.all_or_none("the eigenvalues"):
            if self.ranks.rank == 0:
                found = exact_spectrum(gram, self._double(), square.sqrt(), center=center)
                rank = torch.tensor([found.rank], dtype=torch.float64)
                flat.copy_(torch.cat([found.values, found.vectors.reshape(-1), rank]))
        values, vectors, rank = (
            self.ranks.from_first(flat, "the eigenvectors").cpu().split([count, count * count, 1])
        )
        return Spectrum(values, vectors.view(count, count), int(rank))

    def grouped_subspace(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: each group would have ranks without columns."""
        raise ValueError(
            "process_group: expected a trajectory of one process, got one whose columns are on "
            "several ranks; save it, and load it on one process for a GroupedSubspace"
        )

    def into_subspace(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: `subspace` makes the columns of each rank beside its snapshots."""
        raise ValueError("into_subspace: expected a trajectory of one process, got one of ranks")

    def save(self, path: str | os.PathLike[str]) -> None:
        """One file, as one process saves it: written by rank 0, a piece of a row at a time.

        One process, or any number of ranks, can load it.
        """
        with self.all_or_none("save"):
            if len(self) == 0:
                raise ValueError("the trajectory is empty: nothing to save")
            if self.dtype.itemsize == 1:
                raise ValueError(
                    f"save: expected snapshots of 16 bits or more, got {dtype_name(self.dtype)}: "
                    "their blocks are those of this cut; a folder (storage='disk') keeps them"
                )
        gram = self.gram
        with self.all_or_none("save"):
            write_file(path, self, gram)

    def take(self, inner: Piece | None, store: Store, anchor: Tensor | None) -> None:
        """Records on in ``inner``, whose rows are in ``store``."""
        self._inner, self._store, self._anchor = inner, store, anchor

    def take_nothing(self, length: int) -> None:
        """Counts on: this rank has no columns of the snapshots so far."""
        self._store = NoColumns(self)
        self._store.length = length
        self._anchor = self.no_columns()

    def take_gram(self, gram: Tensor) -> None:
        """Of all columns and all snapshots so far."""
        gram = gram.to(self.device)
        self._rows = [gram[t, : t + 1] for t in range(len(gram))]

    def close(self) -> None:
        """Gives the folder of this rank back."""
        if self._inner is not None:
            self._inner.close()

    @property
    def local(self) -> Trajectory:
        """What this rank records; where it has no columns, this one itself."""
        return self if self._inner is None else self._inner

    def take_over(self) -> None:
        """Counts what was recorded in `local`, on all ranks."""
        self._anchor = self.local._anchor
        if self._at_once:
            self._complete_gram()

    def _join(self, params: Iterable[Any], process_group: Any) -> None:
        self._listed = listed(params)
        ranks = together("Trajectory", process_group, self._listed)
        assert ranks is not None
        self.ranks = ranks
        self._rows = []
        self._inner = None
        self._anchor: Tensor | None = None

    def _claims(self) -> dict[str, Any]:
        known = {key: str(value) for key, value in self._metadata().items()}
        sharded = "sharded" if self.share.mesh is not None else "whole"
        return {**known, "storage": self.storage, "parameters": sharded}

    def _own_anchor(self, anchor: Tensor | Sequence[Tensor]) -> Tensor:
        if self.share.mesh is None:
            flat = given_anchor(self, anchor)
            return torch.cat([flat[:0], *(flat[begin:end] for begin, end in self.share.runs)])
        if isinstance(anchor, Tensor):
            raise ValueError("anchor: expected a list of DTensors, as params, got one tensor")
        own = self.share.own(list(anchor))
        check_matches(own, self.share.shapes, self.share.names, "local shards", "anchor")
        return flatten(own, wide_dtype(self.dtype))

    def piece(
        self, folder: Path | None, anchor: Tensor | None, part: dict[str, Any]
    ) -> Piece | None:
        """What this rank records; None where it has no columns."""
        if not self.share.numel:
            return None
        storage = "disk" if folder is not None else self.storage
        return Piece(self.own_params(), self.capacity, self.dtype, storage, folder, anchor, part)

    def own_params(self) -> list[Any]:
        tensors = stand_ins(self.share.shapes, self.params[0].dtype, self.device)
        names = self.share.names
        return tensors if names is None else list(zip(names, tensors, strict=True))

    @property
    def _at_once(self) -> bool:
        """Whether the Gram matrix grows with each snapshot, on every rank."""
        return self.storage == "device" or (self.storage == "host" and self.device.type == "cpu")

    def no_columns(self) -> Tensor:
        return torch.empty(0, dtype=wide_dtype(self.dtype), device=self.device)

    def _complete_gram(self) -> None:
        first, count = len(self._rows), len(self)
        if first < count:
            rows = self._sum(self._store.gram()[first:])
            self._rows += [rows[t - first, : t + 1] for t in range(first, count)]

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.ranks.ordered_sum(tensor, "products").div_(self.share.replicas)

    def _mark(self, params: Sequence[Tensor]) -> int:
        """Of whole weights a few bits, by which ranks notice that theirs are not the same."""
        if self.share.mesh is not None:
            return 0
        step = -(-len(params) // _MARKS)
        some = [
            p.detach()[(i,) * p.ndim].to(torch.float64)
            for p in params[::step]
            for i in (0, -1)
            if p.numel()
        ]
        return int(torch.stack(some).view(torch.int64).sum()) if some else 0

    def _undo(self) -> None:
        """Forgets the snapshot that another rank could not record."""
        self._store.undo()
        if len(self) == 0 and self._inner is not None:
            self._inner._anchor = self._inner.given
            self._anchor = self._inner.given

    def all_or_none(
        self, what: str, undo: Callable[[], None] | None = None, mark: int = 0
    ) -> AbstractContextManager[None]:
        """An error on one rank is raised on every one: see `_agreement.all_or_none`."""
        return all_or_none(self.ranks, what, lambda: len(self), undo, mark)


class Piece(Trajectory):
    """The columns of one rank.

    Attributes
    ----------
    given : Tensor or None
        The anchor before the first snapshot.
    """

    given: Tensor | None = None

    def __init__(
        self,
        params: list[Any],
        capacity: int,
        dtype: torch.dtype,
        storage: str,
        path: Path | None,
        anchor: Tensor | None,
        part: dict[str, Any],
    ) -> None:
        self._part, self.given = part, anchor
        super().__init__(params, capacity, dtype, storage, path, anchor=anchor)

    @classmethod
    def opened(cls, folder: Path, params: list[Any]) -> Piece:
        """What was recorded to the folder of this rank."""
        found = cls.load(folder, params)
        assert isinstance(found, Piece)
        return found

    @property
    def disk(self) -> DiskStore:
        """Its store, in a folder."""
        assert isinstance(self._store, DiskStore)
        return self._store

    def _metadata(self) -> dict[str, Any]:
        return {**super()._metadata(), "part": self._part}


class NoColumns(Store):
    """The store of a rank that has no columns: it counts."""

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__(0, trajectory.capacity, trajectory.dtype, trajectory.device)

    def snapshots(self) -> Tensor:
        return torch.empty((self.length, 0), dtype=self.dtype, device=self.device)

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        return True

    def gram(self) -> Tensor:
        self._make_room(self.length)
        return super().gram()


def rank_folder(path: str | os.PathLike[str], ranks: Ranks) -> Path:
    """The one of this rank in the folder of all."""
    end = f"-of-{ranks.size:05}"
    wrong = sorted(one.name for one in Path(path).glob(RANK_FOLDERS) if not one.name.endswith(end))
    if wrong:
        raise ValueError(
            f"path: expected a folder of {ranks.size} ranks, as there are, got {path} with "
            f"{wrong[0]}; a file (save) can be loaded on any number of ranks"
        )
    return Path(path, f"rank-{ranks.rank + 1:05}{end}")


def join_parts(trajectory: SharedTrajectory, part: Trajectory | None) -> None:
    """Takes over what each rank recorded of its own."""
    self, claims = trajectory, {}
    if part is not None:
        claims = {
            "length": len(part),
            "capacity": part.capacity,
            "dtype": dtype_name(part.dtype),
            "storage": part.storage,
        }
    with self.all_or_none("from_trajectory"):
        if part is not None and part.numel != self.share.numel:
            raise ValueError(
                f"trajectory: expected one of the {self.share.numel} weights of the local shards, "
                f"got {part.numel}"
            )
        if part is None and self.share.numel:
            raise ValueError("trajectory: expected one, for this rank has weights, got None")
    found = _told(self, claims, tuple(claims), "a trajectory of the same snapshots on every rank")
    self.storage = found[0]["storage"]
    if part is None:
        self.take_nothing(found[0]["length"])
    else:
        self.take(None, part._store, part.anchor)
