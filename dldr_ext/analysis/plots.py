"""The figures of an analysis. Drawing needs matplotlib."""

from __future__ import annotations

from typing import Any

from ..reporting import views
from ..reporting.figures import Drawing


def drawings(results: dict[str, Any]) -> list[Drawing]:
    """Return what shows an analysis, in the order of the report.

    Parameters
    ----------
    results : dict
        As `Analysis.run` returned it.

    Returns
    -------
    list of Drawing
    """
    kept = results["subspace"]
    spectrum = views.spectrum(
        {"run": results["explained_variance_ratio"]}, None if kept is None else kept["dim"]
    )
    return [
        spectrum._replace(
            caption="Principal directions of the checkpoints. A random walk, too, has most of its "
            "variance along few directions."
        ),
        views.distances({"run": results["drift"]})._replace(
            caption="Steps that shrink to nothing add no direction."
        ),
        views.cosines(results["cosines"]["steps"])._replace(
            caption="Blue beside the diagonal says that a step takes back what the one before did."
        ),
    ]
