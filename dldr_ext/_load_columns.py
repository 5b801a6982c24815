"""Saved subspaces of which every rank reads its columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import ops
from ._cut import Run, cut, layout_of
from ._params import named_parameters
from ._placements import local_shards, replicas_of
from ._ranks import Ranks, members
from ._shared_file import read_columns
from .dcp import is_dcp, read_subspace, saved_shape
from .distributed import LocalSubspace, ShardedSubspace
from .storage import Reader
from .subspace import KIND, VERSION

__all__ = ["load_local", "load_sharded"]

Path = str | os.PathLike[str]


def load_sharded(path: Path, process_group: Any, device: Any) -> ShardedSubspace:
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


def load_local(path: Path, params: Iterable[Any]) -> LocalSubspace:
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


def _columns(
    path: Path,
    ranks: Ranks,
    own: Callable[[int], list[Run]],
) -> tuple[dict[str, Any], int]:
    """The arguments of a `Subspace` of this rank's columns, and n."""
    if is_dcp(path):
        with ranks.agreeing():
            shape = saved_shape(path, "subspace")
            runs = own(shape[1])
            ranks.agree({"dim": shape[0], "numel": shape[1]}, "load")
        found = read_subspace(path, runs, ranks.device, process_group=ranks.group)
        return found, shape[1]
    with ranks.agreeing():
        with Reader(path, KIND, VERSION, check=ranks.rank == 0) as file:
            total = file.part("origin").get_shape()[0]
            runs = own(total)
            found = {**file.metadata}
            for name in file.names():
                if name in ("basis", "origin"):
                    found[name] = read_columns(file, name, runs, ranks.device)
                elif name == "scale":
                    block = ops.SCALE_BLOCK
                    part = [(begin // block, -(-end // block)) for begin, end in runs]
                    found[name] = read_columns(file, name, part, ranks.device)
                else:
                    found[name] = file.read(name)
        ranks.agree({"numel": total}, "load")
    return found, total
