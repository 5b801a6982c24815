"""Writes the demo's report: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..reporting.html import HEAD, STYLE, TAIL, figure, folded, pairs, percent, tds
from .methods import NAMES
from .run import Row, summary

_PAGE = Template(
    HEAD
    + """<div class="card scroll">
<table id="results">
<thead><tr><th>method</th><th>test accuracy</th><th>passes</th><th>sampling passes</th>
<th>time (s)</th><th>trained variables</th><th>variance kept</th></tr></thead>
<tbody>
$rows
</tbody>
</table>
</div>
<p><small>$footnote</small></p>
$figures
<h2>What was compared</h2>
$method
<details><summary>All runs</summary>
<div class="card scroll"><table class="plain">
<thead><tr><th>method</th><th>seed</th><th>test</th><th>validation</th><th>passes</th>
<th>seconds</th></tr></thead>
<tbody>
$runs
</tbody></table></div>
</details>
"""
    + folded("Settings", "$config")
    + folded("Versions", "$versions")
    + TAIL
)
_CAPTIONS = {
    "accuracy.png": (
        "Accuracy",
        "Accuracy on the validation digits against passes over the training images. The vertical "
        "axis is stretched towards 100 %. P-SGD and P-BFGS take their subspace from the passes of "
        "SGD up to the dotted line; these come on top and are not drawn. A point of a method in "
        "the subspace includes the pass that re-estimates the batch-norm statistics, as if the run "
        "had ended there. Thin lines: single seeds, where there are several.",
    ),
    "spectrum.png": (
        "Spectrum",
        "Principal directions of the recorded first half of SGD: the share of the variance that "
        "each explains, and what is left unexplained by the first k together.",
    ),
    "trajectory.png": (
        "Trajectory",
        "The paths of the first seed, projected on the first two directions. Contours: training "
        "loss on the plane through the end of P-BFGS, whose other coordinates are kept; the other "
        "paths run above or below that plane.",
    ),
}


def cells(row: Row, numel: int) -> list[str]:
    """A row of the result table, as text, from the second column on."""
    return [
        percent(row.test_accuracy, row.spread),
        f"{row.passes:.1f}",
        f"{row.sampling_passes:.1f}" if row.sampling_passes else "-",
        f"{row.seconds:.1f}",
        f"{numel if row.dim is None else row.dim:,}",
        "-" if row.explained_variance is None else f"{100 * row.explained_variance:.3f} %",
    ]


def footnote(results: dict[str, Any]) -> str:
    """What the columns of the table mean."""
    seeds = len(results["config"]["seeds"])
    split = results["config"]["split"]
    spread = (
        f"Mean ± standard deviation over {seeds} seeds. "
        if seeds > 1
        else "One seed: no spread; --seeds 3 gives one. "
    )
    return (
        f"{spread}Test: {split['test']} digits set aside before training, read once at the end. "
        f"Passes: training images that went through the network, for gradients, for trials of the "
        f"line search and, in the subspaces, once over all for the batch-norm statistics, divided "
        f"by {split['train']:,}. Sampling passes come on top: the recorded epochs of SGD that the "
        f"subspace was made from. Variance kept: the share of the variance of the recorded "
        f"weights that lies in the subspace."
    )


def verdict(results: dict[str, Any]) -> str:
    """One sentence that says what came out, whatever it is."""
    rows = {row.method: row for row in summary(results)}
    sgd, pbfgs, random = rows["sgd"], rows["pbfgs"], rows["random"]

    def against(other: Row) -> str:
        gap = 100 * (pbfgs.test_accuracy - other.test_accuracy)
        if abs(gap) < 0.005:
            return "the same as"
        return f"{abs(gap):.2f} points {'more' if gap > 0 else 'less'} than"

    return (
        f"P-BFGS on {pbfgs.dim} variables came to {percent(pbfgs.test_accuracy, pbfgs.spread)} in "
        f"{pbfgs.passes:.1f} passes, {against(sgd)} SGD on all "
        f"{results['runs'][0]['numel']:,} in {sgd.passes:.1f} "
        f"({percent(sgd.test_accuracy, sgd.spread)}), and {against(random)} P-BFGS in a random "
        "subspace of the same dimension."
    )


def write(results: dict[str, Any], images: Iterable[Path], folder: Path) -> Path:
    """Write report.html.

    Parameters
    ----------
    results : as in results.json
    images : PNG files to embed, in order
    folder : where to write

    Returns
    -------
    Path
        Of the report.
    """
    config = results["config"]
    numel = results["runs"][0]["numel"]
    rows = summary(results)
    page = _PAGE.substitute(
        style=STYLE,
        title="Training in a tiny subspace",
        lead=escape(verdict(results)),
        cards="\n".join(_card(row) for row in rows if row.method in ("sgd", "pbfgs", "random")),
        rows="\n".join(
            f"<tr{_best(row)}><td>{escape(NAMES[row.method])}</td>{tds(cells(row, numel))}</tr>"
            for row in rows
        ),
        footnote=escape(footnote(results)),
        figures="\n".join(figure(image, *_CAPTIONS[image.name]) for image in images),
        method=_METHOD.substitute(
            description=escape(config["description"]),
            epochs=config["epochs"],
            half=f"{config['epochs'] / 2:g}",
            snapshots=config["snapshots"],
            dim=" or ".join(map(str, sorted({run["dim"] for run in results["runs"]}))),
            shift="one pixel" if config["shift"] == 1 else f"{config['shift']} pixels",
            budget=config["passes_in_subspace"],
            batch=config["pbfgs_batch_size"],
            **{part: f"{size:,}" for part, size in config["split"].items()},
        ),
        runs="\n".join(
            "<tr>"
            + tds(
                [
                    NAMES[run["method"]],
                    str(run["seed"]),
                    percent(run["test_accuracy"]),
                    percent(run["validation_accuracy"]),
                    f"{run['data_passes']:.2f}",
                    f"{run['seconds']:.1f}",
                ]
            )
            + "</tr>"
            for run in results["runs"]
        ),
        config=pairs(config),
        versions=pairs(results["versions"]),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


_METHOD = Template("""<p>$description, cut at random but evenly over the classes into $train for
training, $validation for the curves and for choosing hyperparameters, and $test for the final
numbers. A small convolutional network with batch norm. Every method starts from the same weights
and minimises the same regularised cross-entropy; training images are moved at random by up to
$shift each way, for all methods alike.</p>
<ul>
<li><b>SGD</b>: $epochs epochs with momentum; the learning rate falls to a tenth at half of
the run and again at three quarters. <b>First half</b>: the same run
after $half epochs.</li>
<li><b>P-BFGS, P-SGD</b>: the first half of SGD is sampled $snapshots times; the $dim principal
directions of these snapshots span the subspace. Training starts anew from the initial weights,
moves only along them, and may spend $budget passes. P-BFGS takes batches of about $batch.</li>
<li><b>Random subspace</b>: the same P-BFGS with $dim random orthonormal directions instead.</li>
</ul>""")


def _best(row: Row) -> str:
    return ' class="best"' if row.method == "pbfgs" else ""


def _card(row: Row) -> str:
    kind = "card best" if row.method == "pbfgs" else "card"
    return (
        f'<div class="{kind}"><span>{escape(NAMES[row.method])}</span>'
        f"<b>{percent(row.test_accuracy, row.spread)}</b>"
        f"<span>test accuracy after {row.passes:.1f} passes</span></div>"
    )
