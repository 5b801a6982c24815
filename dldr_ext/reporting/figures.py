"""The style that all figures share."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision.
COLOURS = {
    "sgd": "#555555",
    "sgd_half": "#999999",
    "psgd": "#E69F00",
    "pbfgs": "#0072B2",
    "random": "#CC79A7",
}
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def new_figure(title: str, size: tuple[float, float] = (7.2, 4.4)) -> tuple[Figure, Axes]:
    """One plot with a title; the reports show several below each other."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontweight="bold")
    return figure, axes
