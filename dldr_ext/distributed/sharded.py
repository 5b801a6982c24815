"""Subspaces of replicated parameters, their basis partitioned by columns over the ranks."""

from __future__ import annotations

import copy
import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..collectives.consistency import Facts
from ..collectives.partition import Run, cut
from ..collectives.process_group import Ranks, failing_together, resolve_group
from ..subspace.dense import Subspace
from ..tensors.formats import scale_of
from ..tensors.memory import empty_rows, free_memory
from ..tensors.parameters import dtype_name, type_name
from .partitioned import METADATA, PartitionedSubspace, read_partition


class ShardedSubspace(PartitionedSubspace):
    """A basis partitioned over ranks that all hold the whole weights (plain data parallelism).

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

    See Also
    --------
    shard_if_needed : Partitions a basis only where it does not fit.
    LocalSubspace : For parameters that are sharded themselves.
    """

    def __init__(
        self, subspace: Subspace, process_group: Any, *, device: torch.device | str | None = None
    ) -> None:
        subspace = checked_whole("ShardedSubspace", subspace)
        group, _ = resolve_group("ShardedSubspace", process_group)
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
        placeholder = subspace.basis.new_empty(subspace.dim, 0)
        super().__init__(
            subspace.dim,
            local,
            ranks,
            placeholder,
            **{name: getattr(subspace, name) for name in METADATA},
        )
        self.origin = origin
        self.shapes, self.names = subspace.shapes, subspace.names

    @classmethod
    def of_columns(
        cls, basis: Tensor, origin: Tensor, numel: int, ranks: Ranks, **arguments: Any
    ) -> ShardedSubspace:
        """Put together the columns of each rank, which are those of `cut`.

        Parameters
        ----------
        basis : Tensor, shape (d, columns of this rank)
        origin : Tensor, shape (columns of this rank,)
            Gathered.
        numel : int
            n.
        ranks : Ranks
        **arguments
            Of `Subspace`.

        Returns
        -------
        ShardedSubspace
        """
        result = object.__new__(cls)
        scale = arguments.pop("scale", None)
        local = Subspace(basis, origin, scale=scale) if basis.shape[1] else None
        placeholder = basis.new_empty(len(basis), 0)
        PartitionedSubspace.__init__(result, len(basis), local, ranks, placeholder, **arguments)
        result.origin = origin.new_empty(numel)  # of this dtype and length, until it is gathered
        result.origin = result._gathered(origin)
        result.shapes, result.names = arguments.get("shapes"), arguments.get("names")
        return result

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        process_group: Any,
        *,
        device: torch.device | str = "cpu",
    ) -> ShardedSubspace:
        """Load the columns of each rank of a saved subspace; the others are not read.

        Parameters
        ----------
        path : path
            A file that `Subspace.save` wrote, or a folder that torch.distributed.checkpoint wrote,
            with `dldr_ext.dcp.stateful` under the key "subspace".
        process_group : ProcessGroup, DeviceMesh, module or "world"
        device : torch.device or str
            Where the columns go.

        Returns
        -------
        ShardedSubspace

        Raises
        ------
        ValueError
            On every rank: the file is not whole, or something else.
        """
        group, _ = resolve_group("ShardedSubspace", process_group)
        ranks = Ranks("ShardedSubspace", group, torch.device(device))

        def runs_here(total: int) -> list[Run]:
            begin, end = cut(total, ranks.rank, ranks.size)
            return [(begin, end)] if begin < end else []

        arguments, total = read_partition(path, ranks, runs_here)
        if arguments["shapes"] is not None:
            arguments["shapes"] = [*map(tuple, arguments["shapes"])]
        basis, origin = arguments.pop("basis"), arguments.pop("origin")
        return cls.of_columns(basis, origin, total, ranks, **arguments)

    def whole(self) -> Subspace:
        """Return the subspace with all columns, on every rank: d n numbers of memory.

        Returns
        -------
        Subspace

        Raises
        ------
        ValueError
            The basis has 8 bits.
        """
        scale = None if self.local is None else self.local.scale
        if self.ranks.maximum(scale is not None):
            raise ValueError("whole: expected a basis that is not quantised, got one of 8 bits")
        dtype = self.origin.dtype if self.local is None else self.local.basis.dtype
        # A rank without columns goes by the first.
        name = self.ranks.exchange({"dtype": dtype_name(dtype)}, "the basis")[0]["dtype"]
        basis = empty_rows(self.dim, self.numel, dtype=getattr(torch, name), device=self.device)
        for i, row in enumerate(basis):
            row.copy_(self.direction(i))
        return Subspace(
            basis, self.origin, shapes=self.shapes, names=self.names, **self._metadata()
        )

    @override
    def partial_sum(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        # n numbers are scattered for each list that differs between the ranks.
        differ = len(lists) - same
        columns = [self._scattered_mean(tensors) for tensors in lists[:differ]]
        columns += [self._flat(tensors)[self._columns] for tensors in lists[differ:]]
        return self._products([[vector] for vector in columns])

    def _direction(self, index: int) -> Tensor:
        return self._gathered(None if self.local is None else self.local.direction(index))

    @override
    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        gradient = self._scattered_mean(tensors)
        direction: Tensor | None = None
        residual: Tensor | None = None
        if self.local is not None:
            direction, residual = self.local.combine_residual(theta, coordinates, [gradient])
        return self._gathered(direction), self._gathered(residual)

    def _moved_to(self, origin: Tensor) -> ShardedSubspace:
        result = self._with_columns(self.local)
        result.origin, result.mean = origin, None
        return result

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        padded = self._padded_columns()
        if self.local is not None:
            columns = None if origin is None else origin[self._columns]
            self.local._write([padded[: self.local.numel]], theta, columns)
        flat = self.ranks.gather(padded, "a direction")[: self.numel]
        with torch.no_grad():
            pieces = flat.split([t.numel() for t in tensors])
            for tensor, piece in zip(tensors, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    def _scattered_mean(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return this rank's columns of the mean of what the ranks hold."""
        piece = self.ranks.scatter_mean(self._flat(tensors), "gradients")
        return piece[: self._columns_here]

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a flat copy, zeros after it; in 16 bits where all tensors have the same 16."""
        first = tensors[0].dtype
        short = first.itemsize == 2 and all(t.dtype == first for t in tensors)
        size = cut(self.numel, 0, self.ranks.size, pad=True)[1] * self.ranks.size
        flat = self.origin.new_empty(size, dtype=first if short else self.origin.dtype)
        flat[self.numel :] = 0
        torch.cat([t.detach().reshape(-1).to(flat.dtype) for t in tensors], out=flat[: self.numel])
        return flat

    @property
    def _columns(self) -> slice:
        return slice(*cut(self.numel, self.ranks.rank, self.ranks.size))

    def _gathered(self, columns: Tensor | None) -> Tensor:
        """Return a flat vector (n,) from the columns of all ranks."""
        padded = self._padded_columns()
        if columns is not None:
            padded[: len(columns)] = columns
        return self.ranks.gather(padded, "a direction")[: self.numel]

    def _padded_columns(self) -> Tensor:
        """Return memory for this rank's columns and zeros: of equal length on all ranks."""
        padded = self.origin.new_empty(cut(self.numel, 0, self.ranks.size, pad=True)[1])
        padded[self._columns_here :] = 0
        return padded

    def _with_columns(self, local: Subspace | None) -> ShardedSubspace:
        result = copy.copy(self)
        result.local = local
        if local is not None:
            result.origin = self.origin.to(local.origin.dtype)
        return result


# Flat vectors beside the basis: origin, point, direction, a kept gradient, the gradients.
_VECTORS = 5


def shard_if_needed(
    subspace: Subspace,
    process_group: Any,
    *,
    device: torch.device | str | None = None,
    memory: float | None = None,
) -> Subspace | ShardedSubspace:
    """Return the subspace for this rank's optimizer: whole if it fits on every rank, else sharded.

    A whole basis needs d n numbers on each rank, and d numbers on the wire for a gradient; a
    sharded one d n / size numbers, and n on the wire. All ranks decide alike.

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
    name = "shard_if_needed"
    group, _ = resolve_group(name, process_group)
    wanted = getattr(subspace, "device", "cpu") if device is None else device
    target = torch.empty(0, device=wanted).device  # with its index
    ranks = Ranks(name, group, target)
    with failing_together(ranks):
        subspace = checked_whole(name, subspace)
        room = _checked_memory(name, memory)
        kind = dtype_name(subspace.dtype)
        ranks.check_consistent({"dim": subspace.dim, "numel": subspace.numel, "dtype": kind}, name)
    needs: Facts = {"need": _needed(subspace, target), "room": room, "device": None}
    if room is None:
        needs |= {"room": free_memory(target), "device": _name_of(target)}
    of_ranks = ranks.exchange(needs, name)
    users = Counter(rank["device"] for rank in of_ranks) | {None: 1}
    if all(rank["need"] * users[rank["device"]] <= rank["room"] for rank in of_ranks):
        return subspace.to(device=target)
    return ShardedSubspace(subspace, process_group, device=target)


def checked_whole(owner: str, subspace: Any) -> Subspace:
    """Return the subspace if it is one that can be partitioned."""
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
    """Return the bytes of a whole basis and an optimizer's vectors, but for a basis on that GPU.

    One in the host's memory counts: it may be mapped from a file.
    """
    vectors = _VECTORS * subspace.origin.nbytes
    if subspace.device == device and device.type != "cpu":
        return vectors
    scale = 0 if subspace.scale is None else subspace.scale.nbytes
    return subspace.basis.nbytes + scale + vectors


def _name_of(device: torch.device) -> str:
    """Return a name that ranks which share the memory of a device have in common."""
    if device.type != "cuda":
        return socket.gethostname()
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
