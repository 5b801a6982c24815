"""What subspaces have in common of which each rank has some columns."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..collectives.partition import Run
from ..collectives.process_group import Ranks
from ..files.artifacts import Reader, read_columns
from ..files.column_checkpoint import is_dcp, read_subspace, saved_shape, scale_runs
from ..pca import report as report_module
from ..subspace.base import AffineSubspace
from ..subspace.dense import KIND, VERSION, Subspace


class CutSubspace(AffineSubspace):
    """What a rank holds: a `Subspace` of its columns, or None where it has none."""

    spans_ranks = True
    _basis: Tensor  # (d, 0) in its dtype where `local` is None

    def __init__(self, dim: int, local: Subspace | None, ranks: Ranks) -> None:
        self._dim, self.local, self.ranks = dim, local, ranks
        self.explained_variance_ratio = None if local is None else local.explained_variance_ratio
        self.singular_values = None if local is None else local.singular_values
        self.choice = None if local is None else local.choice  # see `Subspace`

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
        c = self.ranks.sum_(self.partial_sum(lists, self.ranks.size), "coordinates")
        return c.to(self.coordinate_dtype)

    def _reconstruct(self, theta: Tensor) -> Tensor:
        if theta.requires_grad and torch.is_grad_enabled():
            raise ValueError("theta: expected a tensor that needs no gradient, got one that does")
        result = torch.empty_like(self.origin)
        self._write([result], theta.detach(), self.origin)
        return result

    def report(self) -> str:
        """What was kept and why, as `Subspace.report` says it: of all ranks' columns."""
        dtype = (self._basis if self.local is None else self.local.basis).dtype
        ratio = self.explained_variance_ratio
        return report_module.report(self.dim, self._total, dtype, self.choice, ratio)

    @property
    def _total(self) -> int:
        """Columns of all ranks, as far as that is known."""
        return self.numel

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


StrPath = str | os.PathLike[str]


def _columns(
    path: StrPath,
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
                    found[name] = read_columns(file, name, scale_runs(runs), ranks.device)
                else:
                    found[name] = file.read(name)
        ranks.agree({"numel": total}, "load")
    return found, total
