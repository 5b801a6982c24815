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
from torch.distributed.tensor import distribute_tensor

from . import _pca, ops
from ._affine import AffineSubspace
from ._params import flatten, local_shard, named_parameters
from ._principal import weights_at
from ._ranks import Ranks, members
from ._stored_rows import formed
from .subspace import Subspace
from .trajectory import Trajectory

__all__ = ["LocalSubspace", "ShardedSubspace", "local_columns", "local_shards"]

# Pieces are cut at multiples of this, so that the blocks of an 8-bit basis stay whole.
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
        listed = _entries(params)[0]
        replicas, columns = _replicas(listed), local_columns(listed).to(subspace.device)
        return cls(
            subspace.basis[:, columns],
            subspace.origin[columns],
            listed[0].device_mesh,
            replicas=replicas,
            shapes=[tuple(p.shape) for p in local_shards(listed)],
            names=subspace.names,
            explained_variance_ratio=subspace.explained_variance_ratio,
            singular_values=subspace.singular_values,
        )

    @classmethod
    def random(cls, params: Iterable[Any], dim: int, *, seed: int = 0) -> LocalSubspace:
        """Random orthonormal directions at the current weights, made shard by shard.

        The same for one number of ranks; every rank passes the same ``seed``.
        """
        listed, names = _entries(params)
        replicas, shards = _replicas(listed), local_shards(listed)
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
        return cls(basis, origin, mesh, replicas=replicas, shapes=shapes, names=names)

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
        listed, names = _entries(params)
        replicas, shards = _replicas(listed), local_shards(listed)
        group, _ = members("LocalSubspace", listed[0].device_mesh)
        ranks = Ranks("LocalSubspace", group, shards[0].device)
        length = 0 if trajectory is None else len(trajectory)
        most = ranks.most(length)
        with ranks.agreeing():
            if trajectory is not None and (length < 2 or length != most):
                raise ValueError(
                    "trajectory: expected at least two snapshots, as many on every rank, got "
                    f"{length} where another rank has {most}"
                )
            ranks.agree({"dim": dim}, "from_trajectory")
        gram = torch.zeros(most, most, dtype=torch.float64, device=ranks.device)
        origin = torch.empty(0, device=ranks.device)
        if trajectory is not None:
            assert trajectory.anchor is not None
            gram += _pca.exact_gram(trajectory.snapshots)
            origin = weights_at(trajectory.snapshots, trajectory.anchor, "first")
        square = torch.linalg.vector_norm(origin, dtype=torch.float64).square().reshape(1)
        ranks.sum_(gram.div_(replicas), "the Gram matrix")
        ranks.sum_(square.div_(replicas), "the size of the weights")
        double = origin.dtype == torch.float64
        found = _pca.exact_spectrum(gram, double, square.sqrt(), center=True)
        if found.rank == 0:
            raise ValueError("trajectory: the snapshots do not differ: there is no direction")
        count = min(_pca.checked_dim(dim, most - 1, f"{most} centred snapshots"), found.rank)
        basis, scale = origin.new_empty(count, 0), None
        if trajectory is not None:
            combine = _pca.coefficients(found, count).to(ranks.device)
            rows = trajectory.snapshots
            basis, scale = formed(rows, combine, trajectory.dtype, _pca.column_step(rows))
        return cls(
            basis, origin, listed[0].device_mesh, replicas=replicas,
            shapes=[tuple(p.shape) for p in shards], names=names,
            explained_variance_ratio=found.explained(count),
            singular_values=found.values[:count].sqrt(), scale=scale,
        )  # fmt: skip

    def addend(self, lists: Sequence[Sequence[Tensor]], size: int) -> Tensor:
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
        return LocalSubspace(
            basis, origin, self.ranks.group, replicas=self.replicas, shapes=self.shapes,
            names=self.names, singular_values=self.singular_values, **known,
        )  # fmt: skip


