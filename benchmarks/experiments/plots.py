"""The figures of the experiments."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dldr_ext.reporting.figures import COLOURS, LIGHT, Drawing

from .methods import NAMES
from .statistics import groups, mean_and_spread, paired

Run = dict[str, Any]
_COLOURS = COLOURS | {
    "sgd_sampled": LIGHT["orange"],
    "pbfgs_last": LIGHT["green"],
    "pbfgs_early": LIGHT["purple"],
    "one_pass_mean": LIGHT["red"],
    "one_pass_last": LIGHT["red"],
    "trained": LIGHT["ink"],
    "tuned_sgd": LIGHT["orange"],
    "tuned_pbfgs": LIGHT["blue"],
}
_TICKS = (0, 20, 30, 40, 50, 60, 70, 80, 85, 88, 90, 92, 95, 97, 98, 99, 99.5)
_UNIT = "test accuracy, %"


def drawings(runs: list[Run]) -> list[Drawing]:
    """A drawing of every experiment that has runs; wrong labels have two."""
    found = []
    for (experiment, data, network), rows in groups(runs, "experiment", "data", "network").items():
        for prefix, draw, title in _DRAWN.get(experiment, ()):
            name = f"{prefix}-{data}-{network}"
            whole = f"{title}: {data}, {network}"
            drawing = Drawing(name, whole, _words(rows), partial(draw, rows))
            count = len(groups(rows, "method"))
            heights = {"compare": 0.3 * count + 1.1, "real": 0.3 * count + 1.1, "finetune": 2.2}
            found.append(drawing._replace(height=heights.get(prefix, drawing.height)))
    zoo = [run for run in runs if run["experiment"] == "zoo"]
    if zoo:
        title = "Test accuracy against the full SGD, by network"
        height = 0.6 * len(groups(zoo, "data", "network")) + 1.4
        found.append(Drawing("zoo", title, _words(zoo), partial(_zoo, zoo), height=height))
    return found


def _words(runs: list[Run]) -> str:
    """The accuracy of each method, for those who cannot see it."""
    said = []
    for (method,), rows in groups(runs, "method").items():
        mean, spread = _values(rows)
        said.append(f"{NAMES[method]} {mean:.1f} ± {spread:.1f} %")
    return f"Mean test accuracy over all that is shown: {', '.join(said)}."


def _at_most_all(axes: Axes) -> None:
    """End an axis of percentages at 100: the mean and its spread may reach beyond."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))


def _values(runs: list[Run], key: str = "test_accuracy") -> tuple[float, float]:
    return mean_and_spread([100 * run[key] for run in runs])


def _compare(runs: list[Run], figure: Figure) -> None:
    """A row for each method: every seed, and the mean with its spread, on an axis that spreads what
    lies near 100 %."""
    found = groups(runs, "method")
    names = [name for name in NAMES if (name,) in found]
    axes = figure.add_subplot()
    best = max(run["test_accuracy"] for run in runs)
    for row, name in enumerate(names):
        rows, colour = found[name,], _COLOURS.get(name, LIGHT["soft"])
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
            fontsize=9,
            annotation_clip=False,
        )
    axes.annotate(
        "passes", (1.01, 1.02), xycoords="axes fraction", fontsize=9, annotation_clip=False
    )
    axes.set_xscale("log")
    worst = min(run["test_accuracy"] for run in runs)
    axes.set_xlim(min(1.1, 1.4 * (1 - worst)), 0.8 * max(1 - best, 5e-4))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    ticks: list[float] = []
    for tick in reversed([t for t in _TICKS if high <= 1 - t / 100 <= low]):
        places = [np.log((1 - t / 100) / (1 - tick / 100)) for t in ticks]
        if all(abs(place) > 0.07 * np.log(low / high) for place in places):
            ticks.append(tick)
    axes.set_xticks([1 - t / 100 for t in ticks], [f"{t:g}" for t in ticks])
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"{_UNIT}; small: seeds, large: their mean", loc="right")


