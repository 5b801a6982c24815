"""The files that a demo leaves behind: results.json, its figures and report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..reporting import html
from ..reporting.html import Card, percent
from . import plots
from .landscape import Landscape
from .methods import NAMES
from .summary import footnote, summarize, verdict

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
    images = plots.draw(results, plane, folder)
    return [_write_report(results, images, folder), numbers, *images]


def _write_report(results: dict[str, Any], images: list[Path], folder: Path) -> Path:
    rows, runs = summarize(results), results["runs"]
    return html.write(
        folder / "report.html",
        "demo/report.html",
        verdict=verdict(results),
        cards=[
            Card(
                NAMES[row.method],
                row.accuracy,
                f"test accuracy after {row.sampling_passes + row.passes:.1f} passes in all",
                row.method == "pbfgs",
            )
            for row in rows
            if row.method in _CARDS
        ],
        results=[
            {"cells": row.cells(runs[0]["numel"]), "best": row.method == "pbfgs"} for row in rows
        ],
        footnote=footnote(results),
        images={image.name: image for image in images},
        dims=" or ".join(map(str, sorted({run["dim"] for run in runs}))),
        runs=[
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
        config=results["config"],
        versions=results["versions"],
    )
