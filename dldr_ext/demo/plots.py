"""The demo's three figures. Drawing needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reporting import views
from ..reporting.figures import COLOURS, LIGHT, Drawing
from .landscape import Landscape
from .methods import NAMES
from .summary import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = ("sgd", "random", "psgd", "pbfgs", "one_pass")
_DASHES = {"random": "--", "one_pass": "-."}


def drawings(results: dict[str, Any], plane: Landscape | None) -> list[Drawing]:
    """Return what shows the results, in the order of the report.

    Parameters
    ----------
    results : dict
        As `run.run` returned it.
    plane : Landscape or None
        None where the subspace has one dimension only.

    Returns
    -------
    list of Drawing
    """
    ratios = results["explained_variance_ratio_by_seed"]
    spectrum = views.spectrum(
        {f"seed {i}": ratio for i, ratio in enumerate(ratios)},
        results["runs"][0]["dim"],
        seeds=True,
    )._replace(
        title="How much of the SGD trajectory the directions explain",
        caption=(
            "Principal directions of the recorded first half of SGD: the share of the variance "
            "that each explains, and what the first k together leave over."
        ),
    )
    shown = [_accuracy(results), spectrum]
    return shown if plane is None else [*shown, _trajectory(plane)]


def _accuracy(results: dict[str, Any]) -> Drawing:
    """Show validation accuracy against passes: thin lines for seeds, thick ones for their mean."""
    said = "; ".join(
        f"{NAMES[row.method]} {row.accuracy} of the test digits after "
        f"{row.all_passes:.1f} passes in all"
        for row in summarize(results)
        if row.method in _SHOWN
    )
    return Drawing(
        "accuracy",
        "Accuracy on the validation digits against passes",
        f"At the end: {said}.",
        partial(_draw_accuracy, results),
        "Gradients, trials of the line search and batch-norm statistics all count as passes over "
        "the training images. The vertical axis is stretched towards 100 %. P-SGD, P-BFGS and the "
        "pass of P-Adam take their subspace from the passes of SGD up to the dotted line; these "
        "come on top and are not drawn. A point of a method in the subspace includes the pass "
        "that re-estimates the batch-norm statistics, as if the run had ended there. Thin lines: "
        "single seeds, where there are several.",
    )


def _draw_accuracy(results: dict[str, Any], figure: Figure) -> None:
    axes = figure.add_subplot()
    curves: dict[str, list[list[list[float]]]] = defaultdict(list)
    for run in results["runs"]:
        curves[run["method"]].append(run["validation_curve"])
    highest = 0.0
    for method in _SHOWN:
        colour, dashes = COLOURS[method], _DASHES.get(method, "-")
        for curve in curves[method]:
            passes, accuracies = np.array(curve).T
            highest = max(highest, accuracies.max())
            if len(curves[method]) > 1:
                axes.plot(passes, _error(accuracies), color=colour, linewidth=0.8, alpha=0.35)
        grid, mean = _mean_curve(curves[method])
        axes.plot(grid, _error(mean), dashes, color=colour, label=NAMES[method])
        axes.plot(grid[-1], _error(mean[-1:]), "o", color=colour, markersize=6)
    end = float(np.mean([curve[-1][0] for curve in curves["sgd_half"]]))
    axes.axvline(end, color=LIGHT["soft"], linewidth=1, linestyle=":")
    axes.annotate(
        "recording of SGD ends",
        (end, 0.3),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        rotation=90,
        va="center",
        color=LIGHT["soft"],
        fontsize=9,
    )
    axes.set_yscale("log")
    axes.set_ylim(1.15, 0.7 * float(_error(np.array([highest]))[0]))
    axes.minorticks_off()
    ticks = [t for t in (0, 50, 80, 90, 95, 98, 99, 99.5) if t <= 100 * highest]
    axes.set_yticks([1 - t / 100 for t in ticks], [f"{t:g} %" for t in ticks])
    axes.set_xlabel("passes over the training images")
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=3)


def _error(accuracies: np.ndarray) -> np.ndarray:
    """Return 1 - accuracy, kept above zero for the logarithmic axis."""
    return np.maximum(1 - accuracies, 1e-3)


def _mean_curve(curves: list[list[list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Average curves whose points need not be at the same number of passes."""
    points = [np.array(curve).T for curve in curves]
    start = max(passes[0] for passes, _ in points)
    end = min(passes[-1] for passes, _ in points)
    inner = points[0][0][(points[0][0] > start) & (points[0][0] < end)]
    grid = np.concatenate([[start], inner, [end]])
    values = [np.interp(grid, passes, accuracies) for passes, accuracies in points]
    return grid, np.mean(values, axis=0)


def _trajectory(plane: Landscape) -> Drawing:
    tracks = [
        views.Track("SGD, recorded first half", plane.sampled, COLOURS["sgd"]),
        views.Track(NAMES["psgd"], plane.paths["psgd"], COLOURS["psgd"]),
        views.Track(NAMES["pbfgs"], plane.paths["pbfgs"], COLOURS["pbfgs"]),
    ]
    contours = views.Contours(plane.x, plane.y, plane.loss, "training loss")
    marks = [views.Mark("full SGD", plane.sgd_end, "*"), views.Mark("start", (0, 0), "s")]
    return views.plane(tracks, ("theta 1", "theta 2"), contours, marks)._replace(
        name="trajectory",
        title="Training seen on the plane of the first two directions",
        caption=(
            "The paths of the first seed, projected on the first two directions. Contours: "
            "training loss on the plane through the end of P-BFGS, whose other coordinates are "
            "kept; the other paths run above or below that plane."
        ),
    )
