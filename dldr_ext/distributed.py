"""Subspaces whose basis is cut by columns over the ranks of a process group.

Every rank makes the same calls. The optimizers take these subspaces with ``process_group=``.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._affine import AffineSubspace
from ._cut import Layout, cut, layout_of
from ._params import flatten, local_shard
from ._placements import entries, local_columns, local_shards, replicas_of
from ._ranks import Ranks, members
from ._rows import empty_rows
from ._sharding import checked_whole, shard_if_needed
from .subspace import Subspace
from .trajectory import Trajectory

__all__ = [
    "LocalSubspace",
    "ShardedSubspace",
    "cut",
    "local_columns",
    "local_shards",
    "shard_if_needed",
]

_BLOCK = ops.SCALE_BLOCK


class _Cut(AffineSubspace):
    """What a rank holds: a `Subspace` of its columns, or None where it has none."""

    spans_ranks = True

    def __init__(self, dim: int, local: Subspace | None, ranks: Ranks) -> None:
        self._dim, self.local, self.ranks = dim, local, ranks
        self.explained_variance_ratio = None if local is None else local.explained_variance_ratio
        self.singular_values = None if local is None else local.singular_values

    @property
    def dim(self) -> int:
        """d, the number of directions."""
        return self._dim

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dim={self.dim}, numel={self.numel}, rank {self.ranks.rank} of "
            f"{self.ranks.size} with {0 if self.local is None else self.local.numel} columns)"
        )

    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Coordinates of the ranks' mean of several lists, shape (len(lists), d)."""
        c = self.ranks.sum_(self.addend(lists, self.ranks.size), "coordinates")
        return c.to(self.coordinate_dtype)

    def reconstruct(self, theta: Tensor) -> Tensor:
        """Flat weights w0 + P theta, shape (n,). Not differentiable."""
        if theta.requires_grad and torch.is_grad_enabled():
            raise ValueError("theta: expected a tensor that needs no gradient, got one that does")
        result = torch.empty_like(self.origin)
        self._write([result], theta.detach(), self.origin)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the columns of this rank: ``name-00001-of-00004.safetensors`` for the path
        ``name.safetensors``, each a file of a `Subspace`. A rank without columns saves none.
        """
        if self.local is not None:
            path, ranks = Path(path), self.ranks
            self.local.save(
                path.with_name(f"{path.stem}-{ranks.rank + 1:05}-of-{ranks.size:05}{path.suffix}")
            )

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        return self.project_many([tensors])[0]

    def _products(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Of this rank's columns alone, float64."""
        if self.local is None:
            return torch.zeros(len(lists), self.dim, dtype=torch.float64, device=self.device)
        return self.local.project_many(lists).to(torch.float64)

    @abstractmethod
    def _like(self, local: Subspace | None) -> Any:
        """The same cut with other columns."""

    def quantize(self, format: str) -> Any:
        """The same subspace with the basis in 8 bits: see `Subspace.quantize`."""
        return self._like(None if self.local is None else self.local.quantize(format))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        """The same subspace with another dtype of the basis; a group belongs to one device."""
        if device is not None and torch.device(device) != self.device:
            raise ValueError(f"device: expected {self.device}, that of the ranks, got {device}")
        return self._like(None if self.local is None else self.local.to(dtype=dtype))


