"""The report of an analysis: one HTML file that needs no other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import artifacts
from ..reporting import html
from ..reporting.figures import Drawing
from ..reporting.html import Card
from . import tables
from .plots import named_runs

_MOST_PAIRS = 20  # near-duplicates that are listed
_MOST_LINES = 100  # of remarks in the report
_MOST_ROWS = 100  # of matrices in analysis.json: some hundred kilobytes
_MATRICES = "matrices.safetensors"


def verdict(results: dict[str, Any]) -> str:
    """Say in a sentence what was found; in one for each of two runs."""
    said = []
    for name, run in named_runs(results).items():
        dimension = run["effective_dimension"]
        said.append(
            f"{f'{name}: ' if 'other' in results else ''}{len(run['checkpoints'])} checkpoints of "
            f"{results['numel']:,} numbers: 90, 95 and 99 % of their variance lie along "
            f"{dimension['0.9']}, {dimension['0.95']} and {dimension['0.99']} directions."
        )
    return " ".join(said)


def duplicates(results: dict[str, Any]) -> list[str]:
    """Describe each pair of checkpoints that are nearly the same, in a line."""
    paths = results["checkpoints"]
    lines = [
        f"{paths[s]} and {paths[t]} are the same"
        if share == 0
        else f"{paths[s]} and {paths[t]} differ by {share:.1e} of a step"
        for s, t, share in results["near_duplicates"][:_MOST_PAIRS]
    ]
    more = results.get("near_duplicates_in_all", 0) - _MOST_PAIRS
    return [*lines, f"and {more} more pairs"] if more > 0 else lines


def write(
    results: dict[str, Any], drawings: Sequence[Drawing], versions: dict[str, Any], folder: Path
) -> Path:
    """Write report.html.

    Parameters
    ----------
    results : dict
        As `Analysis.run` returned it.
    drawings : sequence of Drawing
        As `plots.drawings` returned them.
    versions : dict
        As `html.versions` returned them.
    folder : Path
        An existing folder.

    Returns
    -------
    Path
        The report.
    """
    settings = {
        key: results[key]
        for key in ("numel", "tensors", "dtype", "bytes", "norm_of_first", "seconds")
    }
    subspace = [] if results["subspace"] is None else [Path(results["subspace"]["path"]).name]
    return html.write(
        folder / "report.html",
        Path(__file__).with_suffix(".html"),
        verdict=verdict(results),
        cards=list(_cards(results)),
        remarks={
            "Left out": _some([*results["skipped"], *results.get("other", {}).get("skipped", [])]),
            "Near-duplicates": duplicates(results),
            "Notes": _some(results["notes"]),
        },
        drawings=drawings,
        directions=results["report"],
        runs=tables.runs(results) if "other" in results else None,
        loss=list(tables.loss_along(results)) if "loss" in results else None,
        plane=tables.loss_on_plane(results) if "loss" in results else None,
        layers=tables.layers(results),
        checkpoints=list(tables.checkpoints(results)),
        settings=settings | {"subspace": results["subspace"] or "not kept"},
        versions=versions,
        files=["analysis.json", *subspace, *(f"{drawing.name}.png" for drawing in drawings)],
    )


def write_json(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write analysis.json; of many checkpoints the T x T matrices go into a file beside it.

    Parameters
    ----------
    results : dict
        As `Analysis.run` returned it.
    folder : Path
        An existing folder.

    Returns
    -------
    dict
        What was written. Of more than 100 checkpoints ``gram`` and ``cosines["steps"]`` are None,
        and ``matrices`` is the path of a safetensors file with the tensors "gram" and "cosines";
        likewise ``layers["steps"]`` of more than 10,000 numbers, "layers". Those of a second run,
        ``other``, are "other_gram" and so on.
    """
    path = folder / _MATRICES
    written, matrices = _without_matrices(results)
    if "other" in results:
        written["other"], more = _without_matrices(results["other"])
        matrices |= {f"other_{name}": matrix for name, matrix in more.items()}
    written["matrices"] = str(path) if matrices else None
    if matrices:
        tensors = {
            name: torch.tensor(matrix, dtype=torch.float64, device="cpu")
            for name, matrix in matrices.items()
        }
        artifacts.save(path, "analysis_matrices", 1, tensors, {})
    else:
        path.unlink(missing_ok=True)  # of an earlier analysis
    (folder / "analysis.json").write_text(json.dumps(written, indent=1) + "\n")
    return written


def _without_matrices(results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results of a run without its large matrices, and these."""
    written, matrices = dict(results), {}
    if len(results["checkpoints"]) > _MOST_ROWS:
        matrices = {"gram": results["gram"], "cosines": results["cosines"]["steps"]}
        written["gram"], written["cosines"] = None, {**results["cosines"], "steps": None}
    if sum(map(len, results["layers"]["steps"])) > _MOST_ROWS**2:
        matrices["layers"] = results["layers"]["steps"]
        written["layers"] = {**results["layers"], "steps": None}
    return written, matrices


def _cards(results: dict[str, Any]) -> Iterable[Card]:
    for name, run in named_runs(results).items():
        dimension = run["effective_dimension"]
        whose = f"{name}: " if "other" in results else ""
        ratio = f"{dimension['participation_ratio']:.1f}"
        yield Card(f"{whose}participation", ratio, "effective dimension")
        count = str(dimension["0.99"])
        yield Card(f"{whose}99 % of the variance", count, "directions")
    kept = results["subspace"]
    if kept is not None:
        share = f"{100 * kept['explained_variance']:.2f} %"
        yield Card("kept", share, f"of the variance in {kept['dim']} directions", best=True)


def _some(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], f"and {more} more"] if more > 0 else lines
