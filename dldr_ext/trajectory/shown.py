"""What a trajectory shows of itself: from its Gram matrix alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pca import metrics
from ..pca.spectrum import stored_spectrum
from ..reporting import views
from ..reporting.figures import Drawing
from ..reporting.notebook import View
from ..tensors.parameters import dtype_name
from .stores import Store

if TYPE_CHECKING:
    from .trajectory import Trajectory


def view_of(trajectory: Trajectory, store: Store | None, at_once: bool) -> View:
    """Return the path, the spectrum and the distances of a trajectory.

    Parameters
    ----------
    trajectory : Trajectory
    store : Store or None
        Its snapshots; None where they are consumed.
    at_once : bool
        Only if the Gram matrix is there: no rank asks the others for it, nothing is read.
    """
    length = 0 if store is None else store.length
    facts = {
        "snapshots": "consumed" if store is None else f"{length} of {trajectory.capacity}",
        "parameters": f"{trajectory.numel:,}",
        "stored as": f"{dtype_name(trajectory.dtype)}, {trajectory.storage}",
        "device": str(trajectory.device),
    }
    waits = trajectory.storage != "device" or (store is not None and store.spans_ranks)
    if store is None or length < 2 or (at_once and waits):
        return View(facts, [], f"at least two snapshots, the trajectory holds {length}")
    drawings = _drawings(store.gram().cpu(), trajectory.dtype, facts)
    return View(facts, drawings, "snapshots that differ")


def _drawings(gram: Tensor, dtype: torch.dtype, facts: dict[str, Any]) -> list[Drawing]:
    spectrum = stored_spectrum(gram, dtype)
    if spectrum.rank == 0:
        return []
    ratio = spectrum.explained(spectrum.rank)
    dimension = metrics.effective_dimension(ratio)
    facts |= {f"directions for {100 * share:g} %": dimension[f"{share:g}"] for share in (0.9, 0.99)}
    labels = [
        f"direction {k}, {100 * share:.1f} % of the variance"
        for k, share in enumerate(spectrum.explained(2).tolist(), 1)
    ]
    names = [str(t) for t in range(len(gram))]
    track = views.Track("trajectory", metrics.coordinates(spectrum).tolist(), views.RUNS[0], names)
    return [
        views.plane([track], (labels[0], labels[-1])),
        views.spectrum({"trajectory": ratio.tolist()}),
        views.distances({"trajectory": metrics.drift(gram)}, "snapshot"),
    ]
