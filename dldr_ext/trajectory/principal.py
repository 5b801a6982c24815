"""Subspaces of principal directions, made of the rows of a store."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives.partition import Layout
from ..distributed.local import LocalSubspace
from ..distributed.sharded import ShardedSubspace
from ..pca.decomposition import Decomposition, decompose
from ..pca.dimension import Request
from ..pca.form_basis import combined, formed
from ..pca.gram import column_step, exact_gram
from ..pca.spectrum import square_of
from ..subspace.dense import Subspace
from ..subspace.grouped import GroupedSubspace, group_slices
from ..subspace.implicit import ImplicitSubspace
from ..tensors.formats import block_range
from ..tensors.matrices import Matrix, as_stored, columns, scaled, stored_pieces
from .stores import ShardedStore, Store

Shapes = list[tuple[int, ...]]


def weights_at(snapshots: Matrix, anchor: Tensor, start: str | int) -> Tensor:
    """Return the weights (n,) of one snapshot, or their mean, in the dtype of the anchor."""
    count = len(snapshots)
    if start == "mean":
        mean = torch.full((1, count), 1 / count, dtype=torch.float64, device=snapshots.device)
        step = column_step(snapshots)
        return combined(snapshots, mean, anchor.dtype, step)[0].add_(anchor)
    if isinstance(start, str):
        if start not in ("first", "last"):
            raise ValueError(f"start: expected 'first', 'last', 'mean' or an index, got {start!r}")
        index = 0 if start == "first" else count - 1
    else:
        index = operator.index(start)
        if not -count <= index < count:
            raise ValueError(f"start: expected an index of the {count} snapshots, got {index}")
    return snapshots[index].to(anchor.dtype, copy=True).add_(anchor)


def principal_components(
    store: Store, origin: Tensor, request: Request, *, double: bool
) -> Decomposition:
    """Return the principal components of all columns of the rows in a store.

    Parameters
    ----------
    store : Store
    origin : Tensor, shape (columns of the store,)
        A point of the trajectory.
    request : Request
    double : bool
        Neither the weights nor the snapshots were ever rounded to less than float64.
    """
    square = float(store.summed(square_of(origin)[None]))
    return decompose(
        store.exact_gram(), square, request, double=double, solved_once=store.solved_once
    )


def dense_subspace(
    snapshots: Matrix,
    components: Decomposition,
    origin: Tensor,
    dtype: torch.dtype,
    shapes: Shapes,
    names: list[str] | None,
) -> Subspace:
    """Return the subspace with the basis C X, formed chunk by chunk."""
    coefficients = components.coefficients.to(snapshots.device)
    basis, scale = formed(snapshots, coefficients, dtype, column_step(snapshots))
    described = {"shapes": shapes, "names": names, **components.metadata()}
    return Subspace(basis, origin, scale=scale, **described)


def subspace_in_place(
    snapshots: Matrix,
    components: Decomposition,
    origin: Tensor,
    shapes: Shapes,
    names: list[str] | None,
    consume: Callable[[], None],
) -> Subspace:
    """Return the same, its basis written over the first rows of the snapshots.

    Parameters
    ----------
    consume : callable
        Called before anything is overwritten.
    """
    matrix, scale = _in_memory(snapshots)
    coefficients = components.coefficients.to(matrix.device)
    basis, step = matrix[: components.dim], column_step(snapshots)
    scale = None if scale is None else scale[: components.dim]
    consume()
    for begin, codes, factors in stored_pieces(snapshots, step):
        chunk = scaled(codes.contiguous(), factors)
        new, new_factors = formed(chunk, coefficients, matrix.dtype, step)
        end = begin + new.shape[1]
        basis[:, begin:end] = new
        if scale is not None and new_factors is not None:
            scale[:, slice(*block_range(begin, end))] = new_factors
    metadata = components.metadata()
    return Subspace(basis, origin, scale=scale, shapes=shapes, names=names, **metadata)


def implicit_subspace(
    snapshots: Matrix,
    components: Decomposition,
    origin: Tensor,
    shapes: Shapes,
    names: list[str] | None,
) -> ImplicitSubspace:
    """Return the same without a basis: the snapshots are read instead."""
    matrix, scale = _in_memory(snapshots)
    return ImplicitSubspace(
        matrix,
        components.coefficients.to(matrix.device),
        origin,
        scale=scale,
        shapes=shapes,
        names=names,
        **components.metadata(),
    )


def grouped_subspace(
    snapshots: Matrix,
    groups: Sequence[int],
    origin: Tensor,
    start: str | int,
    request: Request,
    dtype: torch.dtype,
    shapes: Shapes,
    names: list[str] | None,
    *,
    double: bool,
) -> tuple[GroupedSubspace, list[str]]:
    """Form a basis of its own for each group of parameters; and return what to warn of."""
    subspaces, warnings, end = [], [], 0
    for i, group in enumerate(group_slices(groups, len(shapes))):
        begin, end = end, end + sum(map(math.prod, shapes[group]))
        rows, point = columns(snapshots, begin, end), origin[begin:end]
        square = float(square_of(point))
        try:
            components = decompose(exact_gram(rows), square, request, double=double)
        except ValueError as error:
            raise ValueError(f"groups[{i}]: {error}") from None
        if components.warning is not None:
            warnings.append(components.warning)
        of_group = shapes[group], None if names is None else names[group]
        seen = components.seen_from(start)
        subspaces.append(dense_subspace(rows, seen, point, dtype, *of_group))
    return GroupedSubspace(subspaces), warnings


def subspace_over_ranks(
    store: ShardedStore,
    components: Decomposition,
    origin: Tensor,
    dtype: torch.dtype,
    shapes: Shapes,
    names: list[str] | None,
) -> ShardedSubspace | LocalSubspace:
    """Return the subspace of which each rank has its columns."""
    ranks, shard = store.ranks, store.shard
    basis, scale = torch.empty((components.dim, 0), dtype=dtype, device=store.device), None
    if shard.numel:
        rows, coefficients = store.snapshots(), components.coefficients.to(store.device)
        basis, scale = formed(rows, coefficients, dtype, column_step(rows))
    metadata: dict[str, Any] = {"scale": scale, **components.metadata()}
    if shard.mesh is None:
        metadata |= {"shapes": shapes, "names": names}
        return ShardedSubspace.of_columns(basis, origin, shard.total, ranks, **metadata)
    metadata |= {"shapes": shard.shapes, "names": shard.names}
    result = LocalSubspace(basis, origin, ranks.group, replicas=shard.replicas, **metadata)
    result.layout = Layout(shard.runs, shapes)
    return result


def _in_memory(snapshots: Matrix) -> tuple[Tensor, Tensor | None]:
    """Return rows that are one matrix in memory, and their scale in 8 bits."""
    matrix, scale = as_stored(snapshots)
    assert isinstance(matrix, Tensor) and (scale is None or isinstance(scale, Tensor))
    return matrix, scale
