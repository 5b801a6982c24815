"""The files that a demo leaves behind: results.json, its figures and report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..reporting import html
from ..reporting.figures import Drawing, save_figures
from ..reporting.html import Card, Table, percent
from . import plots
from .landscape import Landscape
from .methods import NAMES
from .summary import Row, footnote, summarize, verdict

_CARDS = ("sgd", "pbfgs", "one_pass", "random")


def save(results: dict[str, Any], plane: Landscape | None, folder: Path) -> list[Path]:
    """Write results.json, the figures and report.html. Needs matplotlib.

    Parameters
    ----------
    results : dict
        As `run.run` returned it.
    plane : Landscape or None
        As `run.run` returned it.
    folder : Path
        Made if it is missing; files of an earlier run are replaced.

    Returns
    -------
    list of Path
        The files written, the report first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = folder / "results.json"
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    drawings = plots.drawings(results, plane)
    images = save_figures(drawings, folder)
    return [_write_report(results, drawings, folder), numbers, *images]


def _write_report(results: dict[str, Any], drawings: list[Drawing], folder: Path) -> Path:
    rows, runs = summarize(results), results["runs"]
    return html.write(
        folder / "report.html",
        Path(__file__).with_suffix(".html"),
        verdict=verdict(results),
        cards=[
            Card(
                NAMES[row.method],
                row.accuracy,
                f"test accuracy after {row.all_passes:.1f} passes in all",
                row.method == "pbfgs",
            )
            for row in rows
            if row.method in _CARDS
        ],
        results=Table(
            "All methods; every pass over the training images counts",
            ["method", "test accuracy", "passes in all", "its own", "sampling passes", "time (s)",
             "trained variables", "variance kept"],
            [_cells(row, runs[0]["numel"]) for row in rows],
            [row.method for row in rows].index("pbfgs"),
        ),
        footnote=footnote(results),
        drawings=drawings,
        dims=" or ".join(map(str, sorted({run["dim"] for run in runs}))),
        runs=Table(
            "Single runs",
            ["method", "seed", "test", "validation", "passes", "seconds"],
            [
                [
                    NAMES[run["method"]],
                    run["seed"],
                    percent(run["test_accuracy"]),
                    percent(run["validation_accuracy"]),
                    f"{run['data_passes']:.2f}",
                    f"{run['seconds']:.1f}",
                ]
                for run in runs
            ],
        ),
        config=results["config"],
        versions=results["versions"],
        files=["results.json", *(f"{drawing.name}.png" for drawing in drawings)],
    )  # fmt: skip


def _cells(row: Row, numel: int) -> list[str]:
    name, accuracy, *rest = row.cells(numel)
    return [name, accuracy, f"{row.all_passes:.1f}", *rest]
