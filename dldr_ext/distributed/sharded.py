"""Subspaces of replicated parameters, their basis cut by columns over the ranks."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives.consistency import Claims
from ..collectives.partition import Run, cut
from ..collectives.process_group import Ranks, members
from ..subspace.dense import Subspace
from ..tensors.alignment import empty_rows
from ..tensors.formats import scale_of
from ..tensors.memory import free_memory
from ..tensors.parameters import dtype_name, type_name
from .partitioned import CutSubspace, StrPath, _columns


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
            scale = scale_of(subspace.scale, begin, end)
            scale = None if scale is None else scale.to(origin.device)
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
        pass

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

    def partial_sum(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        """This rank's columns of the mean: n numbers scattered for each list that differs."""
        differ = len(lists) - same
        own = [self._own(one) for one in lists[:differ]]
        own += [self._flat(one)[self._columns] for one in lists[differ:]]
        return self._products([[one] for one in own])

    def _direction(self, index: int) -> Tensor:
        return self._whole(None if self.local is None else self.local.direction(index))

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        own = self._own(tensors)
        both: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.local is not None:
            both = self.local.combine_residual(theta, coordinates, [own])
        return self._whole(both[0]), self._whole(both[1])

    def _moved_to(self, origin: Tensor) -> ShardedSubspace:
        result = self._like(self.local)
        result.origin = origin
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
        torch.cat([t.detach().reshape(-1).to(full.dtype) for t in tensors], out=full[: self.numel])
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


def load_sharded(path: StrPath, process_group: Any, device: Any) -> ShardedSubspace:
    """See `ShardedSubspace.load`."""
    group, _ = members("ShardedSubspace", process_group)
    ranks = Ranks("ShardedSubspace", group, torch.device(device))

    def own(total: int) -> list[Run]:
        begin, end = cut(total, ranks.rank, ranks.size)
        return [(begin, end)] if begin < end else []

    known, total = _columns(path, ranks, own)
    if known["shapes"] is not None:
        known["shapes"] = [*map(tuple, known["shapes"])]
    return ShardedSubspace.of_columns(
        known.pop("basis"), known.pop("origin"), total, ranks, **known
    )


# Flat vectors beside the basis: origin, point, direction, a kept gradient, the gradients.
_VECTORS = 5


def shard_if_needed(
    subspace: Subspace,
    process_group: Any,
    *,
    device: torch.device | str | None = None,
    memory: float | None = None,
) -> Subspace | ShardedSubspace:
    """The subspace for this rank's optimizer: whole if that fits on every rank, else cut.

    A whole basis needs d n numbers on each rank, and d numbers on the wire for a gradient; one that
    is cut, d n / size numbers, and n on the wire. All ranks decide alike.

    Parameters
    ----------
    subspace : Subspace
        The whole one, on every rank; in the host's memory, say, where ``device`` is a GPU.
    process_group : ProcessGroup, DeviceMesh, module or "world"
    device : torch.device or str, optional
        Where the weights are; None: where the subspace is.
    memory : float, optional
        Bytes that basis, origin and the optimizer's flat vectors may take on this rank. None: what
        is free on the device, shared among the ranks on it.

    Returns
    -------
    Subspace or ShardedSubspace

    Raises
    ------
    TypeError, ValueError
        On every rank: an argument on one of them is not as expected, or subspaces differ.
    """
    pass

    name = "shard_if_needed"
    group, _ = members(name, process_group)
    wanted = getattr(subspace, "device", "cpu") if device is None else device
    here = torch.empty(0, device=wanted).device  # with its index
    ranks = Ranks(name, group, here)
    with ranks.agreeing():
        subspace = checked_whole(name, subspace)
        room = _checked_memory(name, memory)
        kind = dtype_name(subspace.dtype)
        ranks.agree({"dim": subspace.dim, "numel": subspace.numel, "dtype": kind}, name)
    own: Claims = {"need": _needed(subspace, here), "room": room, "device": None}
    if room is None:
        own |= {"room": free_memory(here), "device": _name_of(here)}
    told = ranks.exchange(own, name)
    users = Counter(one["device"] for one in told) | {None: 1}
    if all(one["need"] * users[one["device"]] <= one["room"] for one in told):
        return subspace.to(device=here)
    return ShardedSubspace(subspace, process_group, device=here)


def checked_whole(owner: str, subspace: Any) -> Subspace:
    """A `Subspace`, or an error."""
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"{owner}: subspace: expected a Subspace (others cannot be cut by columns), got "
            f"{type_name(subspace)}"
        )
    return subspace


def _checked_memory(owner: str, memory: Any) -> float | None:
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory >= 0:
        raise ValueError(f"{owner}: memory: expected a number of bytes or None, got {memory!r}")
    return memory


def _needed(subspace: Subspace, device: torch.device) -> int:
    """Bytes of a whole basis and the vectors of an optimizer, but for a basis on that GPU already.

    One in the host's memory counts: it may be mapped from a file.
    """
    vectors = _VECTORS * subspace.origin.nbytes
    if subspace.device == device and device.type != "cpu":
        return vectors
    scale = 0 if subspace.scale is None else subspace.scale.nbytes
    return subspace.basis.nbytes + scale + vectors


def _name_of(device: torch.device) -> str:
    """The same for ranks that share the memory of a device."""
    if device.type != "cuda":
        return socket.gethostname()
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