class ShardedSubspace(_Cut):
    """A basis cut over ranks that all hold the whole weights (plain data parallelism).

    Each rank keeps d n / size numbers. A gradient is reduced and scattered, a direction gathered:
    n numbers each, half of what summing the gradient and the projected direction would move.

    Parameters
    ----------
    subspace : Subspace
        The whole one, on every rank (mapped from a file, say); its columns are copied.
    process_group : ProcessGroup, DeviceMesh, module or "world"

    Attributes
    ----------
    local : Subspace or None
        The columns of this rank.
    origin : Tensor, shape (n,)
        Whole, on every rank.
    """

    def __init__(self, subspace: Subspace, process_group: Any) -> None:
        group, _ = members("ShardedSubspace", process_group)
        ranks = Ranks("ShardedSubspace", group, subspace.device)
        begin, end = cut(subspace.numel, ranks.rank, ranks.size)
        local = None
        if begin < end:
            scale = subspace.scale
            local = Subspace(
                subspace.basis[:, begin:end].clone(),
                subspace.origin[begin:end],
                scale=None if scale is None else scale[:, begin // _BLOCK : -(-end // _BLOCK)],
            )
        super().__init__(subspace.dim, local, ranks)
        self.origin = subspace.origin
        self.shapes, self.names = subspace.shapes, subspace.names
        self.explained_variance_ratio = subspace.explained_variance_ratio
        self.singular_values = subspace.singular_values

    def addend(self, lists: Sequence[Sequence[Tensor]], size: int) -> Tensor:
        """This rank's columns of the mean: n numbers reduced and scattered for each list."""
        return self._products([[self._own(one)] for one in lists])

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
        piece = None
        if self.local is not None:
            begin, end = cut(self.numel, self.ranks.rank, self.ranks.size)
            piece = self.origin.new_empty(end - begin)
            self.local._write([piece], theta, None if origin is None else origin[begin:end])
        full = self._whole(piece)
        with torch.no_grad():
            pieces = full.split([t.numel() for t in tensors])
            for tensor, part in zip(tensors, pieces, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _own(self, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's piece of the mean of what the ranks hold."""
        size, begin_end = self.ranks.size, cut(self.numel, self.ranks.rank, self.ranks.size)
        full = self.origin.new_zeros(cut(self.numel, 0, size, pad=True)[1] * size)
        torch.cat([t.reshape(-1).to(full.dtype) for t in tensors], out=full[: self.numel])
        piece = self.ranks.scatter_sum(full, "gradients").div_(size)
        return piece[: max(begin_end[1] - begin_end[0], 0)]

    def _whole(self, piece: Tensor | None) -> Tensor:
        """A flat vector (n,) from the pieces of all ranks."""
        padded = self.origin.new_zeros(cut(self.numel, 0, self.ranks.size, pad=True)[1])
        if piece is not None:
            padded[: len(piece)] = piece
        return self.ranks.gather(padded, "a direction")[: self.numel]

    def _like(self, local: Subspace | None) -> ShardedSubspace:
        result = object.__new__(ShardedSubspace)
        result.__dict__.update(self.__dict__)
        result.local = local
        if local is not None:
            result.origin = self.origin.to(local.origin.dtype)
        return result


def cut(numel: int, rank: int, size: int, pad: bool = False) -> tuple[int, int]:
    """The columns of one of ``size`` pieces, equal but for the last ones; ``pad``: as if equal."""
    length = -(-numel // (size * _BLOCK)) * _BLOCK
    begin, end = rank * length, (rank + 1) * length
    return (begin, end) if pad else (min(begin, numel), min(end, numel))


def local_shards(params: Iterable[Any]) -> list[Tensor]:
    """What this rank holds of each parameter: views, which follow what is written."""
    return [local_shard(p) for p in named_parameters(params)[0]]


def local_columns(params: Iterable[Any]) -> Tensor:
    """Where the elements of `local_shards` are among all n elements in flat order, int64."""
    found, start = [], 0
    for p in _entries(params)[0]:
        index: Any = torch.arange(start, start + p.numel()).view(p.shape)
        if hasattr(p, "device_mesh"):
            index = index.to(p.device)
            index = distribute_tensor(index, p.device_mesh, p.placements, src_data_rank=None)
        found.append(local_shard(index).reshape(-1))
        start += p.numel()
    return torch.cat(found)


def _entries(params: Iterable[Any]) -> tuple[list[Any], list[str] | None]:
    """`named_parameters`, of which some may be more than a Tensor."""
    found, names = named_parameters(params)
    return list(found), names


def _replicas(params: Sequence[Any]) -> int:
    counts = []
    for i, p in enumerate(params):
        if not hasattr(p, "device_mesh"):
            raise ValueError(f"params[{i}]: expected a DTensor (fully_shard), got a plain tensor")
        if any(place.is_partial() for place in p.placements):
            raise ValueError(f"params[{i}]: expected shards or replicas, got {p.placements}")
        sizes = zip(p.placements, p.device_mesh.shape, strict=True)
        count = 1
        for place, size in sizes:
            count *= size if place.is_replicate() else 1
        counts.append(count)
        if p.device_mesh != params[0].device_mesh or count != counts[0]:
            raise ValueError(
                f"params[{i}]: expected the mesh and the number of replicas of params[0] "
                f"({params[0].device_mesh}, {counts[0]}), got {p.device_mesh}, {count}"
            )
    return counts[0]
