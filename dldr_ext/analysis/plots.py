"""The figures of an analysis. Drawing needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reporting import views
from ..reporting.figures import Drawing
from ..reporting.text import printable

_PLANE = {
    False: "The first two principal directions of the checkpoints, their mean at zero.",
    True: "The first two principal directions of both runs together, their mean at zero.",
}
_LOSS = (
    " Contours: the loss on the plane through the end of the {run}; the other checkpoints lie "
    "above or below it."
)


def drawings(results: dict[str, Any]) -> list[Drawing]:
    """Return what shows an analysis, in the order of the report.

    Parameters
    ----------
    results : dict
        As `Analysis.run` returned it; ``loss``, ``other`` and ``comparison`` may be there.

    Returns
    -------
    list of Drawing
    """
    runs = named_runs(results)
    kept, loss = results["subspace"], results.get("loss")
    spectrum = views.spectrum(
        {name: run["explained_variance_ratio"] for name, run in runs.items()},
        None if kept is None else kept["dim"],
    )
    shown = [
        _path(results),
        spectrum._replace(
            caption="A random walk, too, has most of its variance along few directions."
        ),
        views.distances({name: run["drift"] for name, run in runs.items()})._replace(
            caption="Steps that shrink to nothing add no direction."
        ),
    ]
    if loss is not None:
        shown.append(views.losses(dict(zip(runs, loss["along"], strict=True))))
    few = [
        views.fewer_layers(run["layers"]["names"], run["layers"]["steps"]) for run in runs.values()
    ]
    span = views.span_of([norms for _, norms in few])
    for i, (name, (layers, norms)) in enumerate(zip(runs, few, strict=True)):
        shown.append(
            views.layers(
                layers, norms, ("layers", "other-layers")[i], _which(runs, name), span
            )._replace(caption="Norm of the change from one checkpoint to the next; empty: none.")
        )
    for i, (name, run) in enumerate(runs.items()):
        shown.append(
            views.cosines(
                run["cosines"]["steps"], ("cosine", "other-cosine")[i], _which(runs, name)
            )._replace(
                caption="Between the steps from one checkpoint to the next. Blue beside the "
                "diagonal says that a step takes back what the one before did."
            )
        )
    return shown


def named_runs(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results of each run under a name: what its path has and the other's has not."""
    if "other" not in results:
        return {"run": results}
    both = results, results["other"]
    names = [
        os.path.commonpath([Path(p).absolute().parent for p in r["checkpoints"]]) for r in both
    ]
    common = Path(os.path.commonpath(names))
    short = [str(Path(name).relative_to(common)) for name in names]
    short = [Path(full).name if one == "." else one for one, full in zip(short, names, strict=True)]
    if short[0] == short[1]:
        short = ["first run", "second run"]
    return dict(zip(short, both, strict=True))


def checkpoint_names(paths: Sequence[str]) -> list[str]:
    """Return what tells the checkpoints of a run apart: names of files, or of their folders."""
    names = [printable(Path(path).stem) for path in paths]
    folders = [printable(Path(path).parent.name) for path in paths]
    return names if len(set(names)) >= len(set(folders)) else folders


def _which(runs: dict[str, Any], name: str) -> str:
    return name if len(runs) > 1 else ""


def _path(results: dict[str, Any]) -> Drawing:
    runs, loss = named_runs(results), results.get("loss")
    plane = results.get("comparison", results)["path"]
    tracks, begin = [], 0
    for (name, run), colour in zip(runs.items(), views.RUNS, strict=False):
        end = begin + len(run["checkpoints"])
        names = checkpoint_names(run["checkpoints"])
        tracks.append(views.Track(name, plane["coordinates"][begin:end], colour, names))
        begin = end
    contours = None
    if loss is not None:
        grid = loss["plane"]
        values = [[float("nan") if v is None else v for v in row] for row in grid["loss"]]
        contours = views.Contours(grid["x"], grid["y"], values, "loss")
    labels = [
        f"direction {k}, {100 * share:.1f} % of the variance"
        for k, share in enumerate(plane["explained"], 1)
    ]
    labels += [""] * (2 - len(labels))
    caption = _PLANE[len(runs) > 1]
    if loss is not None:
        caption += _LOSS.format(run=f"first run, {next(iter(runs))}" if len(runs) > 1 else "run")
    drawing = views.plane(tracks, (labels[0], labels[1]), contours)
    return drawing._replace(caption=caption)
