"""Subspaces of fully sharded parameters (FSDP2, DTensor)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .. import ops
from ..collectives.dtensors import entries, local_columns, local_shards, replicas_of
from ..collectives.partition import Layout, Run, layout_of
from ..collectives.process_group import Ranks, resolve_group
from ..subspace.dense import Subspace
from ..tensors.parameters import check_names, flatten, is_dtensor, local_shard, named_parameters
from .partitioned import METADATA, PartitionedSubspace, read_partition


class LocalSubspace(PartitionedSubspace):
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
    **arguments
        Of `Subspace`: ``scale``, ``shapes`` (local), ``names``, ``singular_values``, ...

    Attributes
    ----------
    local : Subspace or None
        The columns of this rank; None where it has none.

    See Also
    --------
    ShardedSubspace : For weights that every rank holds whole.
    dldr_ext.Trajectory : ``Trajectory(params, process_group=model)`` records DTensors, and its
        ``subspace()`` is a `LocalSubspace`.
    """

    def __init__(
        self,
        basis: Tensor,
        origin: Tensor,
        process_group: Any,
        *,
        replicas: int = 1,
        **arguments: Any,
    ) -> None:
        group, _ = resolve_group("LocalSubspace", process_group)
        local = Subspace(basis, origin, **arguments) if basis.shape[1] else None
        ranks = Ranks("LocalSubspace", group, origin.device)
        if local is not None:  # as the Subspace has converted them
            arguments |= {name: getattr(local, name) for name in METADATA}
        super().__init__(len(basis), local, ranks, basis[:, :0], **arguments)
        self.origin = origin if local is None else local.origin
        self.shapes, self.names = arguments.get("shapes"), arguments.get("names")
        self.replicas = replicas
        self.layout: Layout | None = None  # where these columns are among all, if known

    @classmethod
    def of(cls, subspace: Subspace, params: Iterable[Any]) -> LocalSubspace:
        """Take this rank's columns of a whole subspace.

        Parameters
        ----------
        subspace : Subspace
            Not quantised; every rank has it (or maps it from a file) for this once.
        params : iterable of DTensor
            Of `fully_shard`, in the order that the subspace was made with.

        Returns
        -------
        LocalSubspace

        Raises
        ------
        ValueError
            Placements that have no part here, such as ``Partial``; weights of which some are held
            by more ranks than others.
        """
        tensors, names = entries(params)
        check_names(names, subspace.names, "subspace")
        replicas, columns = replicas_of(tensors), local_columns(tensors).to(subspace.device)
        result = cls(
            subspace.basis[:, columns],
            subspace.origin[columns],
            tensors[0].device_mesh,
            replicas=replicas,
            shapes=[tuple(p.shape) for p in local_shards(tensors)],
            names=subspace.names,
            **{name: getattr(subspace, name) for name in METADATA},
        )
        result.layout = layout_of(tensors)
        return result

    @classmethod
    def random(cls, params: Iterable[Any], dim: int, *, seed: int = 0) -> LocalSubspace:
        """Draw random orthonormal directions at the current weights, shard by shard.

        Parameters
        ----------
        params : iterable of DTensor
        dim : int
            d, the number of directions.
        seed : int
            The same on every rank; for one number of ranks it gives the same directions.

        Returns
        -------
        LocalSubspace
        """
        tensors, names = entries(params)
        replicas, shards = replicas_of(tensors), local_shards(tensors)
        origin = flatten(shards, torch.float32)
        columns = local_columns(tensors)
        # Ranks that hold the same shards draw the same numbers.
        first = int(columns[0]) if len(columns) else 0
        generator = torch.Generator(origin.device).manual_seed(seed * 1_000_003 + first)
        basis = torch.randn(dim, len(origin), generator=generator, device=origin.device)
        mesh = tensors[0].device_mesh
        group, _ = resolve_group("LocalSubspace", mesh)
        ranks = Ranks("LocalSubspace", group, origin.device)
        for _ in range(2):  # Cholesky QR, twice for its digits
            gram = ops.gram(basis) if len(origin) else basis.new_zeros(dim, dim).double()
            ranks.sum_(gram.div_(replicas), "a Gram matrix")
            factor = torch.linalg.cholesky(gram)
            identity = torch.eye(dim, dtype=gram.dtype, device=gram.device)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            if len(origin):
                basis = ops.form_basis(basis, inverse)
        shapes = [tuple(p.shape) for p in shards]
        result = cls(basis, origin, mesh, replicas=replicas, shapes=shapes, names=names)
        result.layout = layout_of(tensors)
        return result

    @classmethod
    def load(cls, path: str | os.PathLike[str], params: Iterable[Any]) -> LocalSubspace:
        """Load the columns of these shards of a saved subspace; the others are not read.

        Parameters
        ----------
        path : path
            A file that `Subspace.save` wrote, or a folder that torch.distributed.checkpoint wrote,
            with `dldr_ext.dcp.stateful` under the key "subspace".
        params : iterable of DTensor
            In the order that the subspace was made with.

        Returns
        -------
        LocalSubspace

        Raises
        ------
        ValueError
            On every rank: the parameters do not match, or the basis has 8 bits.
        """
        tensors, names = entries(params)
        replicas, shards = replicas_of(tensors), local_shards(tensors)
        mesh = tensors[0].device_mesh
        group, _ = resolve_group("LocalSubspace", mesh)
        layout = layout_of(tensors)

        def runs_here(total: int) -> list[Run]:
            if total != layout.numel:
                raise ValueError(
                    f"params: expected {total} elements in all, as in {path}, got {layout.numel}"
                )
            return layout.runs

        ranks = Ranks("LocalSubspace", group, shards[0].device)
        arguments, _ = read_partition(path, ranks, runs_here)
        shapes = arguments["shapes"]
        if shapes is not None and [*map(tuple, shapes)] != layout.shapes:
            raise ValueError(
                f"params: expected the shapes {shapes}, as in {path}, got {layout.shapes}"
            )
        check_names(names, arguments["names"], f"subspace {path}")
        if "scale" in arguments:
            raise ValueError(f"{path}: expected a basis that is not quantised, got one of 8 bits")
        arguments |= {
            "shapes": [tuple(p.shape) for p in shards],
            "names": arguments["names"] or names,
        }
        basis, origin = arguments.pop("basis"), arguments.pop("origin")
        result = cls(basis, origin, mesh, replicas=replicas, **arguments)
        result.layout = layout
        return result

    @override
    def partial_sum(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        # Gradients of shards are means over the ranks already: only replicas count twice.
        return self._products(lists).div_(self.replicas)

    @override
    def weight(self, size: int) -> float:
        return 1.0 / self.replicas

    @override
    def dot(self, a: Tensor, b: Tensor) -> float:
        product = torch.dot(a, b).to(torch.float64).reshape(1) / self.replicas
        return float(self.ranks.sum_(product, "a product"))

    def _direction(self, index: int) -> Tensor:
        return torch.empty_like(self.origin) if self.local is None else self.local.direction(index)

    @override
    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.local is None:
            return torch.empty_like(self.origin), torch.empty_like(self.origin)
        return self.local.combine_residual(theta, coordinates, tensors)

    def _moved_to(self, origin: Tensor) -> LocalSubspace:
        local = None if self.local is None else self.local.with_origin(origin)
        result = self._with_columns(local)
        result.mean = None
        return result

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        if self.local is not None:
            self.local._write(tensors, theta, origin)

    def _weights(self, params: Iterable[Any] | Tensor) -> list[Tensor]:
        tensors, names = named_parameters([params] if isinstance(params, Tensor) else params)
        shards = [local_shard(p) for p in tensors]
        if torch.is_grad_enabled():  # so that a derivative that is asked for is refused
            for i, p in enumerate(tensors):
                if is_dtensor(p) and p.requires_grad:
                    shards[i] = shards[i].detach().requires_grad_()
        return super()._weights(shards if names is None else zip(names, shards, strict=True))

    @property
    def _total(self) -> int:
        return self.numel if self.layout is None else self.layout.numel

    def _with_columns(self, local: Subspace | None) -> LocalSubspace:
        basis, origin = self._placeholder, self.origin
        arguments = {"shapes": self.shapes, "names": self.names, **self._metadata()}
        if local is not None:
            basis, origin = local.basis, local.origin
            arguments["scale"] = local.scale
        group, replicas = self.ranks.group, self.replicas
        result = LocalSubspace(basis, origin, group, replicas=replicas, **arguments)
        result.layout = self.layout
        return result
