"""Subspaces of several bases, one for each group of parameters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..files import artifacts
from ..tensors.parameters import dtype_name, flatten, named_parameters, numel, type_name
from .base import AffineSubspace
from .dense import Subspace

_KIND, _VERSION = "grouped_subspace", 1


class GroupedSubspace(AffineSubspace):
    """A block-diagonal basis: each group of consecutive parameters has directions of its own.

    With d_i directions for the n_i weights of group i there are d = sum d_i coordinates, and
    sum d_i n_i numbers are stored and read in a pass, instead of d n. Optimizers take it like a
    `Subspace`; theta is the coordinates of the groups, one after the other.

    Parameters
    ----------
    subspaces : iterable of Subspace
        In the order of the parameters. They may differ in dimension and storage dtype, but either
        all or none are float64. Their bases are kept, not copied; their origins are.

    Attributes
    ----------
    subspaces : list of Subspace
    explained_variance_ratio, singular_values : Tensor, shape (d,), or None
        Those of the groups, one after the other: the ratios sum to at most 1 in each group.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """

    def __init__(self, subspaces: Iterable[Subspace]) -> None:
        listed = list(subspaces)
        if not listed:
            raise ValueError("subspaces: expected at least one Subspace, got an empty list")
        for i, one in enumerate(listed):
            if not isinstance(one, Subspace):
                raise TypeError(f"subspaces[{i}]: expected a Subspace, got {type_name(one)}")
            if one.device != listed[0].device:
                raise ValueError(
                    f"subspaces[{i}]: expected device {listed[0].device}, as subspaces[0], got "
                    f"{one.device}"
                )
            if one.coordinate_dtype != listed[0].coordinate_dtype:
                raise ValueError(
                    f"subspaces[{i}]: expected either all bases or none in float64, got "
                    f"{dtype_name(one.dtype)} beside {dtype_name(listed[0].dtype)}"
                )
        self.origin = torch.cat([one.origin for one in listed])
        # The origin of each group is a view of the whole one.
        self._sizes = [one.numel for one in listed]
        self.subspaces = [
            one._with(one.basis, origin, one.scale)
            for one, origin in zip(listed, self.origin.split(self._sizes), strict=True)
        ]
        self._dims = [one.dim for one in listed]
        self.explained_variance_ratio = _joined([one.explained_variance_ratio for one in listed])
        self.singular_values = _joined([one.singular_values for one in listed])
        self.shapes = _concatenated([one.shapes for one in listed])
        self.names = _concatenated([one.names for one in listed])

    @property
    def dim(self) -> int:
        """d, the number of directions of all groups together."""
        return sum(self._dims)

    def __repr__(self) -> str:
        dims = ", ".join(map(str, self._dims[:8])) + ", ..." * (len(self._dims) > 8)
        return (
            f"GroupedSubspace({len(self._dims)} groups, dim={self.dim} ({dims}), "
            f"numel={self.numel}, device={self.device})"
        )

    def report(self) -> str:
        """What was kept of each group and why: see `Subspace.report`."""
        return "\n\n".join(f"group {i}\n{one.report()}" for i, one in enumerate(self.subspaces))

    def reconstruct(self, theta: Tensor) -> Tensor:
        """Flat weights w0 + P theta, shape (n,); differentiable in theta."""
        return torch.cat([one.reconstruct(part) for one, part in self._coordinates(theta)])

    def direction(self, index: int) -> Tensor:
        """One basis vector, zero outside its group, shape (n,), in the dtype of the origin."""
        index = range(self.dim)[index]
        result = torch.zeros_like(self.origin)
        for one, piece in zip(self.subspaces, result.split(self._sizes), strict=True):
            if index < one.dim:
                piece.copy_(one.direction(index))
                break
            index -= one.dim
        return result

    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Coordinates of several lists of tensors, shape (len(lists), d): one pass for all."""
        cut = [list(self._pieces(tensors)) for tensors in lists]
        return torch.cat(
            [one.project_many(parts) for one, *parts in zip(self.subspaces, *cut, strict=True)], 1
        )

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """P theta and g - P c, both (n,), in one pass: see `ops.reconstruct_residual`."""
        both = [
            one.combine_residual(part, c, piece)
            for (one, part), (_, c), piece in zip(
                self._coordinates(theta),
                self._coordinates(coordinates),
                self._pieces(tensors),
                strict=True,
            )
        ]
        return torch.cat([u for u, _ in both]), torch.cat([r for _, r in both])

    def with_origin(self, params: Iterable[Any] | Tensor) -> GroupedSubspace:
        """The same directions through other weights: see `Subspace.with_origin`."""
        flat = flatten(self._weights(params), self.origin.dtype)
        pieces = flat.split(self._sizes)
        return GroupedSubspace(
            one.with_origin(piece) for one, piece in zip(self.subspaces, pieces, strict=True)
        )

    def nearest(self, params: Iterable[Any]) -> Tensor:
        """Coordinates of the point nearest to the weights: exact ones in 8 bits, (d,)."""
        exact = any(one.scale is not None for one in self.subspaces)
        return self.coordinates(params, exact=exact)

    def quantize(self, format: str) -> GroupedSubspace:
        """The same subspace with all bases in 8 bits: see `Subspace.quantize`."""
        return GroupedSubspace(one.quantize(format) for one in self.subspaces)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GroupedSubspace:
        """The same subspace on another device or with another dtype of all bases.

        See `Subspace.to`; ``self`` if nothing changes.
        """
        moved = [one.to(device, dtype) for one in self.subspaces]
        same = all(one is other for one, other in zip(moved, self.subspaces, strict=True))
        return self if same else GroupedSubspace(moved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves as a safetensors file; an earlier file is replaced once all is written."""
        tensors = {
            f"{i}.{name}": tensor
            for i, one in enumerate(self.subspaces)
            for name, tensor in one._tensors().items()
        }
        groups = [one._facts() for one in self.subspaces]
        artifacts.save(path, _KIND, _VERSION, tensors, {"groups": groups})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> GroupedSubspace:
        """Loads a saved subspace onto ``device``.

        Raises
        ------
        ValueError
            The file is truncated, corrupt or something else: with the path and what was found.
        """
        with artifacts.Reader(path, _KIND, _VERSION) as file:
            groups: list[dict[str, Any]] = [{} for _ in file.metadata["groups"]]
            for key in file.names():
                i, _, name = key.partition(".")
                groups[int(i)][name] = file.read(key, device)
            try:
                return cls(
                    Subspace(**tensors, **known)
                    for tensors, known in zip(groups, file.metadata["groups"], strict=True)
                )
            except (TypeError, ValueError) as error:
                raise file.error(f"not a usable grouped subspace: {error}") from error

    @classmethod
    def random(
        cls,
        params: Iterable[Any],
        dim: int,
        groups: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> GroupedSubspace:
        """Random orthonormal bases at the current weights: the control experiment.

        Parameters
        ----------
        params : iterable of Tensor
            ``model.parameters()``, or ``model.named_parameters()`` to keep the names too.
        dim : int
            Number of directions of each group; a smaller group has as many as it has weights.
        groups : sequence of int
            The number of parameters in each group: see `layer_groups`.
        generator, dtype
            As in `Subspace.random`.
        """
        listed, names = named_parameters(params)
        result = []
        for part in group_slices(groups, len(listed)):
            members = listed[part]
            named = members if names is None else list(zip(names[part], members, strict=True))
            most = min(dim, numel(members))
            result.append(Subspace.random(named, most, generator=generator, dtype=dtype))
        return cls(result)

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        pieces = zip(self.subspaces, self._pieces(tensors), strict=True)
        return torch.cat([one._project(piece) for one, piece in pieces])

    def _solve(self, coordinates: Tensor) -> Tensor:
        return torch.cat([one._solve(c) for one, c in self._coordinates(coordinates)])

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        origins = [None] * len(self._sizes) if origin is None else origin.split(self._sizes)
        parts, pieces = list(self._coordinates(theta)), list(self._pieces(tensors, written=True))
        for (one, part), piece, start in zip(parts, pieces, origins, strict=True):
            one._write(piece, part, start)

    def _coordinates(self, theta: Tensor) -> Iterator[tuple[Subspace, Tensor]]:
        """Each group and its coordinates."""
        if not isinstance(theta, Tensor):
            raise TypeError(f"theta: expected a tensor, got {type_name(theta)}")
        if theta.shape != (self.dim,):
            raise ValueError(f"theta: expected shape ({self.dim},), got {tuple(theta.shape)}")
        return zip(self.subspaces, theta.split(self._dims), strict=True)

    def _pieces(self, tensors: Sequence[Any], written: bool = False) -> Iterator[list[Tensor]]:
        """The tensors of each group. One that reaches over a border, as a flat vector, is cut."""
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors[{i}]: expected a tensor, got {type_name(tensor)}")
        if numel(tensors) != self.numel:
            raise ValueError(
                f"tensors: expected {self.numel} elements in all (columns of basis), got "
                f"{numel(tensors)}"
            )
        return _cut(tensors, self._sizes, written)


def layer_groups(model: nn.Module, depth: int | None = None) -> list[int]:
    """The number of trainable parameters in each layer, in order: for arguments ``groups``.

    Parameters
    ----------
    model : nn.Module
    depth : int, optional
        How many levels of modules to tell apart: 1 makes each child of the model one group, say
        each stage of a residual network. Default: each module that holds parameters itself.

    Returns
    -------
    list of int
        Tied parameters count once, frozen ones not, as in ``model.parameters()`` elsewhere here.
    """
    if depth is not None and depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")
    _, names = named_parameters(model.named_parameters(), "model")
    assert names is not None
    layers = [name.split(".")[:-1][:depth] for name in names]
    return [len(list(members)) for _, members in groupby(layers)]


def group_slices(groups: Sequence[int], count: int) -> list[slice]:
    """The parameters of each group as slices of a list of ``count``."""
    sizes = list(groups)
    for i, size in enumerate(sizes):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"groups[{i}]: expected a number of parameters, at least 1, got {size!r}"
            )
    if sum(sizes) != count:
        raise ValueError(f"groups: expected {count} parameters in all, got {sum(sizes)}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _cut(tensors: Sequence[Tensor], sizes: Sequence[int], written: bool) -> Iterator[list[Tensor]]:
    rest = list(reversed(tensors))
    for size in sizes:
        piece: list[Tensor] = []
        while size:
            tensor = rest.pop()
            if tensor.numel() > size:
                if written and not tensor.is_contiguous():
                    raise ValueError(
                        "params: expected groups that end where parameters end, or contiguous "
                        f"parameters, got strides {tensor.stride()}"
                    )
                flat = (tensor.detach() if written else tensor).reshape(-1)
                rest.append(flat[size:])
                tensor = flat[:size]
            size -= tensor.numel()
            piece.append(tensor)
        yield piece


def _joined(known: list[Tensor | None]) -> Tensor | None:
    found = [one for one in known if one is not None]
    return torch.cat(found) if len(found) == len(known) else None


def _concatenated(known: list[list[Any] | None]) -> list[Any] | None:
    found = [one for one in known if one is not None]
    return [entry for one in found for entry in one] if len(found) == len(known) else None
