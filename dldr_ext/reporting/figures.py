"""The style that all figures share, and how they become files. Drawing needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision.
COLOURS = {
    "sgd": "#555555",
    "sgd_half": "#999999",
    "psgd": "#E69F00",
    "pbfgs": "#0072B2",
    "one_pass": "#D55E00",
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
    """Start one plot with a title; the reports show several below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontweight="bold")
    return figure, axes


def save_figures(drawings: Mapping[str, Callable[[], Figure]], folder: Path) -> list[Path]:
    """Draw figures in the shared style and save them as PNG files.

    Parameters
    ----------
    drawings : mapping of str to callable
        File names, and what draws each figure.
    folder : Path
        An existing folder.

    Returns
    -------
    list of Path
        The files, in the order of ``drawings``.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            FigureCanvasAgg(figure)
            figure.savefig(folder / name, dpi=150)
    return [folder / name for name in drawings]


def whole_numbers(axis: Axis) -> None:
    """Put the ticks of an axis on whole numbers; one tick is enough."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def percentages(axis: Axis) -> None:
    """Label the ticks of an axis of shares in percent."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
