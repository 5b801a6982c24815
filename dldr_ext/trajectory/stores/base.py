"""What a trajectory asks of the place where its snapshots are kept."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...collectives.partition import Run
from ...files.artifacts import Stream, save
from ...pca.gram import exact_gram
from ...tensors.formats import row_bytes, wide_dtype
from ...tensors.matrices import Matrix, StoredRows, as_stored
from ...tensors.parameters import flatten

#: Consecutive columns of one row, each piece valid until the next; iterated over twice where the
#: row becomes the anchor.
RowPieces = Iterable[tuple[slice, Tensor]]
_Result = TypeVar("_Result")

#: Columns that a row is read, rounded and written in at a time.
PIECE = 1 << 22


class RecordingCost(NamedTuple):
    """The cost of the recording so far, as `Trajectory.cost` gives it.

    It is that of this process: a trajectory that was loaded begins at zero.

    Attributes
    ----------
    snapshots : int
        Snapshots recorded.
    seconds : float
        Time in `Trajectory.record` and in completing the Gram matrix.
    bytes_read, bytes_written : int
        Of stored snapshots: read to multiply them, and written.
    """

    snapshots: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def per_snapshot(self) -> tuple[float, float, float]:
        """Seconds, bytes read and bytes written of one snapshot, on average."""
        count = max(self.snapshots, 1)
        return self.seconds / count, self.bytes_read / count, self.bytes_written / count


class StoreSpec(NamedTuple):
    """What a store is made for.

    Attributes
    ----------
    numel, capacity : int
        Columns that are kept, and the most rows.
    dtype : torch.dtype
        Of the rows.
    device : torch.device
        Of the parameters: where the arithmetic is done, and where the Gram matrix is.
    """

    numel: int
    capacity: int
    dtype: torch.dtype
    device: torch.device


class Store(ABC):
    """The rows of a trajectory, the anchor that they are differences from, and their Gram matrix.

    Parameters
    ----------
    spec : StoreSpec
    anchor : Tensor, shape (numel,), optional
        None: the first row becomes the anchor.

    Attributes
    ----------
    numel, capacity, dtype, device
        As in ``spec``.
    length : int
        Number of rows, T.
    anchor : Tensor, shape (numel,), or None
        None before the first row.
    cost : RecordingCost
    """

    #: Whether several ranks keep the columns together, each some of them.
    spans_ranks = False

    def __init__(self, spec: StoreSpec, anchor: Tensor | None = None) -> None:
        self.numel, self.capacity, self.dtype, self.device = spec
        self.length = 0
        self.anchor, self._given_anchor = anchor, anchor
        self.cost = RecordingCost()
        self._gram = torch.zeros(
            (0, 0), dtype=torch.float64, device=self.device
        )  # room for 2^k rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row, with its scale if it has one."""
        return row_bytes(self.numel, self.dtype)

    def append(self, params: Sequence[Tensor]) -> bool:
        """Store flat(params) - anchor as one more row.

        Returns
        -------
        bool
            False if it, or its square, is not finite: nothing has been stored then.
        """
        given = self._known_anchor()
        anchor = flatten(params, wide_dtype(self.dtype)) if given is None else given
        return self._counted(anchor, lambda: self._append(params, anchor))

    def append_pieces(self, pieces: RowPieces) -> bool:
        """Store one more row whose weights come piece by piece; else as `append`."""
        given = self._known_anchor()
        if given is None:
            given = torch.empty(self.numel, dtype=wide_dtype(self.dtype), device=self.device)
            for columns, piece in pieces:
                given[columns] = piece.to(given.device)
        anchor = given
        return self._counted(anchor, lambda: self._append_pieces(pieces, anchor))

    def undo(self) -> None:
        """Forget the row that was stored last."""
        self.length -= 1
        self._count(snapshots=-1, written=-self.row_bytes)
        if self.length == 0:
            self.anchor = self._given_anchor

    def thin(self, in_place: bool = True) -> None:
        """Keep rows 0, 2, 4, ...: as if the others had never been stored.

        Parameters
        ----------
        in_place : bool
            False: something else reads the rows where they are, which stay as they are.
        """
        self.begin_thinning()
        self.finish_thinning(in_place)

    def begin_thinning(self) -> None:
        """Do the part of `thin` that may fail; the rows are still all there."""
        self.gram()

    def finish_thinning(self, in_place: bool = True) -> None:
        """Do the rest of `thin`."""
        kept, gram = (self.length + 1) // 2, torch.zeros_like(self._gram)
        gram[:kept, :kept] = self._gram[: self.length : 2, : self.length : 2]
        with uninterrupted():
            self._drop_odd_rows(in_place)
            self._gram, self.length = gram, kept

    def gram(self) -> Tensor:
        """Return K, shape (T, T): a view."""
        with self._clock():
            self._complete()
        return self._gram[: self.length, : self.length]

    @abstractmethod
    def snapshots(self) -> Matrix:
        """Return the rows, shape (T, numel)."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Give back what other processes may wait for."""

    def defer_products(self) -> None:  # noqa: B027  (most have a use for a row at once)
        """Multiply the rows to come in one pass, when the Gram matrix is asked for."""

    def save(
        self, path: str | os.PathLike[str], kind: str, version: int, metadata: Mapping[str, Any]
    ) -> None:
        """Write rows, Gram matrix and anchor to one file; stored rows are streamed."""
        assert self.anchor is not None
        codes, scale = as_stored(self.snapshots())
        tensors = {"snapshots": _streamed(codes), "gram": self.gram(), "anchor": self.anchor}
        if scale is not None:
            tensors["scale"] = _streamed(scale)
        save(path, kind, version, tensors, {**metadata, "length": self.length})

    def check_writable(self) -> None:  # noqa: B027
        """Check that rows may be stored."""

    # What several ranks do together; one process does it alone.

    def transaction(
        self, what: str, params: Sequence[Tensor] = (), errors: Any = None
    ) -> AbstractContextManager[None]:
        """Return the context in which a call succeeds on all ranks or on none."""
        return nullcontext()

    def settle(self) -> None:  # noqa: B027
        """Do what the ranks do together once rows count on all of them."""

    def local_part(
        self, params: Sequence[Tensor], names: list[str] | None
    ) -> tuple[list[Tensor], list[str] | None]:
        """Return what is kept here of a list of parameters, and the names of it."""
        return list(params), names

    def check_consistent(self, facts: Mapping[str, Any], what: str) -> None:  # noqa: B027
        """Check that every rank says the same."""

    def column_runs(self, begin: int, end: int) -> Iterator[tuple[slice, Run]]:
        """Yield where columns [begin, end) of those kept here are among all n.

        A slice, relative to ``begin``, and the run of all columns that belongs there.
        """
        yield slice(0, end - begin), (begin, end)

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over all columns of what is known of those kept here."""
        return tensor

    def solved_once(self, solve: Callable[[], _Result]) -> _Result:
        """Return what ``solve`` gives, the same bits on every rank."""
        return solve()

    def exact_gram(self) -> Tensor:
        """Return the Gram matrix to all digits, as a decomposition needs it: see `exact_gram`.

        The one that recording made serves to watch it; of float64 rows it is exact already.
        """
        return self.gram() if self.dtype == torch.float64 else exact_gram(self.snapshots())

    # What subclasses add.

    @abstractmethod
    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        """Store row ``length``, as `append`."""

    def _append_pieces(self, pieces: RowPieces, anchor: Tensor) -> bool:
        """Store row ``length``, as `append_pieces`."""
        whole = torch.empty_like(anchor)
        for columns, piece in pieces:
            whole[columns] = piece.to(anchor.device)
        return self._append([whole], anchor)

    def _complete(self) -> None:  # noqa: B027
        """Fill in what the Gram matrix lacks."""

    def _drop_odd_rows(self, in_place: bool) -> None:  # noqa: B027
        """Put rows 0, 2, 4, ... first; ``length`` and the Gram matrix follow."""

    def _known_anchor(self) -> Tensor | None:
        # What an interrupted first row has left is none.
        return self.anchor if self.length else self._given_anchor

    def _counted(self, anchor: Tensor, store: Callable[[], bool]) -> bool:
        with self._clock():
            self._make_room(self.length + 1)
            if not store():
                return False
            self.anchor = anchor
            self.length += 1
            self._count(snapshots=1, written=self.row_bytes)
            return True

    def _make_room(self, rows: int) -> None:
        """Make the Gram matrix large enough for so many rows."""
        if rows > len(self._gram):
            size = 1 << (rows - 1).bit_length()
            larger = self._gram.new_zeros((size, size))
            larger[: len(self._gram), : len(self._gram)] = self._gram
            self._gram = larger

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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put a Ctrl-C off until what is inside is done."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(*pressed[0])


def _streamed(rows: Tensor | StoredRows) -> Tensor | Stream:
    return rows if isinstance(rows, Tensor) else Stream(rows.dtype, rows.shape, iter(rows))
