"""Writes the report of an analysis: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..reporting.html import HEAD, STYLE, TAIL, figure, folded, pairs, tds

_MOST_PAIRS = 20  # near-duplicates that are listed
_PAGE = Template(
    HEAD
    + """$warnings
$figures
<h2>Directions</h2>
<div class="card scroll"><table class="plain"><tbody>
$choice
</tbody></table></div>
<details><summary>Checkpoints</summary>
<div class="card scroll"><table>
<thead><tr><th>checkpoint</th><th>number</th><th>from the first</th><th>step</th>
<th>cosine with the step before</th></tr></thead>
<tbody>
$rows
</tbody></table></div>
</details>
"""
    + folded("Settings", "$settings")
    + TAIL
)
_CAPTIONS = {
    "spectrum.png": (
        "Spectrum",
        "Principal directions of the checkpoints: the share of the variance along each, and what "
        "the first k together leave over. A random walk, too, has most of its variance along few "
        "directions.",
    ),
    "drift.png": (
        "Drift",
        "Distance of the weights from the first checkpoint, and the length of each step. Steps "
        "that shrink to nothing add no direction.",
    ),
    "cosine.png": (
        "Cosines",
        "Between the steps from one checkpoint to the next: blue beside the diagonal says that a "
        "step takes back what the one before did.",
    ),
}


def verdict(results: dict[str, Any]) -> str:
    """One sentence that says what was found."""
    dimension = results["effective_dimension"]
    return (
        f"{len(results['checkpoints'])} checkpoints of {results['numel']:,} numbers: 90, 95 and "
        f"99 % of their variance lie along {dimension['0.9']}, {dimension['0.95']} and "
        f"{dimension['0.99']} directions."
    )


def duplicates(results: dict[str, Any]) -> list[str]:
    """A line for each pair of checkpoints that are nearly the same."""
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
    """Writes report.html, with the figures in it; returns its path."""
    page = _PAGE.substitute(
        style=STYLE,
        title="The path of the checkpoints",
        lead=escape(verdict(results)),
        cards="\n".join(_cards(results)),
        warnings=_listed("Left out", results["skipped"])
        + _listed("Near-duplicates", duplicates(results))
        + _listed("Notes", results["notes"]),
        figures="\n".join(figure(image, *_CAPTIONS[image.name]) for image in images),
        rows="\n".join(f"<tr>{tds(row)}</tr>" for row in _rows(results)),
        choice=pairs(results["report"]),
        settings=pairs(
            {
                key: results[key]
                for key in ("numel", "tensors", "dtype", "bytes", "norm_of_first", "seconds")
            }
            | {"subspace": results["subspace"] or "not kept"}
        ),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _cards(results: dict[str, Any]) -> Iterable[str]:
    dimension, kept = results["effective_dimension"], results["subspace"]
    yield _card(f"{dimension['participation_ratio']:.1f}", "effective dimension", "participation")
    yield _card(str(dimension["0.99"]), "directions", "for 99 % of the variance")
    if kept is not None:
        share = f"{100 * kept['explained_variance']:.2f} %"
        yield _card(share, f"of the variance in {kept['dim']} directions", "kept", best=True)


def _card(value: str, below: str, above: str, best: bool = False) -> str:
    kind = "card best" if best else "card"
    return f'<div class="{kind}"><span>{above}</span><b>{value}</b><span>{below}</span></div>'


def _listed(heading: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>{heading}</h2>\n<div class="card"><ul>{items}</ul></div>\n'


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
