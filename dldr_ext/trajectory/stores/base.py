"""What a trajectory asks of the place where its snapshots are kept."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...tensors.formats import row_bytes
from ...tensors.matrices import Matrix


class RecordingCost(NamedTuple):
    """What recording has taken: `Trajectory.cost`.

    Of this process: a trajectory that was loaded begins at zero.
    """

    snapshots: int = 0  # recorded
    seconds: float = 0.0  # in record() and in completing the Gram matrix
    bytes_read: int = 0  # of stored snapshots, to multiply them
    bytes_written: int = 0  # of stored snapshots

    @property
    def per_snapshot(self) -> tuple[float, float, float]:
        """Seconds, bytes read and bytes written of one snapshot, on average."""
        count = max(self.snapshots, 1)
        return self.seconds / count, self.bytes_read / count, self.bytes_written / count


class Store(ABC):
    """Rows of a trajectory and their Gram matrix.

    Parameters
    ----------
    numel, capacity : int
        n, and the most rows.
    dtype : torch.dtype
        Of the rows.
    device : torch.device
        Of the parameters: where the arithmetic is done, and where the Gram matrix is.

    Attributes
    ----------
    length : int
        Number of rows, T.
    cost : RecordingCost
    """

    def __init__(self, numel: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.numel, self.capacity, self.dtype, self.device = numel, capacity, dtype, device
        self.length = 0
        self.cost = RecordingCost()
        self._gram = torch.zeros((0, 0), dtype=torch.float64, device=device)  # room for 2^k rows

    @property
    def row_bytes(self) -> int:
        """Of a stored row, with its scale if it has one."""
        return row_bytes(self.numel, self.dtype)

    def append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        """Stores flat(params) - anchor as one more row.

        Returns
        -------
        bool
            False if it, or its square, is not finite: nothing has been stored then.
        """
        with self._clock():
            self._make_room(self.length + 1)
            if not self._append(params, anchor):
                return False
            self.length += 1
            self._count(snapshots=1, written=self.row_bytes)
            return True

    def undo(self) -> None:
        """Forgets the row that the last `append` stored."""
        self.length -= 1
        self._count(snapshots=-1, written=-self.row_bytes)

    def gram(self) -> Tensor:
        """K, shape (T, T): a view."""
        with self._clock():
            self._complete()
        return self._gram[: self.length, : self.length]

    @abstractmethod
    def snapshots(self) -> Matrix:
        """The rows, shape (T, n)."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Gives back what other processes may wait for."""

    @abstractmethod
    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        """Stores row ``length``, as `append`."""

    def _make_room(self, rows: int) -> None:
        """Makes the Gram matrix large enough for so many rows."""
        if rows > len(self._gram):
            size = 1 << (rows - 1).bit_length()
            larger = self._gram.new_zeros((size, size))
            larger[: len(self._gram), : len(self._gram)] = self._gram
            self._gram = larger

    def _complete(self) -> None:  # noqa: B027
        """Fills in what the Gram matrix lacks."""

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.cost.seconds + time.perf_counter() - start
            self.cost = self.cost._replace(seconds=seconds)

    def _count(self, *, snapshots: int = 0, read: int = 0, written: int = 0) -> None:
        cost = self.cost
        self.cost = cost._replace(
            snapshots=cost.snapshots + snapshots,
            bytes_read=cost.bytes_read + read,
            bytes_written=cost.bytes_written + written,
        )
