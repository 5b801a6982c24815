"""Subspaces of replicated parameters, their basis cut by columns over the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._cut import cut
from ._cut_subspace import CutSubspace
from ._params import flatten
from ._ranks import Ranks, members
from ._rows import empty_rows
from ._sharding import checked_whole
from .subspace import Subspace


class ShardedSubspace(CutSubspace):
    """A basis cut over ranks that all hold the whole weights (plain data parallelism).

    Each rank keeps d n / size numbers. A gradient is reduced and scattered, a direction gathered:
    as many bytes as summing the gradient alone would move, half of what summing the gradient and
    the direction would. Gradients move in their own dtype where all have the same 16-bit one.

    Parameters
    ----------
    subspace : Subspace
        The whole one, on every rank; its columns are copied.
    process_group : ProcessGroup, DeviceMesh, module or "world"
    device : torch.device or str, optional
        Where the columns go, None: where the subspace is. So a basis too large for a GPU comes
        from the host's memory.

    Attributes
    ----------
    local : Subspace or None
        The columns of this rank.
    origin : Tensor, shape (n,)
        Whole, on every rank.
    """

    def __init__(
        self, subspace: Subspace, process_group: Any, *, device: torch.device | str | None = None
    ) -> None:
        subspace = checked_whole("ShardedSubspace", subspace)
        group, _ = members("ShardedSubspace", process_group)
        origin = subspace.origin.to(subspace.device if device is None else device)
        ranks = Ranks("ShardedSubspace", group, origin.device)
        begin, end = cut(subspace.numel, ranks.rank, ranks.size)
        local = None
        if begin < end:
            scale = subspace.scale
            if scale is not None:
                scale = scale[:, begin // ops.SCALE_BLOCK : -(-end // ops.SCALE_BLOCK)].to(
                    origin.device
                )
            columns = subspace.basis[:, begin:end].contiguous()
            columns = columns.clone() if columns is subspace.basis else columns
            local = Subspace(columns.to(origin.device), origin[begin:end], scale=scale)
        super().__init__(subspace.dim, local, ranks)
        self._basis = subspace.basis.new_empty(subspace.dim, 0)
        self.origin = origin
        self.shapes, self.names = subspace.shapes, subspace.names
        self.explained_variance_ratio = subspace.explained_variance_ratio
        self.singular_values = subspace.singular_values
        self.choice = subspace.choice

    @classmethod
    def of_columns(
        cls, basis: Tensor, origin: Tensor, numel: int, ranks: Ranks, **known: Any
    ) -> ShardedSubspace:
        """From the columns of each rank, which are those of `cut`; the origin is gathered."""
        result = object.__new__(cls)
        scale = known.pop("scale", None)
        local = Subspace(basis, origin, scale=scale) if basis.shape[1] else None
        CutSubspace.__init__(result, len(basis), local, ranks)
        result._basis = basis.new_empty(len(basis), 0)
        result.origin = origin.new_empty(numel)  # of this dtype and length, until it is gathered
        result.origin = result._whole(origin)
        result.shapes, result.names = known.get("shapes"), known.get("names")
        ratio, values = (known.get(k) for k in ("explained_variance_ratio", "singular_values"))
        result.explained_variance_ratio, result.singular_values = ratio, values
        result.choice = known.get("choice")
        return result

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        process_group: Any,
        *,
        device: torch.device | str = "cpu",
    ) -> ShardedSubspace:
        """The columns of each rank of a saved subspace: as `LocalSubspace.load`."""
        from ._load_columns import load_sharded

        return load_sharded(path, process_group, device)

    def whole(self) -> Subspace:
        """All columns, on every rank: d n numbers of memory."""
        scale = None if self.local is None else self.local.scale
        if self.ranks.most(scale is not None):
            raise ValueError("whole: expected a basis that is not quantised, got one of 8 bits")
        dtype = self.origin.dtype if self.local is None else self.local.basis.dtype
        held = self.ranks.exchange({"dtype": str(dtype)}, "the basis")[0]["dtype"]
        basis = empty_rows(
            self.dim, self.numel, dtype=getattr(torch, held.split(".")[1]), device=self.device
        )
        for i, row in enumerate(basis):
            row.copy_(self.direction(i))
        return Subspace(
            basis, self.origin, shapes=self.shapes, names=self.names,
            explained_variance_ratio=self.explained_variance_ratio,
            singular_values=self.singular_values, choice=self.choice,
        )  # fmt: skip

    def addend(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        """This rank's columns of the mean: n numbers scattered for each list that differs."""
        differ = len(lists) - same
        own = [self._own(one) for one in lists[:differ]]
        own += [self._flat(one)[self._columns] for one in lists[differ:]]
        return self._products([[one] for one in own])

    def direction(self, index: int) -> Tensor:
        return self._whole(None if self.local is None else self.local.direction(index))

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        own = self._own(tensors)
        both: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.local is not None:
            both = self.local.combine_residual(theta, coordinates, [own])
        return self._whole(both[0]), self._whole(both[1])

    def with_origin(self, params: Iterable[Any] | Tensor) -> ShardedSubspace:
        result = self._like(self.local)
        result.origin = flatten(self._weights(params), self.origin.dtype)
        return result

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        piece = self._piece()
        if self.local is not None:
            own = None if origin is None else origin[self._columns]
            self.local._write([piece[: self.local.numel]], theta, own)
        full = self.ranks.gather(piece, "a direction")[: self.numel]
        with torch.no_grad():
            pieces = full.split([t.numel() for t in tensors])
            for tensor, part in zip(tensors, pieces, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _own(self, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's piece of the mean of what the ranks hold."""
        piece = self.ranks.scatter_mean(self._flat(tensors), "gradients")
        return piece[: 0 if self.local is None else self.local.numel]

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """A flat copy, with zeros after it; in 16 bits where all tensors have the same 16."""
        first = tensors[0].dtype
        short = first.itemsize == 2 and all(t.dtype == first for t in tensors)
        size = cut(self.numel, 0, self.ranks.size, pad=True)[1] * self.ranks.size
        full = self.origin.new_empty(size, dtype=first if short else self.origin.dtype)
        full[self.numel :] = 0
        torch.cat([t.reshape(-1).to(full.dtype) for t in tensors], out=full[: self.numel])
        return full

    @property
    def _columns(self) -> slice:
        return slice(*cut(self.numel, self.ranks.rank, self.ranks.size))

    def _whole(self, piece: Tensor | None) -> Tensor:
        """A flat vector (n,) from the pieces of all ranks."""
        padded = self._piece()
        if piece is not None:
            padded[: len(piece)] = piece
        return self.ranks.gather(padded, "a direction")[: self.numel]

    def _piece(self) -> Tensor:
        """Memory for this rank's columns, of equal length on all ranks; zeros after the columns."""
        piece = self.origin.new_empty(cut(self.numel, 0, self.ranks.size, pad=True)[1])
        piece[0 if self.local is None else self.local.numel :] = 0
        return piece

    def _like(self, local: Subspace | None) -> ShardedSubspace:
        result = object.__new__(ShardedSubspace)
        result.__dict__.update(self.__dict__)
        result.local = local
        if local is not None:
            result.origin = self.origin.to(local.origin.dtype)
        return result
