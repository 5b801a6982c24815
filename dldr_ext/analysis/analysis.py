"""The principal directions of checkpoints, without a trajectory in memory or on disk.

Two passes over the files, some columns of all checkpoints at a time: the first sums up the Gram
matrix, the second forms the basis and writes it. The numbers are those of
`Trajectory.from_checkpoints` and its `subspace`: to the bit, with float64 to its rounding. An
analysis that was interrupted goes on where it was.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series
from ..files import artifacts
from ..files.partial import PartialFile
from ..pca import metrics
from ..pca.decomposition import Decomposition, decompose
from ..pca.dimension import Request
from ..pca.form_basis import formed
from ..pca.gram import column_step, exact_gram
from ..pca.random_walk import SHORTEST
from ..pca.report import described
from ..pca.spectrum import Spectrum, coefficients
from ..subspace import dense
from ..subspace.base import PER_DIRECTION
from ..tensors.formats import block_range, blocks, empty_scale, row_bytes, wide_dtype
from ..tensors.matrices import ScaledRows
from ..tensors.parameters import dtype_name
from ..trajectory.stores import MemoryStore, StoreSpec
from .layers import Layers

Progress = Callable[[str, int, int], None]
SUBSPACE, _STATE = "subspace.safetensors", ".analysis.part"
_KIND, _VERSION = "analysis", 2
_SECONDS = 10.0  # between two writes of what was done
_WINDOW = 1 << 20  # elements that are read at a time


class Done(NamedTuple):
    """How far an analysis has come."""

    gram: Tensor
    layers: Tensor  # squared norms of the steps of each layer, (L, T - 1) float64
    square: float  # of the anchor's norm
    column: int
    basis_column: int = 0


class Analysis:
    """The analysis of a series of checkpoints, written into a folder.

    Parameters
    ----------
    series : Series
    folder : Path
        Of ``subspace.safetensors``; made if it is missing.
    dim, explained
        As in `Trajectory.subspace`; neither: "auto", or all directions of fewer checkpoints than
        that takes.
    dtype : torch.dtype
        Of the differences, and of the basis.
    keep_basis : bool
        Whether to write the subspace.
    chunk_bytes : int
        Of the columns in memory at a time; all together takes less than twice that and 200 MB.
    skip_bad : bool
        Start again without a checkpoint in which a number is not finite, say.
    progress : callable, optional
        Called with what is done, and the bytes read so far and in all.
    """

    def __init__(
        self,
        series: Series,
        folder: Path,
        *,
        dim: int | str | None = None,
        explained: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        keep_basis: bool = True,
        chunk_bytes: int = 112 << 20,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.series, self.folder, self.dtype = series, folder, dtype
        self.dim, self.explained, self.keep_basis = dim, explained, keep_basis
        self._chunk_bytes, self._skip_bad, self._progress = chunk_bytes, skip_bad, progress
        self.resumed_at = 0  # column
        self._saved = 0.0

    def run(self) -> dict[str, Any]:
        """Both passes.

        Returns
        -------
        dict
            As in analysis.json.

        Raises
        ------
        CheckpointError
        ValueError
            Fewer than two checkpoints; all the same; ``dim`` out of range.
        OSError
            No space for the subspace.
        """
        start = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                result = self._run()
                break
            except CheckpointError as error:
                if not self._skip_bad:
                    raise
                self.series.drop(error)
        (self.folder / _STATE).unlink(missing_ok=True)
        return result | {"seconds": time.perf_counter() - start}

    def _run(self) -> dict[str, Any]:
        series = self.series
        if len(series) < 2:
            raise ValueError(f"checkpoints: expected at least two, got {len(series)}")
        request = Request(self._default_dim(), self.explained)
        most = request.limit(len(series))
        if self.keep_basis and self.explained is None and request.dim != "auto":
            self._check_space(most)
        self._step = column_step(torch.empty(len(series), 0, device="cpu"))
        width = Chunks.width_of(series, self.dtype, self._chunk_bytes, self._step)
        self._chunks = Chunks(series, self.dtype, width)
        self._layers = Layers(series.names, series.shapes)
        self._done = self._earlier()
        self.resumed_at = self._done.column
        with CheckpointReader() as reader:
            self._kept(lambda: self._gram_pass(reader))
            gram = self._done.gram
            stored = {dtype for t in range(len(series)) for dtype in series.dtypes(t)}
            components = decompose(
                gram,
                self._done.square,
                request,
                double=stored | {self.dtype} == {torch.float64},
                what="checkpoints",
            )
            if components.warning is not None:
                series.notes.append(components.warning)
            if not self.keep_basis and (self.folder / SUBSPACE).exists():
                series.notes.append(f"{self.folder / SUBSPACE} is that of an earlier analysis")
            if self.keep_basis:
                self._kept(lambda: self._check_space(components.dim))
                self._kept(lambda: self._basis_pass(reader, components))
        return (
            self._facts()
            | described_path(gram, components.spectrum)
            | {"layers": self._layers.described(self._done.layers)}
            | self._kept_facts(components)
        )

    def _default_dim(self) -> int | str | None:
        """Return the number of directions, or "auto" where nothing else was asked for."""
        enough = len(self.series) >= SHORTEST
        return "auto" if enough and self.dim is None and self.explained is None else self.dim

    def _check_space(self, dim: int) -> None:
        """Check that the subspace will fit on the disk: before hours of reading, not after."""
        numel, wide = self.series.numel, wide_dtype(self.dtype).itemsize
        needed = dim * row_bytes(numel, self.dtype) + wide * numel
        left = self.folder / f".{SUBSPACE}.part"  # which it has already, if it goes on
        free = shutil.disk_usage(self.folder).free
        free += left.stat().st_size if left.exists() else 0
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {dim} directions need {needed:,} bytes, free are "
                f"{free:,}",
                str(self.folder / SUBSPACE),
            )

    def _gram_pass(self, reader: CheckpointReader) -> None:
        for begin in range(self._done.column, self.series.numel, self._chunks.width):
            self._done = self._multiplied(reader, begin)
            self._report("Gram matrix", 0, self._done.column)
            self._save_now_and_then()
        self.series.check_unchanged()

    # A chunk is local to a function of its own: the next one may be in its memory.

    def _multiplied(self, reader: CheckpointReader, begin: int) -> Done:
        anchor, rows = self._chunks.read(reader, begin)
        gram = exact_gram(rows, total=self._done.gram)
        layers = self._done.layers + self._layers.squares(rows, begin)
        norm = float(torch.linalg.vector_norm(anchor, dtype=torch.float64))
        return Done(gram, layers, self._done.square + norm**2, begin + len(anchor))

    def _write_basis(
        self, reader: CheckpointReader, begin: int, coefficients: Tensor, file: PartialFile
    ) -> int:
        """Write the columns of one chunk; return where the next one begins."""
        anchor, rows = self._chunks.read(reader, begin)
        basis, scale = formed(rows, coefficients, self.dtype, self._step)
        numel = self.series.numel
        for row, values in enumerate(basis):
            file.write("basis", row * numel + begin, values)
        for row, values in enumerate(() if scale is None else scale):
            file.write("scale", row * blocks(numel) + block_range(begin, numel)[0], values)
        file.write("origin", begin, anchor)
        return begin + len(anchor)

    def _basis_pass(self, reader: CheckpointReader, components: Decomposition) -> None:
        count, series, numel = components.dim, self.series, self.series.numel
        small = {name: getattr(components, name) for name in PER_DIRECTION}
        large = {
            "basis": torch.empty((count, numel), dtype=self.dtype, device="meta"),
            "origin": torch.empty(numel, dtype=wide_dtype(self.dtype), device="meta"),
            "scale": empty_scale(count, numel, self.dtype, "meta"),
        }
        tensors = {name: tensor for name, tensor in large.items() if tensor is not None}
        with PartialFile(
            self.folder / SUBSPACE,
            dense.KIND,
            dense.VERSION,
            tensors | small,
            {"shapes": series.shapes, "names": series.names, "choice": components.choice},
            resume=self._done.basis_column > 0,
        ) as file:
            if not file.resumed:
                self._done = self._done._replace(basis_column=0)
            try:
                for begin in range(self._done.basis_column, numel, self._chunks.width):
                    end = self._write_basis(reader, begin, components.coefficients, file)
                    self._done = self._done._replace(basis_column=end)
                    self._report("basis", numel, end)
                    self._save_now_and_then(file)
            finally:
                file.sync()
            series.check_unchanged()
            for name, tensor in small.items():
                file.write(name, 0, tensor)
            file.finish()

    def _kept(self, work: Callable[[], None]) -> None:
        """Do the work; what is done is kept if it is interrupted."""
        try:
            work()
        except CheckpointError:
            raise
        except BaseException:
            self._save()
            raise

    def _save_now_and_then(self, file: PartialFile | None = None) -> None:
        if time.monotonic() - self._saved > _SECONDS:
            if file is not None:
                file.sync()
            self._save()
            self._saved = time.monotonic()

    def _save(self) -> None:
        done = self._done
        square = torch.tensor(done.square, dtype=torch.float64, device="cpu")
        places = {"column": done.column, "basis_column": done.basis_column}
        artifacts.save(
            self.folder / _STATE,
            _KIND,
            _VERSION,
            {"gram": done.gram, "layers": done.layers, "square": square},
            {**places, "of": self._identity()},
        )

    def _earlier(self) -> Done:
        """Return what an earlier run over the same files, unchanged, has done."""
        rows = len(self.series)
        nothing = torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
        new = Done(nothing, nothing.new_zeros(len(self._layers.names), rows - 1), 0.0, 0)
        try:
            with artifacts.Reader(self.folder / _STATE, _KIND, _VERSION) as file:
                places = file.metadata
                if places.get("of") != self._identity():
                    return new
                square = float(file.read("square"))
                columns = places["column"], places["basis_column"]
                return Done(file.read("gram"), file.read("layers"), square, *columns)
        except FileNotFoundError:
            return new
        except (ValueError, KeyError):  # not whole, or of another version
            return new

    def _identity(self) -> dict[str, Any]:
        return {
            "files": self.series.identity(),
            "names": self.series.names,
            "key": self.series.key,
            "dtype": dtype_name(self.dtype),
            "dim": self.dim,
            "explained": self.explained,
        }

    def _report(self, what: str, before: int, columns: int) -> None:
        if self._progress is not None:
            row = sum(map(self.series.row_bytes, range(len(self.series))))
            passes = 2 if self.keep_basis else 1
            done = row * (before + columns) // self.series.numel
            self._progress(what, done, row * passes)

    def _facts(self) -> dict[str, Any]:
        series = self.series
        return {
            "checkpoints": [str(path) for path in series.paths],
            "skipped": [str(error) for error in series.skipped],
            "notes": list(dict.fromkeys(series.notes)),
            "numel": series.numel,
            "tensors": len(series.names),
            "bytes": sum(map(series.row_bytes, range(len(series)))),
            "dtype": dtype_name(self.dtype),
            "norm_of_first": self._done.square**0.5,
        }

    def _kept_facts(self, components: Decomposition) -> dict[str, Any]:
        dim, ratio = components.dim, components.explained_variance_ratio
        report = described(dim, self.series.numel, self.dtype, components.choice, ratio)
        kept = {"dim": dim, "explained_variance": float(ratio.sum())}
        path = {"path": str(self.folder / SUBSPACE), **kept}
        return {
            "subspace": path if self.keep_basis else None,
            "kept": dim,
            "choice": components.choice,
            "report": report,
        }


def described_path(gram: Tensor, spectrum: Spectrum) -> dict[str, Any]:
    """Collect the metrics of a Gram matrix, and the path in the plane of two directions."""
    ratio = spectrum.explained(spectrum.rank)
    return metrics.of_gram(gram, ratio) | {"path": described_plane(spectrum)}


def described_plane(spectrum: Spectrum) -> dict[str, Any]:
    """Collect the points in the plane of the first two directions, whose mean is at zero.

    ``coefficients`` has the directions as combinations of the points.
    """
    rows = coefficients(spectrum, min(2, spectrum.rank))
    rows = torch.cat([rows, rows.new_zeros(2 - len(rows), rows.shape[1])])
    return {
        "coordinates": metrics.coordinates(spectrum).tolist(),
        "explained": spectrum.explained(2).tolist(),
        "coefficients": rows.tolist(),
    }


class Chunks:
    """Some columns of all checkpoints at a time: differences from the first, as recorded.

    Parameters
    ----------
    series : Series
    dtype : torch.dtype
    width : int
        Columns of a chunk.
    """

    def __init__(self, series: Series, dtype: torch.dtype, width: int) -> None:
        self.series, self.dtype, self.width = series, dtype, width
        self._store: MemoryStore | None = None
        wide = wide_dtype(dtype)
        self._anchor = torch.empty(self.width, dtype=wide, device="cpu")
        self._window = torch.empty(min(_WINDOW, self.width), dtype=wide, device="cpu")

    @staticmethod
    def width_of(series: Series, dtype: torch.dtype, chunk_bytes: int, step: int) -> int:
        """Return the columns, a multiple of ``step``, whose rows and anchor take so many bytes."""
        column = len(series) * dtype.itemsize + wide_dtype(dtype).itemsize
        return min(max(step, chunk_bytes // column // step * step), series.numel)

    def read(self, reader: CheckpointReader, begin: int) -> tuple[Tensor, Tensor | ScaledRows]:
        """Return columns ``begin``, ``begin + 1``, ...: the anchor (k,) and the rows (T, k).

        They are valid until the next call.
        """
        count = min(self.width, self.series.numel - begin)
        anchor = self._anchor[:count]
        for columns, piece in self._pieces(reader, 0, begin, count):
            anchor[columns] = piece
        store = self._empty_store(anchor)
        for t in range(len(self.series)):
            first = [(slice(0, count), anchor)]
            if not store.append_pieces(self._pieces(reader, t, begin, count) if t else first):
                problem = f"a difference from the first checkpoint overflows {self.dtype}"
                raise self.series.error(t, problem)
        return anchor, store.snapshots()

    def _pieces(
        self, reader: CheckpointReader, t: int, begin: int, count: int
    ) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, count, _WINDOW):
            stop = min(start + _WINDOW, count)
            piece = self._window[: stop - start]
            self.series.read(reader, t, begin + start, piece)
            yield slice(start, stop), piece

    def _empty_store(self, anchor: Tensor) -> MemoryStore:
        if self._store is None or self._store.numel != len(anchor):
            self._store = None  # its memory before that of the next one
            spec = StoreSpec(len(anchor), len(self.series), self.dtype, anchor.device)
            self._store = MemoryStore(spec, anchor)
        self._store.clear()
        return self._store
