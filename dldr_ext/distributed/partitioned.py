"""What subspaces have in common whose basis is partitioned by columns over ranks."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..collectives.partition import Run, block_runs
from ..collectives.process_group import Ranks, failing_together
from ..files.artifacts import Reader, read_columns
from ..files.column_checkpoint import is_dcp, read_subspace, saved_shape
from ..pca.report import report
from ..subspace.base import PER_DIRECTION, AffineSubspace
from ..subspace.dense import KIND, VERSION, Subspace
from ..tensors.derivatives import refuse, refuse_transforms, undefined

METADATA = (*PER_DIRECTION, "choice")


class PartitionedSubspace(AffineSubspace):
    """A subspace of which a rank holds some columns: a `Subspace` of these, or None without any.

    Parameters
    ----------
    dim : int
    local : Subspace or None
        The columns of this rank.
    ranks : Ranks
    placeholder : Tensor, shape (d, 0)
        What stands for the basis where there are no columns: of its dtype.
    **metadata
        What is known of the directions (``singular_values``, ...) and ``choice``, the same on every
        rank.
    """

    spans_ranks = True

    def __init__(
        self,
        dim: int,
        local: Subspace | None,
        ranks: Ranks,
        placeholder: Tensor,
        **metadata: Any,
    ) -> None:
        self._dim, self.local, self.ranks = dim, local, ranks
        self._placeholder = placeholder
        for name in METADATA:
            setattr(self, name, metadata.get(name))

    choice: dict[str, Any] | None

    @property
    @override
    def dim(self) -> int:
        return self._dim

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dim={self.dim}, numel={self.numel}, rank {self.ranks.rank} of "
            f"{self.ranks.size} with {self._columns_here} columns)"
        )

    @property
    def _columns_here(self) -> int:
        return 0 if self.local is None else self.local.numel

    def _metadata(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in METADATA}

    @override
    @torch.no_grad()
    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the coordinates of the ranks' mean of several lists, shape (len(lists), d)."""
        c = self.ranks.sum_(self.partial_sum(lists, self.ranks.size), "coordinates")
        return c.to(self.coordinate_dtype)

    def _reconstruct(self, theta: Tensor) -> Tensor:
        refuse(f"{type(self).__name__}.reconstruct", theta=theta)
        result = torch.empty_like(self.origin)
        self._write([result], theta.detach(), self.origin)
        return result

    def report(self) -> str:
        """Return what was kept and why, as `Subspace.report` says it: of all ranks' columns.

        Returns
        -------
        str
            Some lines, the same on every rank.
        """
        dtype = (self._placeholder if self.local is None else self.local.basis).dtype
        ratio = self.explained_variance_ratio
        return report(self.dim, self._total, dtype, self.choice, ratio)

    @property
    def _total(self) -> int:
        """Columns of all ranks, as far as that is known."""
        return self.numel

    @override
    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the columns of this rank, as a file of a `Subspace`.

        Parameters
        ----------
        path : path
            ``name-00001-of-00004.safetensors`` is written for ``name.safetensors``; a rank without
            columns writes none.

        See Also
        --------
        dldr_ext.dcp.stateful : One folder that any number of ranks can load.
        """
        if self.local is not None:
            path, ranks = Path(path), self.ranks
            number = f"{ranks.rank + 1:05}-of-{ranks.size:05}"
            self.local.save(path.with_name(f"{path.stem}-{number}{path.suffix}"))

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        where = f"{type(self).__name__}.project"
        refuse_transforms(where, tensors=tensors)
        return undefined(where, self.project_many([tensors])[0], tensors)

    def _products(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return products with this rank's columns alone, (len(lists), d) float64."""
        if self.local is None:
            return torch.zeros(len(lists), self.dim, dtype=torch.float64, device=self.device)
        return self.local.project_many(lists).to(torch.float64)

    @abstractmethod
    def _with_columns(self, local: Subspace | None) -> Any:
        """Return the same partition with other columns."""

    @override
    def quantize(self, format: str) -> Any:
        """Return the same subspace with the basis in 8 bits: see `Subspace.quantize`."""
        return self._with_columns(None if self.local is None else self.local.quantize(format))

    @override
    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        """Return the same subspace with another dtype of the basis.

        Parameters
        ----------
        device : torch.device or str, optional
            None or that of the ranks: a process group belongs to one kind of device.
        dtype : torch.dtype, optional
            float32, bfloat16, float16 or float64.

        Returns
        -------
        subspace of the same kind

        Raises
        ------
        ValueError
            Another device than that of the ranks.
        """
        if device is not None and torch.device(device) != self.device:
            raise ValueError(f"device: expected {self.device}, that of the ranks, got {device}")
        return self._with_columns(None if self.local is None else self.local.to(dtype=dtype))


def read_partition(
    path: str | os.PathLike[str], ranks: Ranks, runs_of: Callable[[int], list[Run]]
) -> tuple[dict[str, Any], int]:
    """Read this rank's columns of a saved subspace.

    Parameters
    ----------
    path : path
        A file of `Subspace.save`, or a folder of torch.distributed.checkpoint.
    ranks : Ranks
    runs_of : callable
        Gives the columns of this rank, of n.

    Returns
    -------
    dict
        Arguments of a `Subspace`.
    int
        n.
    """
    if is_dcp(path):
        with failing_together(ranks):
            dim, total = saved_shape(path, "subspace")
            runs = runs_of(total)
            ranks.check_consistent({"dim": dim, "numel": total}, "load")
        return read_subspace(path, runs, ranks.device, process_group=ranks.group), total
    with failing_together(ranks):
        with Reader(path, KIND, VERSION, check=ranks.rank == 0) as file:
            total = file.part("origin").get_shape()[0]
            runs = runs_of(total)
            arguments = {**file.metadata}
            columns = {"basis": runs, "origin": runs, "scale": block_runs(runs)}
            for name in file.names():
                if name in columns:
                    arguments[name] = read_columns(file, name, columns[name], ranks.device)
                else:
                    arguments[name] = file.read(name)
        ranks.check_consistent({"numel": total}, "load")
    return arguments, total
