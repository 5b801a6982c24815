"""Rows whose columns several ranks keep, each in a store of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from ...collectives.partition import ColumnShard, Run
from ...collectives.process_group import Ranks
from ...collectives.transaction import RankErrors, all_or_none
from ...files.artifacts import Stream, save
from ...pca.gram import exact_gram
from ...pca.spectrum import Spectrum
from ...tensors.matrices import Matrix
from .base import PIECE, RecordingCost, RowPieces, Store, uninterrupted
from .disk import RANK_FOLDERS

_SAMPLED = 16  # parameters of which two elements are compared at each record


class ShardedStore(Store):
    """The rows of which each rank keeps some columns; all ranks make the same calls.

    What is recorded counts on all ranks or on none; the Gram matrix is the sum of the ranks', added
    in their order, in float64.

    Parameters
    ----------
    ranks : Ranks
    shard : ColumnShard
        The columns of this rank.
    local : Store
        Where they are kept.
    at_once : bool
        Whether the Gram matrix grows with each row: the same on every rank.

    Attributes
    ----------
    ranks, shard
        As given.
    """

    spans_ranks = True

    def __init__(self, ranks: Ranks, shard: ColumnShard, local: Store, at_once: bool) -> None:
        self.ranks, self.shard, self.local = ranks, shard, local
        self._at_once = at_once
        self.numel, self.capacity = shard.numel, local.capacity
        self.dtype, self.device = local.dtype, local.device
        self._gram_rows: list[Tensor] = []  # of the lower half of the Gram matrix

    @property
    @override
    def length(self) -> int:  # type: ignore[override]
        """Number of rows, T."""
        return self.local.length

    @property
    @override
    def anchor(self) -> Tensor | None:  # type: ignore[override]
        """The columns of the anchor that are kept here."""
        return self.local.anchor

    @property
    @override
    def cost(self) -> RecordingCost:  # type: ignore[override]
        """The cost of recording on this rank."""
        return self.local.cost

    @override
    def append(self, params: Sequence[Tensor]) -> bool:
        return self.local.append(self.shard.local_part(params))

    @override
    def append_pieces(self, pieces: RowPieces) -> bool:
        return self.local.append_pieces(pieces)

    @override
    def undo(self) -> None:
        self.local.undo()
        del self._gram_rows[self.length :]

    @override
    def thin(self, in_place: bool = True) -> None:
        with self.transaction("thin"):
            self.local.gram()
        self._complete()
        with self.transaction("thin"):
            self.local.begin_thinning()
        with uninterrupted():
            self.local.finish_thinning(in_place)
            self._gram_rows = [row[::2] for row in self._gram_rows[::2]]

    @override
    def check_writable(self) -> None:
        self.local.check_writable()

    @override
    def snapshots(self) -> Matrix:
        return self.local.snapshots()

    @override
    def gram(self) -> Tensor:
        """Return K of all columns, shape (T, T): the same bits on every rank."""
        self._complete()
        if not self._gram_rows:
            return torch.zeros((0, 0), dtype=torch.float64, device=self.device)
        lower = pad_sequence(self._gram_rows, batch_first=True)
        return lower + lower.tril(-1).T

    def restore_gram(self, gram: Tensor) -> None:
        """Take over the Gram matrix of all columns and all rows so far."""
        gram = gram.to(self.device)
        self._gram_rows = [gram[t, : t + 1] for t in range(len(gram))]

    @override
    def close(self) -> None:
        self.local.close()

    @override
    def defer_products(self) -> None:
        self.local.defer_products()

    @override
    @contextmanager
    def transaction(
        self, what: str, params: Sequence[Tensor] = (), errors: RankErrors | None = None
    ) -> Iterator[None]:
        """Do what is inside on all ranks or on none.

        Parameters
        ----------
        what : str
            The call, for messages.
        params : sequence of Tensor
            Weights that are about to be recorded: the same on every rank.
        errors : RankErrors, optional
            How an error of one rank is told to the others.
        """
        length = self.length

        def undo() -> None:
            if self.length > length:
                self.undo()

        sample = 0 if self.shard.mesh is not None else _sample(params)
        with all_or_none(self.ranks, what, lambda: self.length, undo, sample, errors):
            yield

    @override
    def settle(self) -> None:
        if self._at_once:
            self._complete()

    @override
    def local_part(
        self, params: Sequence[Tensor], names: list[str] | None
    ) -> tuple[list[Tensor], list[str] | None]:
        return self.shard.local_part(params), self.shard.names

    @override
    def check_consistent(self, facts: Mapping[str, Any], what: str) -> None:
        self.ranks.check_consistent(dict(facts), what)

    @override
    def column_runs(self, begin: int, end: int) -> Iterator[tuple[slice, Run]]:
        return self.shard.global_runs(begin, end)

    @override
    def summed(self, tensor: Tensor) -> Tensor:
        return self.ranks.ordered_sum(tensor, "products").div_(self.shard.replicas)

    @override
    def solved_once(self, solve: Callable[[], Any]) -> Any:
        """Return the spectrum that rank 0 finds, on all ranks."""
        count = self.length
        flat = torch.empty(count * (count + 1) + 1, dtype=torch.float64, device=self.device)
        with self.transaction("the eigenvalues"):
            if self.ranks.rank == 0:
                solved = solve()
                rank = torch.tensor([solved.rank], dtype=torch.float64)
                flat.copy_(torch.cat([solved.values, solved.vectors.reshape(-1), rank]))
        self.ranks.broadcast_(flat, "the eigenvectors")
        values, vectors, rank = flat.cpu().split([count, count * count, 1])
        return Spectrum(values, vectors.view(count, count), int(rank))

    @override
    def exact_gram(self) -> Tensor:
        if self.numel:
            return self.summed(exact_gram(self.snapshots()))
        count = self.length
        return self.summed(torch.zeros((count, count), dtype=torch.float64, device=self.device))

    @override
    def save(
        self, path: str | os.PathLike[str], kind: str, version: int, metadata: Mapping[str, Any]
    ) -> None:
        """Write one file, as one process writes it: by rank 0, a piece of a row at a time."""
        rows, anchor, gram = self.snapshots(), self.anchor, self.gram()
        assert anchor is not None
        pieces = self._whole_rows(rows), self._whole_rows([anchor])
        n = self.shard.total
        tensors: dict[str, Tensor | Stream] = {
            "snapshots": Stream(rows.dtype, (len(rows), n), pieces[0]),
            "gram": gram,
            "anchor": Stream(anchor.dtype, (n,), pieces[1]),
        }
        try:
            if self.ranks.rank == 0:
                save(path, kind, version, tensors, {**metadata, "length": len(rows)})
        finally:  # all ranks take part to the end, errors or not
            for unwritten in pieces:
                for _ in unwritten:
                    pass

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        raise AssertionError("the local store appends")

    def _complete(self) -> None:
        first, count = len(self._gram_rows), self.length
        if first < count:
            rows = self.summed(self.local.gram()[first:])
            self._gram_rows += [rows[t - first, : t + 1] for t in range(first, count)]

    def _whole_rows(self, rows: Any) -> Iterator[Tensor]:
        """Yield pieces of the rows of all columns; on rank 0 alone with all their numbers."""
        for t in range(len(rows)):
            for begin in range(0, self.shard.total, PIECE):
                end = min(begin + PIECE, self.shard.total)
                row: Tensor = rows[t]
                piece = row.new_zeros(end - begin)
                for local, (low, high) in self.shard.local_runs(begin, end):
                    piece[low - begin : high - begin] = row[local]
                # As bytes, of which all ranks but those that keep the column have zeros.
                dist.reduce(
                    piece.view(torch.uint8), group_dst=0, op=dist.ReduceOp.MAX,
                    group=self.ranks.group,
                )  # fmt: skip
                yield piece


def rank_folder(path: str | os.PathLike[str], ranks: Ranks) -> Path:
    """Return the folder of this rank in the folder of all."""
    end = f"-of-{ranks.size:05}"
    other = sorted(f.name for f in Path(path).glob(RANK_FOLDERS) if not f.name.endswith(end))
    if other:
        raise ValueError(
            f"path: expected a folder of {ranks.size} ranks, as there are, got {path} with "
            f"{other[0]}; a file (save) can be loaded on any number of ranks"
        )
    return Path(path, f"rank-{ranks.rank + 1:05}{end}")


def _sample(params: Sequence[Tensor]) -> int:
    """Return a few bits of whole weights, by which ranks notice that theirs are not the same."""
    step = -(-len(params) // _SAMPLED) or 1
    elements = [
        p.detach()[(i,) * p.ndim].to(torch.float64)
        for p in params[::step]
        for i in (0, -1)
        if p.numel()
    ]
    return int(torch.stack(elements).view(torch.int64).sum()) if elements else 0
