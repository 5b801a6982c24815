"""The figures of the experiments, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dldr_ext.reporting.figures import COLOURS, STYLE, new_figure

from .methods import NAMES
from .statistics import groups, mean_and_spread, paired

Run = dict[str, Any]
_COLOURS = COLOURS | {
    "sgd_sampled": "#E69F00",
    "pbfgs_last": "#009E73",
    "pbfgs_early": "#56B4E9",
    "one_pass_mean": "#D55E00",
    "one_pass_last": "#D55E00",
    "trained": "#555555",
    "tuned_sgd": "#E69F00",
    "tuned_pbfgs": "#0072B2",
}
_TICKS = (0, 50, 70, 80, 85, 88, 90, 92, 95, 97, 98, 99, 99.5)
_UNIT = "test accuracy, %"


def draw(runs: list[Run], folder: Path) -> list[Path]:
    """Draw every experiment that has runs into an existing folder.

    Returns
    -------
    list of Path
        The files written.
    """
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE | {"axes.titleweight": "bold"}):
        for (experiment, data, network), rows in groups(
            runs, "experiment", "data", "network"
        ).items():
            if experiment in _DRAWN:
                title = f"{data}, {network}"
                figures[f"{experiment}-{data}-{network}"] = _DRAWN[experiment](rows, title)
        zoo = [run for run in runs if run["experiment"] == "zoo"]
        if zoo:
            figures["zoo"] = _zoo(zoo)
        written = []
        for name, figure in figures.items():
            FigureCanvasAgg(figure)
            figure.savefig(folder / f"{name}.png", dpi=110)
            written.append(folder / f"{name}.png")
    return written


def _values(runs: list[Run], key: str = "test_accuracy") -> tuple[float, float]:
    return mean_and_spread([100 * run[key] for run in runs])


def _compare(runs: list[Run], title: str) -> Figure:
    """A row for each method: every seed, and the mean with its spread, on an axis that spreads what
    lies near 100 %."""
    found = groups(runs, "method")
    names = [name for name in NAMES if (name,) in found]
    figure, axes = new_figure(
        f"Test accuracy of all methods: {title}", (7.6, 0.42 * len(names) + 1.2)
    )
    best = max(run["test_accuracy"] for run in runs)
    for row, name in enumerate(names):
        rows, colour = found[name,], _COLOURS.get(name, "#555555")
        errors = [max(1 - run["test_accuracy"], 5e-4) for run in rows]
        axes.plot(errors, [row] * len(rows), "o", color=colour, markersize=4, alpha=0.4)
        axes.plot(np.mean(errors), row, "D", color=colour, markersize=7)
        passes = np.mean([run["passes"] for run in rows])
        before = np.mean([run["sampling_passes"] for run in rows])
        text = f"{before:.0f} + {passes:.0f}" if before else f"{passes:.0f}"
        axes.annotate(
            text,
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
    axes.annotate(
        "passes", (1.01, -0.05), xycoords="axes fraction", fontsize=10, annotation_clip=False
    )
    axes.set_xscale("log")
    worst = min(run["test_accuracy"] for run in runs)
    axes.set_xlim(min(1.1, 1.4 * (1 - worst)), 0.8 * max(1 - best, 5e-4))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    ticks = [t for t in _TICKS if high <= 1 - t / 100 <= low]
    axes.set_xticks([1 - t / 100 for t in ticks], [f"{t:g}" for t in ticks])
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"{_UNIT}; small: seeds, large: their mean")
    return figure


def _dims(runs: list[Run], title: str) -> Figure:
    """Accuracy against dimension, with the band of SGD."""
    figure, axes = new_figure(f"P-BFGS by dimension: {title}")
    found = groups(runs, "method")
    mean, spread = _values(found["sgd",])
    axes.axhspan(mean - spread, mean + spread, color=_COLOURS["sgd"], alpha=0.15)
    axes.axhline(mean, color=_COLOURS["sgd"], label="SGD, all parameters")
    for method in ("pbfgs", "pbfgs_last"):
        if (method,) not in found:
            continue
        by_dim = sorted(groups(found[method,], "dim").items())
        means, spreads = zip(*(_values(rows) for _, rows in by_dim), strict=True)
        axes.errorbar(
            [dim for (dim,), _ in by_dim],
            means,
            spreads,
            fmt="o-",
            capsize=3,
            color=_COLOURS[method],
            label=NAMES[method],
        )
    dims = sorted({run["dim"] for run in runs if run["dim"] is not None})
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.set_xlabel("dimension d")
    axes.set_ylabel(f"{_UNIT} (mean ± sd)")
    axes.legend(loc="lower right")
    return figure


def _noise(runs: list[Run], title: str) -> Figure:
    """Accuracy against the share of wrong labels; and how it goes with the passes at one share."""
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = sorted({run["noise"] for run in runs})
    lines = [("sgd", "test_accuracy", "-", "SGD, last epoch")]
    lines.append(("sgd", "early_test_accuracy", "--", "SGD, best epoch"))
    lines.append(("sgd_sampled", "test_accuracy", ":", NAMES["sgd_sampled"]))
    lines += [(m, "test_accuracy", "-", NAMES[m]) for m in ("pbfgs", "pbfgs_last")]
    for method, key, style, label in lines:
        chosen = [run for run in runs if run["method"] == method]
        rows = groups(sorted(chosen, key=lambda run: run["noise"]), "noise")
        if not rows:
            continue
        means, spreads = zip(*(_values(found, key) for found in rows.values()), strict=True)
        left.errorbar(
            [100 * level for (level,) in rows],
            means,
            spreads,
            fmt="o" + style,
            capsize=3,
            color=_COLOURS[method],
            label=label,
        )
    left.set_title(f"Wrong labels: {title}")
    left.set_xlabel("wrong labels in the training part, %")
    left.set_ylabel(_UNIT)
    left.legend(loc="lower left")
    shown = min(levels, key=lambda level: abs(level - 0.4))
    for method in ("sgd", "pbfgs", "pbfgs_last"):
        for i, run in enumerate(r for r in runs if r["method"] == method and r["noise"] == shown):
            passes, accuracies = np.array(run["curve"]).T
            right.plot(
                run["sampling_passes"] + passes,
                100 * accuracies,
                color=_COLOURS[method],
                alpha=0.6,
                linewidth=1.2,
                label=NAMES[method] if i == 0 else None,
            )
    right.set_title(f"{100 * shown:.0f} % wrong labels, seed by seed")
    right.set_xlabel("passes over the training part, sampling included")
    right.set_ylabel("accuracy on the (right) validation labels, %")
    right.legend(loc="lower right")
    return figure


def _paired(axes: Axes, runs: list[Run], base: str, chosen: tuple[str, ...], row: float) -> None:
    """Differences from a method, seed by seed, a little apart for each other method."""
    found = groups(runs, "method")
    for i, method in enumerate(name for name in chosen if (name,) in found):
        differences = paired(found[method,], found[base,])
        mean, spread = mean_and_spread(differences)
        axes.errorbar(
            mean,
            row + 0.18 * (i - (len(chosen) - 1) / 2),
            xerr=spread,
            fmt="o",
            capsize=3,
            color=_COLOURS[method],
            label=NAMES[method],
        )


def _zoo(runs: list[Run]) -> Figure:
    """Differences from the full SGD for each network."""
    found = groups(runs, "data", "network")
    figure, axes = new_figure(
        "Test accuracy against the full SGD, by network", (7.6, 0.75 * len(found) + 1.5)
    )
    for row, rows in enumerate(found.values()):
        _paired(axes, rows, "sgd", ("sgd_half", "pbfgs", "pbfgs_last", "pbfgs_early"), row)
    axes.axvline(0, color="#555555", linewidth=1)
    labels = []
    for (data, network), rows in found.items():
        mean, _ = _values([run for run in rows if run["method"] == "sgd"])
        labels.append(f"{network}, {data}\nSGD: {mean:.1f} %")
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("percentage points: mean and standard deviation of the paired differences")
    handles, texts = axes.get_legend_handles_labels()
    unique = dict(zip(texts, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, fontsize=10)
    return figure


def _finetune(runs: list[Run], title: str) -> Figure:
    """What fine-tuning does to the trained model."""
    figure, axes = new_figure(f"Test accuracy against the trained model: {title}", (7.6, 2.4))
    for row, method in enumerate(("tuned_sgd", "tuned_pbfgs")):
        _paired(axes, runs, "trained", (method,), row)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks((0, 1), [NAMES[name] for name in ("tuned_sgd", "tuned_pbfgs")])
    axes.set_ylim(1.5, -0.5)
    axes.set_xlabel("percentage points: mean and standard deviation of the paired differences")
    return figure


_DRAWN = {
    "compare": _compare,
    "real": _compare,
    "dims": _dims,
    "noise": _noise,
    "finetune": _finetune,
}