class LocalSubspace(_Cut):
    """The part of a subspace that belongs to a rank's own shards of the parameters (FSDP2).

    Basis, origin and weights are those of the local shards of ``DTensor`` parameters, one after
    the other, so that no rank holds a vector of n or a whole basis. A projection sums d numbers
    over the ranks. ``numel`` and ``shapes`` are of the local shards.

    Parameters
    ----------
    basis : Tensor, shape (d, n_local)
        Columns of the basis; n_local may be 0.
    origin : Tensor, shape (n_local,)
    process_group : ProcessGroup, DeviceMesh or module
    replicas : int
        How many ranks hold each weight (hybrid sharding); the same for all weights.
    **known
        Of `Subspace`: ``scale``, ``shapes`` (local), ``names``, ``singular_values``, ...
    """

    def __init__(
        self,
        basis: Tensor,
        origin: Tensor,
        process_group: Any,
        *,
        replicas: int = 1,
        **known: Any,
    ) -> None:
        group, _ = members("LocalSubspace", process_group)
        local = Subspace(basis, origin, **known) if basis.shape[1] else None
        super().__init__(len(basis), local, Ranks("LocalSubspace", group, origin.device))
        self.origin = origin if local is None else local.origin
        self.shapes, self.names = known.get("shapes"), known.get("names")
        if local is None:  # every rank starts from the same guess of the curvature
            self.singular_values = known.get("singular_values")
        self.replicas, self._basis = replicas, basis
        self.layout: Layout | None = None  # where these columns are among all, if known

    @classmethod
    def of(cls, subspace: Subspace, params: Iterable[Any]) -> LocalSubspace:
        """Cut out of a whole subspace, which every rank has (or maps from a file) for this once.

        Parameters
        ----------
        subspace : Subspace
            Not quantised.
        params : iterable of DTensor
            Of `fully_shard`, in the order that the subspace was made with.

        Raises
        ------
        ValueError
            Placements that have no part here, such as ``Partial``; weights of which some are held
            by more ranks than others.
        """
        listed = entries(params)[0]
        replicas, columns = replicas_of(listed), local_columns(listed).to(subspace.device)
        result = cls(
            subspace.basis[:, columns],
            subspace.origin[columns],
            listed[0].device_mesh,
            replicas=replicas,
            shapes=[tuple(p.shape) for p in local_shards(listed)],
            names=subspace.names,
            explained_variance_ratio=subspace.explained_variance_ratio,
            singular_values=subspace.singular_values,
        )
        return result._laid_out(listed)

    @classmethod
    def random(cls, params: Iterable[Any], dim: int, *, seed: int = 0) -> LocalSubspace:
        """Random orthonormal directions at the current weights, made shard by shard.

        The same for one number of ranks; every rank passes the same ``seed``.
        """
        listed, names = entries(params)
        replicas, shards = replicas_of(listed), local_shards(listed)
        origin = flatten(shards, torch.float32)
        columns = local_columns(listed)
        # Ranks that hold the same shards draw the same numbers.
        first = int(columns[0]) if len(columns) else 0
        generator = torch.Generator(origin.device).manual_seed(seed * 1_000_003 + first)
        basis = torch.randn(dim, len(origin), generator=generator, device=origin.device)
        group, _ = members("LocalSubspace", listed[0].device_mesh)
        ranks = Ranks("LocalSubspace", group, origin.device)
        for _ in range(2):
            gram = ops.gram(basis) if len(origin) else basis.new_zeros(dim, dim).double()
            ranks.sum_(gram.div_(replicas), "a Gram matrix")
            factor = torch.linalg.cholesky(gram)
            inverse = torch.linalg.solve_triangular(
                factor, torch.eye(dim, dtype=gram.dtype, device=gram.device), upper=False
            )
            if len(origin):
                basis = ops.form_basis(basis, inverse)
        shapes = [tuple(p.shape) for p in shards]
        mesh = listed[0].device_mesh
        result = cls(basis, origin, mesh, replicas=replicas, shapes=shapes, names=names)
        return result._laid_out(listed)

    @classmethod
    def from_trajectory(
        cls, trajectory: Trajectory | None, params: Iterable[Any], dim: int
    ) -> LocalSubspace:
        """The principal directions of weights that each rank recorded of its own shards.

        The T x T Gram matrices are summed over the ranks: no other rank sees a snapshot.

        Parameters
        ----------
        trajectory : Trajectory or None
            Of this rank's `local_shards` of ``params``, all ranks at the same moments. None where
            the rank has no weights.
        params : iterable of DTensor
        dim : int
            At most T - 1 directions; fewer where the trajectory has a smaller rank.
        """
        from ._shared_trajectory import SharedTrajectory

        if not isinstance(trajectory, SharedTrajectory):
            trajectory = SharedTrajectory.of_parts(trajectory, params)
        found = trajectory.subspace(dim)
        assert isinstance(found, LocalSubspace)
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str], params: Iterable[Any]) -> LocalSubspace:
        """The columns of these shards of a saved subspace; the others are not read.

        Parameters
        ----------
        path : path
            A file that `Subspace.save` wrote, or a folder that torch.distributed.checkpoint wrote,
            with `dldr_ext.dcp.stateful` under the key "subspace".
        params : iterable of DTensor
            In the order that the subspace was made with.
        """
        from ._shared_subspace import load_local

        return load_local(path, params)

    def addend(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        """Gradients of shards are means over the ranks already: only replicas count twice."""
        return self._products(lists).div_(self.replicas)

    def weight(self, size: int) -> float:
        return 1.0 / self.replicas

    def dot(self, a: Tensor, b: Tensor) -> float:
        product = torch.dot(a, b).to(torch.float64).reshape(1) / self.replicas
        return float(self.ranks.sum_(product, "a product"))

    def direction(self, index: int) -> Tensor:
        return torch.empty_like(self.origin) if self.local is None else self.local.direction(index)

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.local is None:
            return torch.empty_like(self.origin), torch.empty_like(self.origin)
        return self.local.combine_residual(theta, coordinates, tensors)

    def with_origin(self, params: Iterable[Any] | Tensor) -> LocalSubspace:
        flat = flatten(self._weights(params), self.origin.dtype)
        return self._like(None if self.local is None else self.local.with_origin(flat))

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        if self.local is not None:
            self.local._write(tensors, theta, origin)

    def _weights(self, params: Iterable[Any] | Tensor) -> list[Tensor]:
        listed = [params] if isinstance(params, Tensor) else list(params)
        return super()._weights([local_shard(p) if isinstance(p, Tensor) else p for p in listed])

    def _like(self, local: Subspace | None) -> LocalSubspace:
        basis, origin = (self._basis, self.origin) if local is None else (local.basis, local.origin)
        known = {} if local is None else {"scale": local.scale}
        known["explained_variance_ratio"] = self.explained_variance_ratio
        result = LocalSubspace(
            basis, origin, self.ranks.group, replicas=self.replicas, shapes=self.shapes,
            names=self.names, singular_values=self.singular_values, **known,
        )  # fmt: skip
        result.layout = self.layout
        return result

    def _laid_out(self, params: Sequence[Any]) -> LocalSubspace:
        self.layout = layout_of(params)
        return self


class ShardedSubspace(_Cut):
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
                scale = scale[:, begin // _BLOCK : -(-end // _BLOCK)].to(origin.device)
            columns = subspace.basis[:, begin:end].contiguous()
            columns = columns.clone() if columns is subspace.basis else columns
            local = Subspace(columns.to(origin.device), origin[begin:end], scale=scale)
        super().__init__(subspace.dim, local, ranks)
        self.origin = origin
        self.shapes, self.names = subspace.shapes, subspace.names
        self.explained_variance_ratio = subspace.explained_variance_ratio
        self.singular_values = subspace.singular_values

    @classmethod
    def of_columns(
        cls, basis: Tensor, origin: Tensor, numel: int, ranks: Ranks, **known: Any
    ) -> ShardedSubspace:
        """From the columns of each rank, which are those of `cut`; the origin is gathered."""
        result = object.__new__(cls)
        scale = known.pop("scale", None)
        local = Subspace(basis, origin, scale=scale) if basis.shape[1] else None
        _Cut.__init__(result, len(basis), local, ranks)
        result.origin = origin.new_empty(numel)  # of this dtype and length, until it is gathered
        result.origin = result._whole(origin)
        result.shapes, result.names = known.get("shapes"), known.get("names")
        ratio, values = (known.get(k) for k in ("explained_variance_ratio", "singular_values"))
        result.explained_variance_ratio, result.singular_values = ratio, values
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
        from ._shared_subspace import load_sharded

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
            singular_values=self.singular_values,
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
