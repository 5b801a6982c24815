"""What each rank has of a trajectory that several record, and how it comes back from the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._params import dtype_name
from ._ranks import Ranks
from ._saved import RANK_FOLDERS
from ._shared_file import read_file
from .stores import DiskStore, MemoryStore, Store
from .trajectory import Trajectory

if TYPE_CHECKING:
    from ._shared_trajectory import SharedTrajectory

__all__ = ["NoColumns", "Piece", "join_parts", "open_file", "open_folder", "rank_folder"]


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


def open_file(trajectory: SharedTrajectory, path: str | os.PathLike[str]) -> None:
    """Goes on from a file, of which each rank reads its columns."""
    self, first = trajectory, trajectory.ranks.rank == 0
    with self.all_or_none("load"):
        found = read_file(path, self.params, self.names, self.share, check=first)
        self.names, self.storage = found.names, "device"
        self.capacity, self.dtype = found.capacity, found.dtype
        inner = self.piece(None, found.anchor, {})
        store = NoColumns(self) if inner is None else inner._store
        if isinstance(store, MemoryStore):
            store.restore(len(found.gram))[0].copy_(found.rows)
        store.length = len(found.gram)
        self.take(inner, store, found.anchor)
        self.take_gram(found.gram)


def open_folder(trajectory: SharedTrajectory, path: str | os.PathLike[str]) -> None:
    """Goes on from the snapshots that all ranks have in their folders."""
    self = trajectory
    inner: Piece | None = None
    with self.all_or_none("load", self.close):
        if not any(Path(path).glob(RANK_FOLDERS)):
            raise ValueError(
                f"path: expected a folder that {self.ranks.size} ranks recorded to, got {path} "
                "without one for each rank"
            )
        folder = rank_folder(path, self.ranks)
        if self.share.numel:
            inner = Piece.opened(folder, self.own_params())
            self.take(inner, NoColumns(self), None)
    claims: dict[str, Any] = {}
    if inner is not None:
        claims = {
            "capacity": inner.capacity,
            "dtype": dtype_name(inner.dtype),
            "part": inner.disk.metadata.get("part"),
            "numbers": inner.disk.numbers,
        }
    found = _told(self, claims, ("capacity", "dtype", "part"), "folders of one recording")
    common = set.intersection(*(set(one["numbers"]) for one in found))
    self.storage = "disk"
    if inner is None:
        self.take_nothing(len(common))
        return
    after = max((number + 1 for one in found for number in one["numbers"]), default=0)
    inner.disk.keep(common, after)
    self.take(inner, inner.disk, inner._anchor)


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


def _told(
    self: SharedTrajectory, claims: dict[str, Any], keys: Sequence[str], expected: str
) -> list[dict[str, Any]]:
    """What the ranks with columns say, of which the keys are the same."""
    found = [one for one in self.ranks.exchange(claims, "load") if one]
    with self.all_or_none("load", self.close):
        for key in keys:
            if any(one[key] != found[0][key] for one in found):
                raise ValueError(f"expected {expected}, got {key}: {[one[key] for one in found]}")
    self.capacity = found[0]["capacity"]
    self.dtype = getattr(torch, found[0]["dtype"])
    return found
