"""Subspaces of fully sharded parameters (FSDP2, DTensor)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..collectives.dtensors import entries, local_columns, local_shards, replicas_of
from ..collectives.partition import Layout, Run, layout_of
from ..collectives.process_group import Ranks, members
from ..subspace.dense import Subspace
from ..tensors.parameters import flatten, local_shard, named_parameters
from .partitioned import CutSubspace, StrPath, _columns

if TYPE_CHECKING:
    from ..trajectory.trajectory import Trajectory


class LocalSubspace(CutSubspace):
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
            self.explained_variance_ratio = known.get("explained_variance_ratio")
            self.choice = known.get("choice")
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
        from ..trajectory.stores.sharded import SharedTrajectory

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
        pass

        return load_local(path, params)

    def partial_sum(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        """Gradients of shards are means over the ranks already: only replicas count twice."""
        return self._products(lists).div_(self.replicas)

    def weight(self, size: int) -> float:
        return 1.0 / self.replicas

    def dot(self, a: Tensor, b: Tensor) -> float:
        product = torch.dot(a, b).to(torch.float64).reshape(1) / self.replicas
        return float(self.ranks.sum_(product, "a product"))

    def _direction(self, index: int) -> Tensor:
        return torch.empty_like(self.origin) if self.local is None else self.local.direction(index)

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.local is None:
            return torch.empty_like(self.origin), torch.empty_like(self.origin)
        return self.local.combine_residual(theta, coordinates, tensors)

    def _moved_to(self, origin: Tensor) -> LocalSubspace:
        return self._like(None if self.local is None else self.local.with_origin(origin))

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        if self.local is not None:
            self.local._write(tensors, theta, origin)

    def _weights(self, params: Iterable[Any] | Tensor) -> list[Tensor]:
        listed = [params] if isinstance(params, Tensor) else list(params)
        return super()._weights([local_shard(p) if isinstance(p, Tensor) else p for p in listed])

    @property
    def _total(self) -> int:
        return self.numel if self.layout is None else self.layout.numel

    def _like(self, local: Subspace | None) -> LocalSubspace:
        basis, origin = (self._basis, self.origin) if local is None else (local.basis, local.origin)
        known = {} if local is None else {"scale": local.scale}
        known["explained_variance_ratio"] = self.explained_variance_ratio
        result = LocalSubspace(
            basis, origin, self.ranks.group, replicas=self.replicas, shapes=self.shapes,
            names=self.names, singular_values=self.singular_values, choice=self.choice, **known,
        )  # fmt: skip
        result.layout = self.layout
        return result

    def _laid_out(self, params: Sequence[Any]) -> LocalSubspace:
        self.layout = layout_of(params)
        return self


def load_local(path: StrPath, params: Iterable[Any]) -> LocalSubspace:
    """See `LocalSubspace.load`."""
    listed, names = named_parameters(params)
    entries: list[Any] = list(listed)
    replicas, shards = replicas_of(entries), local_shards(entries)
    group, _ = members("LocalSubspace", entries[0].device_mesh)
    ranks = Ranks("LocalSubspace", group, shards[0].device)
    layout = layout_of(entries)

    def own(total: int) -> list[Run]:
        if total != layout.numel:
            raise ValueError(
                f"params: expected {total} elements in all, as in {path}, got {layout.numel}"
            )
        return layout.runs

    known, _ = _columns(path, ranks, own)
    if known["shapes"] is not None and [*map(tuple, known["shapes"])] != layout.shapes:
        raise ValueError(
            f"params: expected the shapes {known['shapes']}, as in {path}, got {layout.shapes}"
        )
    if "scale" in known:
        raise ValueError(f"{path}: expected a basis that is not quantised, got one of 8 bits")
    saved = known.pop("names")
    known |= {"shapes": [tuple(p.shape) for p in shards], "names": saved or names}
    result = LocalSubspace(
        known.pop("basis"), known.pop("origin"), entries[0].device_mesh, replicas=replicas, **known
    )
    result.layout = layout
    return result
