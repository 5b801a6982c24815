"""The report of an analysis: one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..reporting import html
from ..reporting.html import Card

_MOST_PAIRS = 20  # near-duplicates that are listed


def verdict(results: dict[str, Any]) -> str:
    """Say in one sentence what was found."""
    dimension = results["effective_dimension"]
    return (
        f"{len(results['checkpoints'])} checkpoints of {results['numel']:,} numbers: 90, 95 and "
        f"99 % of their variance lie along {dimension['0.9']}, {dimension['0.95']} and "
        f"{dimension['0.99']} directions."
    )


def duplicates(results: dict[str, Any]) -> list[str]:
    """Describe each pair of checkpoints that are nearly the same, in a line."""
    paths = results["checkpoints"]
    lines = [
        f"{paths[s]} and {paths[t]} are the same"
        if share == 0
        else f"{paths[s]} and {paths[t]} differ by {share:.1e} of a step"
        for s, t, share in results["near_duplicates"][:_MOST_PAIRS]
    ]
    more = len(results["near_duplicates"]) - _MOST_PAIRS
    return [*lines, f"and {more} more pairs"] if more > 0 else lines


def write(results: dict[str, Any], images: Iterable[Path], folder: Path) -> Path:
    """Write report.html.

    Parameters
    ----------
    results : dict
        As `Analysis.run` returned it.
    images : iterable of Path
        The figures to embed, as `plots.draw` returned them.
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
    return html.write(
        folder / "report.html",
        "analysis/report.html",
        verdict=verdict(results),
        cards=list(_cards(results)),
        remarks={
            "Left out": results["skipped"],
            "Near-duplicates": duplicates(results),
            "Notes": results["notes"],
        },
        images={image.name: image for image in images},
        directions=results["report"],
        checkpoints=_rows(results),
        settings=settings | {"subspace": results["subspace"] or "not kept"},
    )


def _cards(results: dict[str, Any]) -> Iterable[Card]:
    dimension, kept = results["effective_dimension"], results["subspace"]
    ratio = f"{dimension['participation_ratio']:.1f}"
    yield Card("participation", ratio, "effective dimension")
    yield Card("for 99 % of the variance", str(dimension["0.99"]), "directions")
    if kept is not None:
        share = f"{100 * kept['explained_variance']:.2f} %"
        yield Card("kept", share, f"of the variance in {kept['dim']} directions", best=True)


def _rows(results: dict[str, Any]) -> Iterable[list[str]]:
    drift, cosines = results["drift"], results["cosines"]["successive"]
    for t, path in enumerate(results["checkpoints"]):
        yield [
            path,
            str(t),
            f"{drift['from_first'][t]:.4g}",
            "-" if t == 0 else f"{drift['steps'][t - 1]:.4g}",
            "-" if t < 2 else f"{cosines[t - 2]:.3f}",
        ]
