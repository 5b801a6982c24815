"""The figures of an analysis, as PNG files. Needs matplotlib."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reporting.figures import COLOURS, new_figure, percentages, save_figures, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = COLOURS["pbfgs"], COLOURS["psgd"], COLOURS["sgd"]


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what an analysis found into an existing folder.

    Parameters
    ----------
    results : dict
        As `Analysis.run` returned it.
    folder : Path

    Returns
    -------
    list of Path
        The files, in the order of the report.
    """
    drawings = {"spectrum.png": _spectrum, "drift.png": _drift, "cosine.png": _cosine}
    return save_figures({name: partial(draw, results) for name, draw in drawings.items()}, folder)


def _spectrum(results: dict[str, Any]) -> Figure:
    figure, axes = new_figure("Share of the variance along each direction")
    ratio = np.array(results["explained_variance_ratio"])
    order = np.arange(1, len(ratio) + 1)
    axes.plot(order, ratio, "o-", color=_BLUE, markersize=3, label="direction k alone")
    left = np.clip(1 - np.cumsum(ratio[:-1]), 1e-12, 1)
    axes.plot(order[:-1], left, color=_ORANGE, label="not explained by the first k together")
    axes.set_yscale("log")
    axes.set_ylim(top=1.2)
    percentages(axes.yaxis)
    kept = results["subspace"]
    if kept is not None:
        axes.axvline(kept["dim"], color=_GREY, linewidth=1, linestyle=":")
        right = kept["dim"] > len(ratio) / 2
        axes.annotate(
            f"{kept['dim']} kept: {100 * kept['explained_variance']:.3f} %",
            (kept["dim"], 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-6, 0) if right else (6, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            color=_GREY,
        )
    axes.set_xlabel("direction k")
    axes.set_ylabel("share of the variance")
    whole_numbers(axes.xaxis)
    axes.legend(loc="upper right")
    return figure


def _drift(results: dict[str, Any]) -> Figure:
    figure, axes = new_figure("How far the weights went")
    norms, steps = results["drift"]["from_first"], results["drift"]["steps"]
    axes.plot(np.arange(len(norms)), norms, "o-", color=_BLUE, markersize=3, label="from the first")
    axes.plot(
        np.arange(1, len(norms)),
        steps,
        "o-",
        color=_ORANGE,
        markersize=3,
        label="from the one before",
    )
    axes.set_xlabel("checkpoint")
    axes.set_ylabel("distance")
    axes.set_ylim(bottom=0)
    whole_numbers(axes.xaxis)
    axes.legend(loc="best")
    return figure


def _cosine(results: dict[str, Any]) -> Figure:
    figure, axes = new_figure("Cosines between steps from one checkpoint to the next", (7.2, 5.8))
    axes.grid(False)
    cosines = np.array(results["cosines"]["steps"])
    count = len(cosines) + 1
    image = axes.imshow(
        cosines,
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        extent=(0.5, count - 0.5, count - 0.5, 0.5),
        interpolation="nearest",
    )
    axes.set_xlabel("step to checkpoint")
    axes.set_ylabel("step to checkpoint")
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    figure.colorbar(image, ax=axes, label="cosine", pad=0.02)
    return figure
