"""The demo's three figures, as PNG files. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reporting.figures import COLOURS, new_figure, percentages, save_figures, whole_numbers
from .landscape import Landscape
from .methods import NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: dict[str, Any], plane: Landscape | None, folder: Path) -> list[Path]:
    """Draw what the results hold into `folder`.

    Parameters
    ----------
    results : dict
        As `run.run` returned it.
    plane : Landscape or None
        None where the subspace has one dimension only.
    folder : Path
        An existing folder.

    Returns
    -------
    list of Path
        The files, in the order of the report.
    """
    drawings: dict[str, Callable[[], Figure]] = {
        "accuracy.png": partial(_accuracy, results),
        "spectrum.png": partial(_spectrum, results),
    }
    if plane is not None:
        drawings["trajectory.png"] = partial(_trajectory, plane)
    return save_figures(drawings, folder)


def _accuracy(results: dict[str, Any]) -> Figure:
    """Draw validation accuracy against passes: a thin line for each seed, a thick one for the mean.

    The axis spreads what lies near 100 %, where all methods but the control end.
    """
    figure, axes = new_figure("Accuracy on the validation digits against passes")
    curves: dict[str, list[list[list[float]]]] = defaultdict(list)
    for run in results["runs"]:
        curves[run["method"]].append(run["validation_curve"])
    highest = 0.0
    for method in ("sgd", "random", "psgd", "pbfgs", "one_pass"):
        colour = COLOURS[method]
        for curve in curves[method]:
            passes, accuracies = np.array(curve).T
            highest = max(highest, accuracies.max())
            if len(curves[method]) > 1:
                axes.plot(passes, _error(accuracies), color=colour, linewidth=0.8, alpha=0.35)
        grid, mean = _mean_curve(curves[method])
        axes.plot(grid, _error(mean), color=colour, label=NAMES[method])
        axes.plot(grid[-1], _error(mean[-1:]), "o", color=colour, markersize=6)
    end = float(np.mean([curve[-1][0] for curve in curves["sgd_half"]]))
    axes.axvline(end, color=COLOURS["sgd"], linewidth=1, linestyle=":")
    axes.annotate(
        "recording of SGD ends",
        (end, 0.3),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        rotation=90,
        va="center",
        color=COLOURS["sgd"],
        fontsize=9,
    )
    axes.set_yscale("log")
    axes.set_ylim(1.15, 0.7 * float(_error(np.array([highest]))[0]))
    axes.minorticks_off()
    ticks = [t for t in (0, 50, 80, 90, 95, 98, 99, 99.5) if t <= 100 * highest]
    axes.set_yticks([1 - t / 100 for t in ticks], [f"{t:g} %" for t in ticks])
    axes.set_xlabel("passes over the training images (gradients, trials, batch-norm statistics)")
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=3, fontsize=10)
    return figure


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


def _spectrum(results: dict[str, Any]) -> Figure:
    """Draw the explained variance of single directions, and what the first k leave over."""
    dim = results["runs"][0]["dim"]
    figure, axes = new_figure("How much of the SGD trajectory the directions explain")
    for i, ratio in enumerate(results["explained_variance_ratio_by_seed"]):
        order = np.arange(1, len(ratio) + 1)
        colour = COLOURS["pbfgs"]
        axes.plot(
            order, ratio, "o-", color=colour, markersize=3, linewidth=1, alpha=1 if i == 0 else 0.35
        )
        if i == 0:
            axes.set_yscale("log")
            axes.set_ylim(top=1)
            left = np.clip(1 - np.cumsum(ratio[:-1]), 1e-12, 1)
            axes.plot(order[:-1], left, color=COLOURS["psgd"])
            axes.annotate(
                "not explained by the first k",
                (order[len(left) // 2], left[len(left) // 2]),
                xytext=(6, 6),
                textcoords="offset points",
                color=COLOURS["psgd"],
            )
            axes.annotate(
                "direction k alone",
                (order[len(left) // 3], ratio[len(left) // 3]),
                xytext=(-6, -8),
                textcoords="offset points",
                ha="right",
                va="top",
                color=colour,
            )
            share = float(np.sum(ratio[:dim]))
            axes.axvline(dim, color=COLOURS["sgd"], linewidth=1, linestyle=":")
            axes.annotate(
                f"{dim} directions kept:\n{100 * share:.3f} % of the variance",
                (dim, 0.97),
                xycoords=("data", "axes fraction"),
                xytext=(-6, 0) if dim > len(ratio) / 2 else (6, 0),
                textcoords="offset points",
                ha="right" if dim > len(ratio) / 2 else "left",
                va="top",
                color=COLOURS["sgd"],
            )
    percentages(axes.yaxis)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("direction k")
    axes.set_ylabel("share of the variance")
    return figure


def _trajectory(plane: Landscape) -> Figure:
    """Draw loss contours with the paths on them."""
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    figure, axes = new_figure("Training seen on the plane of the first two directions", (7.2, 5.6))
    axes.grid(False)
    loss = np.array(plane.loss)
    norm = LogNorm(loss.min(), loss.max())
    levels = np.geomspace(loss.min(), loss.max(), 15)
    filled = axes.contourf(plane.x, plane.y, loss, levels, cmap="Greys", norm=norm, alpha=0.55)
    axes.contour(plane.x, plane.y, loss, levels, colors="white", linewidths=0.6)
    bar = figure.colorbar(filled, ax=axes, pad=0.02)
    ticks = levels[::2]
    bar.set_ticks(list(ticks), labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label("training loss on the plane through the end of P-BFGS")
    for path, colour, label in (
        (plane.sampled, "black", "SGD, recorded first half"),
        (plane.paths["psgd"], COLOURS["psgd"], NAMES["psgd"]),
        (plane.paths["pbfgs"], COLOURS["pbfgs"], NAMES["pbfgs"]),
    ):
        x, y = np.array(path).T
        marker = "." if len(path) <= 200 else ""
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.3, label=label)
        axes.plot(x[-1], y[-1], "o", color=colour, markeredgecolor="white", markersize=9)
    axes.plot(*plane.sgd_end, "*", color="black", markeredgecolor="white", markersize=15)
    axes.plot(0, 0, "s", color="white", markeredgecolor="black", markersize=8)
    for text, point in (("full SGD", plane.sgd_end), ("start", (0, 0))):
        axes.annotate(
            text,
            point,
            xytext=(8, 6),
            textcoords="offset points",
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axes.set_xlabel("theta 1")
    axes.set_ylabel("theta 2")
    axes.legend(loc="best", frameon=True)
    return figure