def _dims(runs: list[Run], figure: Figure) -> None:
    """Accuracy against dimension, with the band of SGD."""
    axes = figure.add_subplot()
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
    _at_most_all(axes)
    figure.legend(loc="outside lower center", ncols=2)


def _noise(runs: list[Run], figure: Figure) -> None:
    """Accuracy against the share of wrong labels."""
    axes = figure.add_subplot()
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
        axes.errorbar(
            [100 * level for (level,) in rows],
            means,
            spreads,
            fmt="o" + style,
            markersize=4,
            capsize=3,
            color=_COLOURS[method],
            label=label,
        )
    axes.set_xlabel("wrong labels in the training part, %")
    axes.set_ylabel(_UNIT)
    _at_most_all(axes)
    figure.legend(loc="outside lower center", ncols=2)


def _shown_level(runs: list[Run]) -> float:
    return min({run["noise"] for run in runs}, key=lambda level: abs(level - 0.4))


def _noise_curves(runs: list[Run], figure: Figure) -> None:
    """How the accuracy goes with the passes, at the share of wrong labels nearest to 40 %."""
    axes = figure.add_subplot()
    shown = _shown_level(runs)
    for method in ("sgd", "pbfgs", "pbfgs_last"):
        for i, run in enumerate(r for r in runs if r["method"] == method and r["noise"] == shown):
            passes, accuracies = np.array(run["curve"]).T
            axes.plot(
                run["sampling_passes"] + passes,
                100 * accuracies,
                color=_COLOURS[method],
                alpha=0.6,
                linewidth=1.2,
                label=NAMES[method] if i == 0 else None,
            )
    axes.set_xlabel(f"passes, sampling included; {100 * shown:.0f} % wrong labels")
    axes.set_ylabel("accuracy on (right) validation labels, %")
    _at_most_all(axes)
    figure.legend(loc="outside lower center", ncols=2)


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


def _zoo(runs: list[Run], figure: Figure) -> None:
    """Differences from the full SGD for each network."""
    found = groups(runs, "data", "network")
    axes = figure.add_subplot()
    for row, rows in enumerate(found.values()):
        _paired(axes, rows, "sgd", ("sgd_half", "pbfgs", "pbfgs_last", "pbfgs_early"), row)
    axes.axvline(0, color=LIGHT["soft"], linewidth=1)
    labels = []
    for (data, network), rows in found.items():
        mean, _ = _values([run for run in rows if run["method"] == "sgd"])
        labels.append(f"{network}, {data}\nSGD: {mean:.1f} %")
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("percentage points, paired: mean ± standard deviation")
    handles, texts = axes.get_legend_handles_labels()
    unique = dict(zip(texts, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2)


def _finetune(runs: list[Run], figure: Figure) -> None:
    """What fine-tuning does to the trained model."""
    axes = figure.add_subplot()
    for row, method in enumerate(("tuned_sgd", "tuned_pbfgs")):
        _paired(axes, runs, "trained", (method,), row)
    axes.axvline(0, color=LIGHT["soft"], linewidth=1)
    axes.set_yticks((0, 1), [NAMES[name] for name in ("tuned_sgd", "tuned_pbfgs")])
    axes.set_ylim(1.5, -0.5)
    axes.set_xlabel("percentage points, paired: mean ± standard deviation")


_DRAWN = {
    "compare": [("compare", _compare, "Test accuracy of all methods")],
    "real": [("real", _compare, "Test accuracy of all methods")],
    "dims": [("dims", _dims, "P-BFGS by dimension")],
    "noise": [
        ("noise", _noise, "Wrong labels"),
        ("noise-curves", _noise_curves, "Wrong labels, seed by seed"),
    ],
    "finetune": [("finetune", _finetune, "Test accuracy against the trained model")],
}
