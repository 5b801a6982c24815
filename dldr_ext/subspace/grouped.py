"""Subspaces of several bases, one for each group of parameters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..files import artifacts
from ..tensors.names import plain_names
from ..tensors.parameters import dtype_name, named_parameters, numel, type_name
from .base import AffineSubspace
from .dense import Subspace

_KIND, _VERSION = "grouped_subspace", 1
_Value = TypeVar("_Value")


class GroupedSubspace(AffineSubspace):
    """The weights w0 + P theta with a block-diagonal P: each group has directions of its own.

    A group is some consecutive parameters, as `layer_groups` counts them. With d_i directions for
    the n_i weights of group i there are d = sum d_i coordinates, and
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
    explained_variance_ratio, singular_values, mean : Tensor, shape (d,), or None
        Those of the groups, one after the other: the ratios sum to at most 1 in each group.

    Raises
    ------
    TypeError, ValueError
        Naming the first entry that is no `Subspace`, or not one beside the others.

    See Also
    --------
    dldr_ext.Trajectory.grouped_subspace : The principal directions of each group.
    layer_groups : Groups for the layers of a model.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import GroupedSubspace, layer_groups
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> space = GroupedSubspace.random(model.named_parameters(), dim=5, groups=layer_groups(model))
    >>> space
    GroupedSubspace(2 groups, dim=10 (5, 5), numel=23, device=cpu)
    >>> [space.direction(i)[:15].any().item() for i in (4, 5)]
    [True, False]
    """

    def __init__(self, subspaces: Iterable[Subspace]) -> None:
        listed = list(subspaces)
        if not listed:
            raise ValueError("subspaces: expected at least one Subspace, got an empty list")
        for i, space in enumerate(listed):
            if not isinstance(space, Subspace):
                raise TypeError(f"subspaces[{i}]: expected a Subspace, got {type_name(space)}")
            if space.device != listed[0].device:
                raise ValueError(
                    f"subspaces[{i}]: expected device {listed[0].device}, as subspaces[0], got "
                    f"{space.device}"
                )
            if space.coordinate_dtype != listed[0].coordinate_dtype:
                raise ValueError(
                    f"subspaces[{i}]: expected either all bases or none in float64, got "
                    f"{dtype_name(space.dtype)} beside {dtype_name(listed[0].dtype)}"
                )
        self.origin = torch.cat([space.origin for space in listed])
        # The origin of each group is a view of the whole one.
        self._sizes = [space.numel for space in listed]
        origins = self.origin.split(self._sizes)
        self.subspaces = [
            space._moved_to(origin) for space, origin in zip(listed, origins, strict=True)
        ]
        for space, moved in zip(listed, self.subspaces, strict=True):
            moved.mean = space.mean  # the same place, in another memory
        self._dims = [space.dim for space in listed]
        ratios = _if_all_known([space.explained_variance_ratio for space in listed])
        self.explained_variance_ratio = None if ratios is None else torch.cat(ratios)
        values = _if_all_known([space.singular_values for space in listed])
        self.singular_values = None if values is None else torch.cat(values)
        means = _if_all_known([space.mean for space in listed])
        self.mean = None if means is None else torch.cat(means)
        self.choice = None  # each group has its own
        shapes = _if_all_known([space.shapes for space in listed])
        self.shapes = None if shapes is None else list(chain(*shapes))
        names = _if_all_known([space.names for space in listed])
        self.names = None if names is None else list(chain(*names))

    @property
    def dim(self) -> int:
        """d, the number of directions of all groups together."""
        return sum(self._dims)

    @property
    def spread(self) -> Tensor | None:
        """Standard deviations of the snapshots along each direction: see `Subspace.spread`."""
        spreads = _if_all_known([space.spread for space in self.subspaces])
        return None if spreads is None else torch.cat(spreads)

    def __repr__(self) -> str:
        dims = ", ".join(map(str, self._dims[:8])) + ", ..." * (len(self._dims) > 8)
        return (
            f"GroupedSubspace({len(self._dims)} groups, dim={self.dim} ({dims}), "
            f"numel={self.numel}, device={self.device})"
        )

    def report(self) -> str:
        """Return what was kept of each group and why: see `Subspace.report`.

        Returns
        -------
        str
        """
        reports = (space.report() for space in self.subspaces)
        return "\n\n".join(f"group {i}\n{report}" for i, report in enumerate(reports))

    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the coordinates of several lists of tensors, (len(lists), d), in one pass."""
        groups = zip(self.subspaces, *map(self._split, lists), strict=True)
        return torch.cat([space.project_many(members) for space, *members in groups], 1)

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return P theta and g - P c, both (n,), in one pass: `ops.reconstruct_residual`."""
        groups = zip(
            self._by_group(theta), self._by_group(coordinates), self._split(tensors), strict=True
        )
        pairs = [space.combine_residual(t, c, members) for (space, t), (_, c), members in groups]
        return torch.cat([u for u, _ in pairs]), torch.cat([r for _, r in pairs])

    def quantize(self, format: str) -> GroupedSubspace:
        """Return the same subspace with all bases in 8 bits: see `Subspace.quantize`."""
        return GroupedSubspace(space.quantize(format) for space in self.subspaces)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GroupedSubspace:
        """Return the same subspace on another device or with another dtype of all bases.

        See `Subspace.to`; ``self`` if nothing changes.
        """
        moved = [space.to(device, dtype) for space in self.subspaces]
        same = all(new is old for new, old in zip(moved, self.subspaces, strict=True))
        return self if same else GroupedSubspace(moved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save all groups in one safetensors file.

        Parameters
        ----------
        path : str or path-like
            `GroupedSubspace.load` opens the file. An earlier one is replaced once all is written.
        """
        tensors = {
            f"{i}.{name}": tensor
            for i, space in enumerate(self.subspaces)
            for name, tensor in space._tensors().items()
        }
        groups = [space._facts() for space in self.subspaces]
        artifacts.save(path, _KIND, _VERSION, tensors, {"groups": groups})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> GroupedSubspace:
        """Load a saved subspace.

        Parameters
        ----------
        path : str or path-like
        device : torch.device or str
            Where the tensors go.

        Returns
        -------
        GroupedSubspace

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
        """Return random orthonormal bases at the current weights: the control experiment.

        Parameters
        ----------
        params : iterable of Tensor
            As in `Subspace.random`.
        dim : int
            Number of directions of each group; a smaller group has as many as it has weights.
        groups : sequence of int
            The number of parameters in each group: see `layer_groups`.
        generator, dtype
            As in `Subspace.random`.

        Returns
        -------
        GroupedSubspace

        Raises
        ------
        TypeError, ValueError
            As in `Subspace.random`; groups that are not those of the parameters.
        """
        listed, names = named_parameters(params)
        subspaces = []
        for group in group_slices(groups, len(listed)):
            members = listed[group]
            named = members if names is None else list(zip(names[group], members, strict=True))
            most = min(dim, numel(members))
            subspaces.append(Subspace.random(named, most, generator=generator, dtype=dtype))
        return cls(subspaces)

    @property
    def _rounded(self) -> bool:
        return any(space._rounded for space in self.subspaces)

    def _reconstruct(self, theta: Tensor) -> Tensor:
        return torch.cat([space.reconstruct(t) for space, t in self._by_group(theta)])

    def _direction(self, index: int) -> Tensor:
        index = range(self.dim)[index]
        result = torch.zeros_like(self.origin)
        for space, columns in zip(self.subspaces, result.split(self._sizes), strict=True):
            if index < space.dim:
                columns.copy_(space.direction(index))
                break
            index -= space.dim
        return result

    def _moved_to(self, origin: Tensor) -> GroupedSubspace:
        origins = zip(self.subspaces, origin.split(self._sizes), strict=True)
        return GroupedSubspace(space._moved_to(part) for space, part in origins)

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        groups = zip(self.subspaces, self._split(tensors), strict=True)
        return torch.cat([space._project(members) for space, members in groups])

    def _solve(self, coordinates: Tensor) -> Tensor:
        return torch.cat([space._solve(c) for space, c in self._by_group(coordinates)])

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        origins = [None] * len(self._sizes) if origin is None else origin.split(self._sizes)
        groups, targets = list(self._by_group(theta)), list(self._split(tensors, written=True))
        for (space, t), members, start in zip(groups, targets, origins, strict=True):
            space._write(members, t, start)

    def _by_group(self, theta: Tensor) -> Iterator[tuple[Subspace, Tensor]]:
        """Return each group and its coordinates."""
        return zip(self.subspaces, self._checked_theta(theta).split(self._dims), strict=True)

    def _split(self, tensors: Sequence[Any], written: bool = False) -> Iterator[list[Tensor]]:
        """Return the tensors of each group. One that spans several, as a flat vector, is split."""
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors[{i}]: expected a tensor, got {type_name(tensor)}")
        if numel(tensors) != self.numel:
            raise ValueError(
                f"tensors: expected {self.numel} elements in all (columns of basis), got "
                f"{numel(tensors)}"
            )
        return _split(tensors, self._sizes, written)


def layer_groups(model: nn.Module, depth: int | None = None) -> list[int]:
    """Return the number of trainable parameters in each layer, in order, for ``groups=``.

    Parameters
    ----------
    model : nn.Module
    depth : int, optional
        How many levels of modules to tell apart, below those that hold the whole model alone
        (``torch.compile``, ``DataParallel``, a LightningModule around it): 1 makes each child of
        the model one group, say each stage of a residual network. Default: each module that holds
        parameters itself.

    Returns
    -------
    list of int
        Tied parameters count once, frozen ones not, as in ``model.parameters()`` elsewhere here.

    Raises
    ------
    ValueError
        ``depth`` below 1; a model without parameters.

    See Also
    --------
    GroupedSubspace : A subspace with directions of its own for each group.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import layer_groups
    >>> block = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    >>> model = torch.nn.Sequential(block, torch.nn.Linear(2, 1))
    >>> layer_groups(model), layer_groups(model, depth=1)
    ([2, 1, 2], [3, 2])
    """
    if depth is not None and depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")
    _, names = named_parameters(model.named_parameters(), "model")
    assert names is not None
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    plain = dict(zip(every, plain_names(every), strict=True))
    paths = {name: plain[name].split(".")[:-1] for name in every}
    # Below the modules that hold everything: they are around the model.
    levels = zip(*paths.values(), strict=False)
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    end = None if depth is None else shared + depth
    return [len(list(members)) for _, members in groupby(paths[name][:end] for name in names)]


def group_slices(groups: Sequence[int], count: int) -> list[slice]:
    """Return the parameters of each group as slices of a list of ``count``."""
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


def _split(
    tensors: Sequence[Tensor], sizes: Sequence[int], written: bool
) -> Iterator[list[Tensor]]:
    rest = list(reversed(tensors))
    for size in sizes:
        members: list[Tensor] = []
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
            members.append(tensor)
        yield members


def _if_all_known(values: Sequence[_Value | None]) -> list[_Value] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
