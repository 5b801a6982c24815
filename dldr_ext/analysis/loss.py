"""The loss at checkpoints, and in the plane of the first two directions."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.formats import Entry
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series

Progress = Callable[[int, int], None]
GRID = 11  # points along each side
_MARGIN = 0.15


class Loss(NamedTuple):
    """A user's function of a state dict.

    Attributes
    ----------
    function : callable
    name : str
        In messages.
    """

    function: Callable[[dict[str, Tensor]], Any]
    name: str

    def at(self, state: dict[str, Tensor], where: str) -> float:
        """Return the loss of weights.

        Raises
        ------
        ValueError
            The function raises, or returns no number: with where it was called.
        """
        try:
            value = self.function(state)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind, text = type(error).__name__, str(error).partition("\n")[0]
            raise ValueError(
                f"{self.name}: raised {kind}: {text} ({frame.filename}:{frame.lineno}) at {where}"
            ) from error
        try:
            return float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise ValueError(
                f"{self.name}: expected a number, got {type(value).__name__}{shape} at {where}"
            ) from None

    def along(self, series: Series, progress: Progress) -> dict[Path, float]:
        """Return the loss of each checkpoint; drop those that cannot be used if they may be.

        Raises
        ------
        ValueError
            As for `at`; NaN or Inf.
        CheckpointError
        """
        values, count = {}, len(series)
        with CheckpointReader() as reader:
            for done, path in enumerate(list(series.paths), 1):
                t = series.paths.index(path)
                try:
                    values[path] = self.at(reader.state(_readable(series, t)), str(path))
                    if not math.isfinite(values[path]):
                        problem = f"{self.name}: expected a finite number, got {values[path]}"
                        if not series.skip_bad:
                            raise ValueError(f"{problem} at {path}")
                        raise series.error(t, problem)
                except CheckpointError as error:
                    if not series.skip_bad:
                        raise
                    series.drop(series.error(t, error.problem))
                progress(done, count)
        return values


def on_plane(
    loss: Loss,
    runs: Sequence[Series],
    coefficients: Sequence[Sequence[float]],
    points: Sequence[Sequence[float]],
    progress: Progress,
) -> dict[str, Any]:
    """Return the loss on a grid that holds all points of a plane through the first run's end.

    Parameters
    ----------
    loss : Loss
    runs : sequence of Series
        One or two, with T checkpoints in all.
    coefficients : sequence of sequence of float, 2 x T
        The directions as combinations of these.
    points : sequence of sequence of float, T x 2
        Where they lie in the plane.
    progress : callable
        Called with the points that are done, and all.

    Returns
    -------
    dict
        ``x``, ``y``, and ``loss`` with a row for each y; None where it is not finite. What is not
        a row's (buffers) is that of the first run's last checkpoint.
    """
    first, last = runs[0], len(runs[0]) - 1
    with CheckpointReader() as reader:
        end, directions = _directions(runs, coefficients, reader)
        state = reader.state(_readable(first, last))
    tied = _tied(first, last)
    centre = points[last]
    x, y = (_axis(values) for values in zip(*points, strict=True))
    rows: list[list[float | None]] = []
    for b in y:
        rows.append([])
        for a in x:
            flat = end + (a - centre[0]) * directions[0] + (b - centre[1]) * directions[1]
            value = loss.at(_with(state, first, flat, tied), f"({a:.4g}, {b:.4g}) of the plane")
            rows[-1].append(value if math.isfinite(value) else None)
            progress(sum(map(len, rows)), len(x) * len(y))
    return {"x": x, "y": y, "loss": rows}


def _directions(
    runs: Sequence[Series], coefficients: Sequence[Sequence[float]], reader: CheckpointReader
) -> tuple[Tensor, Tensor]:
    """Return the weights at the end of the first run, and two directions, (2, n)."""
    numel = runs[0].numel
    stored = {dtype for run in runs for t in range(len(run)) for dtype in run.dtypes(t)}
    dtype = torch.float64 if stored == {torch.float64} else torch.float32
    end, row = (torch.empty(numel, dtype=dtype, device="cpu") for _ in range(2))
    directions = torch.zeros(2, numel, dtype=dtype, device="cpu")
    runs[0].read(reader, len(runs[0]) - 1, 0, end)
    column = 0
    for run in runs:
        for t in range(len(run)):
            run.read(reader, t, 0, row)
            row -= end  # the coefficients sum to 0
            for direction, factors in zip(directions, coefficients, strict=True):
                direction.add_(row, alpha=factors[column])
            column += 1
    return end, directions


def _readable(series: Series, t: int) -> dict[str, Entry]:
    entries = series.contents[t].entries
    return {name: entry for name, entry in entries.items() if entry.problem is None}


def _tied(series: Series, t: int) -> dict[str, list[str]]:
    """Return, for each tensor of a row, all names of the same numbers in the same order."""
    entries = _readable(series, t)
    keys = {
        name: (entry.place(), entry.shape, entry.stride) if not entry.parts else name
        for name, entry in entries.items()
    }
    names: dict[Any, list[str]] = {}
    for name, key in keys.items():
        names.setdefault(key, []).append(name)
    return {name: names[keys[name]] for name in series.names}


def _with(
    state: dict[str, Tensor], series: Series, flat: Tensor, tied: dict[str, list[str]]
) -> dict[str, Tensor]:
    """Return a state dict of its own with other weights."""
    result = {name: tensor.clone() for name, tensor in state.items()}
    sizes = [math.prod(shape) for shape in series.shapes]
    for name, values in zip(series.names, flat.split(sizes), strict=True):
        for one in tied[name]:
            result[one].copy_(values.view(result[one].shape))
    return result


def _axis(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = _MARGIN * (high - low) or 1.0
    return torch.linspace(low - margin, high + margin, GRID, dtype=torch.float64).tolist()
