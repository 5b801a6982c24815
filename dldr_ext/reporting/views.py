"""Views of a path through weight space that several reports and `plot()` share.

Each function returns a `Drawing`: what draws it, and what it says in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .figures import (
    LIGHT,
    MIDDLE,
    Drawing,
    percentages,
    shades,
    two_sided,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNS = (LIGHT["blue"], LIGHT["orange"])  # colours of the first and the second
_LEAST = 1e-12  # share of a variance that is drawn
_MOST_LAYERS = 24  # rows of a figure
_MOST_NAMES = 6  # between the ends
_APART = 0.13  # of the axes, from one name to the next


class Track(NamedTuple):
    """A path in a plane."""

    label: str
    points: Sequence[Sequence[float]]  # (T, 2)
    colour: str
    names: Sequence[str] = ()  # of the points, some of which are shown


class Contours(NamedTuple):
    """A function on a plane: row i of the values belongs to y[i]."""

    x: Sequence[float]
    y: Sequence[float]
    values: Sequence[Sequence[float]]
    label: str


class Mark(NamedTuple):
    """A point with a name."""

    text: str
    point: Sequence[float]
    marker: str = "o"


def short(name: str, most: int = 20) -> str:
    """Return a name, its middle left out where it is long."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def spectrum(
    ratios: Mapping[str, Sequence[float]], kept: int | None = None, seeds: bool = False
) -> Drawing:
    """Show the share of the variance along each direction, and what the first k leave over.

    Parameters
    ----------
    ratios : mapping of str to sequence of float
        Of each run, descending.
    kept : int, optional
        How many directions of the first run were kept.
    seeds : bool
        The runs after the first are the same with other seeds: drawn thin, without a name.
    """
    first = np.array(next(iter(ratios.values())))
    said = []
    for name, ratio in list(ratios.items())[: 1 if seeds else 2]:
        whose = f"{name}: the" if len(ratios) > 1 and not seeds else "The"
        count = int(np.searchsorted(np.cumsum(ratio), 0.99)) + 1
        count = min(count, len(ratio))
        said.append(
            f"{whose} first direction has {100 * ratio[0]:.1f} % of the variance, "
            f"the first {count} of {len(ratio)} have {100 * float(np.sum(ratio[:count])):.2f} %."
        )
    if kept is not None:
        said.append(f"{kept} are kept, with {100 * float(first[:kept].sum()):.3f} %.")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        single = len(ratios) == 1 or seeds
        colours = [RUNS[0]] * len(ratios) if single else list(RUNS)
        for i, (name, values) in enumerate(ratios.items()):
            ratio = np.clip(values, _LEAST, 1)
            order = np.arange(1, len(ratio) + 1)
            faint = seeds and i > 0
            alone = None if faint else "direction k alone" if single else f"{short(name)}: k alone"
            axes.plot(
                order,
                ratio,
                "o-",
                color=colours[i],
                markersize=3,
                label=alone,
                linewidth=1 if seeds else 1.8,
                alpha=0.35 if faint else 1,
            )
            if not faint:
                left = np.clip(1 - np.cumsum(values[:-1]), _LEAST, 1)
                beyond = "beyond the first k" if single else f"{short(name)}: beyond k"
                colour = LIGHT["orange"] if single else colours[i]
                axes.plot(order[:-1], left, "--", color=colour, label=beyond)
        axes.set_yscale("log")
        axes.set_ylim(top=1)
        axes.minorticks_off()
        percentages(axes.yaxis)
        whole_numbers(axes.xaxis)
        if kept is not None:
            axes.axvline(kept, color=LIGHT["soft"], linewidth=1, linestyle=":")
            right = kept > len(first) / 2
            axes.annotate(
                f"{kept} kept",
                (kept, 0.03),
                xycoords=("data", "axes fraction"),
                xytext=(-5, 0) if right else (5, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                color=LIGHT["soft"],
            )
        axes.set_xlabel("direction k")
        axes.set_ylabel("share of the variance")
        figure.legend(loc="outside lower center", ncols=2)

    return Drawing("spectrum", "Share of the variance along each direction", " ".join(said), draw)


def plane(
    tracks: Sequence[Track],
    labels: tuple[str, str],
    contours: Contours | None = None,
    marks: Sequence[Mark] = (),
) -> Drawing:
    """Show paths in a plane, with names of points, over contours of a function if there is one."""
    said = []
    for track in tracks:
        (a, b), (c, d) = track.points[0], track.points[-1]
        said.append(
            f"{track.label}: {len(track.points)} points from ({a:.3g}, {b:.3g}) to "
            f"({c:.3g}, {d:.3g})."
        )
    if contours is not None:
        values = np.array(contours.values, dtype=float)
        if np.isfinite(values).any():
            row, column = divmod(int(np.nanargmin(values)), values.shape[1])
            said.append(
                f"{contours.label}: {np.nanmin(values):.4g} to {np.nanmax(values):.4g}, lowest at "
                f"({contours.x[column]:.3g}, {contours.y[row]:.3g})."
            )

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if contours is not None:
            _contours(figure, axes, contours)
        for track in tracks:
            x, y = np.array(track.points, dtype=float).T
            marker = "." if len(x) <= 200 else ""
            axes.plot(
                x,
                y,
                color=track.colour,
                marker=marker,
                markersize=5,
                linewidth=1.3,
                label=track.label,
            )
            axes.plot(x[0], y[0], "s", color=LIGHT["paper"], markeredgecolor=track.colour)
            axes.plot(
                x[-1], y[-1], "o", color=track.colour, markeredgecolor=LIGHT["paper"], markersize=9
            )
        for mark in marks:
            axes.plot(
                *mark.point,
                mark.marker,
                color=LIGHT["ink"],
                markersize=11,
                markeredgecolor=LIGHT["paper"],
            )
            _name(axes, mark.text, mark.point)
        axes.margins(0.12)
        _names(axes, tracks)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        if len(tracks) > 1:
            figure.legend(loc="outside lower center", ncols=2)

    title = "The path in the plane of the first two directions"
    return Drawing("path", title, " ".join(said), draw, height=4.6)


def distances(
    drifts: Mapping[str, Mapping[str, Sequence[float]]], of: str = "checkpoint"
) -> Drawing:
    """Show how far each run went from its first point, and from one to the next."""
    said = []
    for name, drift in drifts.items():
        norms, steps = drift["from_first"], drift["steps"]
        whose = f"{name}: " if len(drifts) > 1 else ""
        said.append(
            f"{whose}{norms[-1]:.4g} from the first to the last; single steps are {min(steps):.3g} "
            f"to {max(steps):.3g} long."
        )

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (name, drift), colour in zip(drifts.items(), RUNS, strict=False):
            norms, steps = drift["from_first"], drift["steps"]
            one = len(drifts) == 1
            axes.plot(
                np.arange(len(norms)),
                norms,
                "o-",
                color=colour,
                markersize=3,
                label="from the first" if one else f"{short(name)}: from the first",
            )
            axes.plot(
                np.arange(1, len(norms)),
                steps,
                "o--",
                markersize=3,
                color=LIGHT["orange"] if one else colour,
                label="from the one before" if one else f"{short(name)}: step",
            )
        axes.set_xlabel(of)
        axes.set_ylabel("distance")
        axes.set_ylim(bottom=0)
        whole_numbers(axes.xaxis)
        figure.legend(loc="outside lower center", ncols=2)

    return Drawing("drift", "How far the weights went", " ".join(said), draw)


def cosines(matrix: Sequence[Sequence[float]], name: str = "cosine", run: str = "") -> Drawing:
    """Show the cosines between the steps of one run."""
    values = np.array(matrix, dtype=float)
    count = len(values) + 1
    beside = values.diagonal(1)
    alt = (
        f"{len(values)} steps. Between a step and the next the mean cosine is "
        f"{float(beside.mean()):.2f}, from {beside.min():.2f} to {beside.max():.2f}."
        if len(beside)
        else "A single step."
    )

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(False)
        image = axes.imshow(
            values,
            cmap=two_sided(),
            vmin=-1,
            vmax=1,
            extent=(0.5, count - 0.5, count - 0.5, 0.5),
            interpolation="none",
        )
        axes.set_xlabel("step to checkpoint")
        axes.set_ylabel("step to checkpoint")
        whole_numbers(axes.xaxis)
        whole_numbers(axes.yaxis)
        _bar(figure, axes, image, "cosine")

    title = "Cosines between steps" + (f": {run}" if run else "")
    return Drawing(name, title, alt, draw, height=4.6)


def layers(
    names: Sequence[str],
    norms: Sequence[Sequence[float]],
    name: str = "layers",
    run: str = "",
    span: tuple[float, float] | None = None,
    of_directions: bool = False,
) -> Drawing:
    """Show the norm of the change of each layer in each step, or of its part of each direction.

    Parameters
    ----------
    names : sequence of str
        Of L layers.
    norms : sequence of sequence of float, L x (T - 1)
    name, run : str
        Of the file, and of the run where there are several.
    span : (float, float), optional
        The ends of the colours, where several runs share them: see `span_of`.
    of_directions : bool
        The columns are directions, no steps.
    """
    values = np.array(norms, dtype=float)
    lengths = values.sum(1)
    order = np.argsort(-lengths)[:3]
    most = ", ".join(f"{names[i]} ({lengths[i]:.3g})" for i in order)
    columns = "directions" if of_directions else "steps"
    alt = f"{len(names)} layers, {values.shape[1]} {columns}. Most moved, all together: {most}."

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LogNorm

        axes = figure.add_subplot()
        axes.grid(False)
        low, top = span or span_of([norms])
        image = axes.imshow(
            np.ma.masked_less(values, low * 0.999),
            cmap=shades(MIDDLE["blue"]),
            norm=LogNorm(low, top),
            aspect="auto",
            extent=(0.5, values.shape[1] + 0.5, len(names) - 0.5, -0.5),
            interpolation="none",
        )
        axes.set_yticks(range(len(names)), [short(one, 19) for one in names], fontsize=8)
        axes.set_xlabel("direction" if of_directions else "step to checkpoint")
        whole_numbers(axes.xaxis)
        _bar(figure, axes, image, "norm of its part" if of_directions else "norm of the change")

    title = "Which layers the directions move" if of_directions else "Which layers move"
    title += f": {run}" if run else ""
    return Drawing(name, title, alt, draw, height=max(2.6, 1.3 + 0.155 * len(names)))


def span_of(runs: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Return the ends of the colours of `layers` for some runs: at most four decades."""
    values = np.concatenate([np.ravel(norms) for norms in runs])
    top = float(values.max()) or 1.0
    moved = values[values > 0]
    low = max(float(moved.min()), top / 1e4) if len(moved) else top
    return min(low, top / 2), top


def layer_of(tensor: str) -> str:
    """Return the layer of a tensor: what precedes the last dot of its name."""
    return tensor.rpartition(".")[0] or tensor


def fewer_layers(
    names: Sequence[str], norms: Sequence[Sequence[float]]
) -> tuple[list[str], list[list[float]]]:
    """Join layers by what their names begin with until they fit a figure.

    Where even the first words are too many, those with the least are joined.
    """
    squares = np.square(np.array(norms, dtype=float))
    depth = max(name.count(".") for name in names) + 1
    shown = list(names)
    while len(set(shown)) > _MOST_LAYERS and depth > 1:
        depth -= 1
        shown = [".".join(name.split(".")[:depth]) for name in names]
    places = {name: i for i, name in enumerate(dict.fromkeys(shown))}
    groups = list(places)
    total = np.zeros((len(groups), squares.shape[1]))
    np.add.at(total, [places[name] for name in shown], squares)
    if len(groups) > _MOST_LAYERS:
        kept = np.sort(np.argsort(-total.sum(1), kind="stable")[: _MOST_LAYERS - 1])
        rest = np.delete(total, kept, axis=0)
        total = np.concatenate([total[kept], rest.sum(0, keepdims=True)])
        groups = [*(groups[i] for i in kept), f"{len(rest)} others"]
    return groups, np.sqrt(total).tolist()


def losses(runs: Mapping[str, Sequence[float]]) -> Drawing:
    """Show the loss at each checkpoint."""
    said = []
    for name, values in runs.items():
        whose = f"{name}: " if len(runs) > 1 else ""
        best = int(np.argmin(values))
        said.append(
            f"{whose}{values[0]:.4g} at the first, {values[-1]:.4g} at the last, lowest "
            f"{values[best]:.4g} at checkpoint {best}."
        )

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (name, values), colour in zip(runs.items(), RUNS, strict=False):
            axes.plot(np.arange(len(values)), values, "o-", color=colour, markersize=4, label=name)
        smallest = min(min(values) for values in runs.values())
        largest = max(max(values) for values in runs.values())
        if 0 < smallest < largest / 20:
            axes.set_yscale("log")
        axes.set_xlabel("checkpoint")
        axes.set_ylabel("loss")
        whole_numbers(axes.xaxis)
        if len(runs) > 1:
            figure.legend(loc="outside lower center", ncols=2)

    return Drawing("loss", "Loss along the path", " ".join(said), draw)


def _contours(figure: Figure, axes: Axes, contours: Contours) -> None:
    from matplotlib.colors import LogNorm, Normalize

    axes.grid(False)
    values = np.ma.masked_invalid(np.array(contours.values, dtype=float))
    if not values.count():
        return
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high > 3 * low
    if high <= low:
        high = low + max(abs(low), 1e-12) * 1e-3
    levels = np.geomspace(low, high, 13) if logarithmic else np.linspace(low, high, 13)
    norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
    colours = shades(LIGHT["grey"], 0.5)
    filled = axes.contourf(contours.x, contours.y, values, levels, cmap=colours, norm=norm)
    axes.contour(contours.x, contours.y, values, levels, colors=LIGHT["paper"], linewidths=0.6)
    bar = _bar(figure, axes, filled, contours.label)
    ticks = levels[::3]
    bar.set_ticks(list(ticks), labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()


def _bar(figure: Figure, axes: Axes, image: Any, label: str) -> Any:
    bar: Any = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)
    return bar


def _names(axes: Axes, tracks: Sequence[Track]) -> None:
    """Name the ends of each path, and some points between them that are apart on the paper."""
    named = [track for track in tracks if track.names]
    places = [
        axes.transAxes.inverted().transform(
            axes.transData.transform(np.array(track.points, dtype=float))
        )
        for track in named
    ]
    taken: list[Any] = []
    for part in ("ends", "between"):
        for track, of_track in zip(named, places, strict=True):
            last = len(track.points) - 1
            left = {last, 0}
            if part == "between":
                left = set(np.linspace(0, last, min(last + 1, 60)).round().astype(int).tolist())
            most = len(taken) + (2 if part == "ends" else _MOST_NAMES // len(named))
            while left and len(taken) < most:  # the one farthest from all names so far
                t = max(left, key=lambda t: (_nearest(of_track[t], taken), t))
                left.remove(t)
                if taken and _nearest(of_track[t], taken) < _APART and (t, part) != (last, "ends"):
                    break
                taken.append(of_track[t])
                of_left = of_track[t][0] > 0.7
                colour = track.colour if len(named) > 1 else LIGHT["ink"]
                _name(axes, short(track.names[t], 16), track.points[t], of_left, colour)


def _nearest(place: Any, others: Sequence[Any]) -> float:
    """Return the distance of the nearest name; names are wider than high."""
    return min(
        (float(np.linalg.norm((place - other) * (0.7, 1))) for other in others), default=np.inf
    )


def _name(
    axes: Axes,
    text: str,
    point: Sequence[float],
    left: bool = False,
    colour: str = LIGHT["ink"],
) -> None:
    axes.annotate(
        text,
        (point[0], point[1]),
        xytext=(-7 if left else 7, 5),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=9,
        fontweight="bold",
        color=colour,
    )
