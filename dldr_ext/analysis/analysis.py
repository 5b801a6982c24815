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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..checkpoints.errors import CheckpointError
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series
from ..files import artifacts
from ..files.partial import PartialFile
from ..pca import spectrum
from ..pca.dimension import Choice, asked_count, choose
from ..pca.form_basis import formed
from ..pca.gram import column_step
from ..pca.report import described
from ..subspace import dense
from ..tensors.formats import SCALE_BLOCK, blocks, empty_scale, row_bytes, wide_dtype
from ..tensors.matrices import column_pieces
from ..tensors.parameters import dtype_name
from . import metrics
from .columns import Columns

Progress = Callable[[str, int, int], None]
SUBSPACE, _STATE = "subspace.safetensors", ".analysis.part"
_KIND, _VERSION = "analysis", 1
_SECONDS = 10.0  # between two writes of what was done


class Done(NamedTuple):
    """How far an analysis has come."""

    gram: Tensor
    square: float  # of the anchor's norm
    column: int
    basis_column: int = 0


class Analysis:
    """Of a series, into a folder.

    Parameters
    ----------
    series : Series
    folder : Path
        Of ``subspace.safetensors``; made if it is missing.
    dim, explained
        As in `Trajectory.subspace`.
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
        chunk_bytes: int = 1 << 27,
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
        most = asked_count(len(series), self.dim, self.explained, True)
        if self.keep_basis and self.explained is None and self.dim != "auto":
            self._check_space(most)
        self._step = column_step(torch.empty(len(series), 0, device="cpu"))
        self._columns = Columns(series, self.dtype, self._chunk_bytes, self._step)
        self._done = self._earlier()
        self.resumed_at = self._done.column
        with CheckpointReader() as pieces:
            self._kept(lambda: self._gram_pass(pieces))
            gram = self._done.gram
            found = self._spectrum(gram)
            ratio = found.explained(max(found.rank, 1))
            chosen = choose(found, len(series), most, self.dim, self.explained, True)
            if chosen.warning is not None:
                series.notes.append(chosen.warning)
            if self.keep_basis:
                self._kept(lambda: self._check_space(chosen.dim))
                self._kept(lambda: self._basis_pass(pieces, found, chosen))
        return self._facts() | metrics.of_gram(gram, ratio) | self._kept_facts(ratio, chosen)

    def _check_space(self, dim: int) -> None:
        """That the subspace will fit on the disk: before hours of reading, not after."""
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

    def _gram_pass(self, pieces: CheckpointReader) -> None:
        width = self._columns.width
        for begin in range(self._done.column, self.series.numel, width):
            anchor, rows = self._columns.read(pieces, begin)
            gram = self._done.gram.clone()
            for _, piece in column_pieces(rows, self._step):
                gram += ops.gram(piece.to(torch.float64).contiguous())
            norm = float(torch.linalg.vector_norm(anchor, dtype=torch.float64))
            end = begin + len(anchor)
            self._done = Done(gram, self._done.square + norm**2, end)
            self._report("Gram matrix", 0, end)
            self._save_now_and_then()

    def _basis_pass(
        self, pieces: CheckpointReader, found: spectrum.Spectrum, chosen: Choice
    ) -> None:
        count = chosen.dim
        coefficients = spectrum.coefficients(found, count)
        series, numel = self.series, self.series.numel
        known = {
            "explained_variance_ratio": found.explained(count),
            "singular_values": found.values[:count].sqrt(),
        }
        large = {
            "basis": torch.empty((count, numel), dtype=self.dtype, device="meta"),
            "origin": torch.empty(numel, dtype=self._columns.wide, device="meta"),
            "scale": empty_scale(count, numel, self.dtype, "meta"),
        }
        tensors = {name: tensor for name, tensor in large.items() if tensor is not None}
        with PartialFile(
            self.folder / SUBSPACE,
            dense.KIND,
            dense.VERSION,
            tensors | known,
            {"shapes": series.shapes, "names": series.names, "choice": chosen.facts},
            resume=self._done.basis_column > 0,
        ) as file:
            if not file.resumed:
                self._done = self._done._replace(basis_column=0)
            try:
                for begin in range(self._done.basis_column, numel, self._columns.width):
                    anchor, rows = self._columns.read(pieces, begin)
                    basis, scale = formed(rows, coefficients, self.dtype, self._step)
                    for row, part in enumerate(basis):
                        file.write("basis", row * numel + begin, part)
                    for row, part in enumerate(() if scale is None else scale):
                        at = row * blocks(numel) + begin // SCALE_BLOCK
                        file.write("scale", at, part)
                    file.write("origin", begin, anchor)
                    end = begin + len(anchor)
                    self._done = self._done._replace(basis_column=end)
                    self._report("basis", numel, end)
                    self._save_now_and_then(file)
            finally:
                file.sync()
            for name, tensor in known.items():
                file.write(name, 0, tensor)
            file.finish()

    def _spectrum(self, gram: Tensor) -> spectrum.Spectrum:
        stored = {dtype for t in range(len(self.series)) for dtype in self.series.dtypes(t)}
        double = stored | {self.dtype} == {torch.float64}
        # All that is asked of the weights is their length.
        length = torch.tensor([self._done.square], dtype=torch.float64, device="cpu").sqrt()
        found = spectrum.exact_spectrum(gram, double, length, center=True)
        if found.rank == 0:
            raise ValueError(
                f"the {len(self.series)} checkpoints do not differ (by more than rounding "
                "explains): there is no direction to keep"
            )
        return found

    def _kept(self, work: Callable[[], None]) -> None:
        """Does the work; what is done is kept if it is interrupted."""
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
            {"gram": done.gram, "square": square},
            {**places, "of": self._identity()},
        )

    def _earlier(self) -> Done:
        """What an earlier run over the same files, unchanged, has done."""
        rows = len(self.series)
        new = Done(torch.zeros(rows, rows, dtype=torch.float64, device="cpu"), 0.0, 0)
        try:
            with artifacts.Reader(self.folder / _STATE, _KIND, _VERSION) as file:
                places = file.metadata
                if places.get("of") != self._identity():
                    return new
                gram = file.read("gram")
                square = float(file.read("square"))
                return Done(gram, square, places["column"], places["basis_column"])
        except FileNotFoundError:
            return new
        except (ValueError, KeyError):  # not whole, or of another version
            return new

    def _identity(self) -> dict[str, Any]:
        return {
            "files": self.series.identity(),
            "names": self.series.names,
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

    def _kept_facts(self, ratio: Tensor, chosen: Choice) -> dict[str, Any]:
        share = ratio[: chosen.dim]
        said = described(chosen.dim, self.series.numel, self.dtype, chosen.facts, share)
        kept: dict[str, Any] = {"dim": chosen.dim, "explained_variance": float(share.sum())}
        known = {"choice": chosen.facts, "report": said}
        if not self.keep_basis:
            return {"subspace": None, **known}
        return {"subspace": {"path": str(self.folder / SUBSPACE), **kept}, **known}
