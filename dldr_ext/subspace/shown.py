"""What a subspace shows of itself: its spectrum, and where its directions lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..reporting import views
from ..reporting.figures import Drawing
from ..reporting.notebook import View

if TYPE_CHECKING:
    from .base import AffineSubspace

_MOST = 24  # directions whose layers are shown
_AT_ONCE = 1 << 24  # numbers of directions that a notebook may read


def view_of(space: AffineSubspace, at_once: bool) -> View:
    """Return the spectrum and the layers of a subspace, as far as they are known.

    Parameters
    ----------
    space : AffineSubspace
    at_once : bool
        Only what takes no long pass over the directions.
    """
    facts = {
        "directions": str(space.dim),
        "parameters": f"{space.numel:,}",
        "device": str(space.device),
    }
    if space.shapes is not None:
        facts["tensors"] = str(len(space.shapes))
    drawings = []
    if space.explained_variance_ratio is not None:
        ratio = space.explained_variance_ratio
        facts["explained"] = f"{100 * float(ratio.sum()):.2f} % of the variance"
        drawings.append(views.spectrum({"subspace": ratio.tolist()}))
    count = min(space.dim, _MOST)
    short = count * space.numel <= _AT_ONCE or not at_once
    if space.names is not None and short and not space.spans_ranks:
        drawings.append(_layers(space, count))
    return View(
        facts,
        drawings,
        "directions whose explained variance or names of parameters are known (as of "
        f"named_parameters()), got a {type(space).__name__} that has neither",
    )


def _layers(space: AffineSubspace, count: int) -> Drawing:
    """Show the norm of the part of each direction that lies in each layer."""
    assert space.names is not None and space.shapes is not None
    layers = [views.layer_of(name) for name in space.names]
    places = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
    sizes = [torch.Size(shape).numel() for shape in space.shapes]
    squares = torch.zeros(len(places), count, dtype=torch.float64, device="cpu")
    for i in range(count):
        for layer, part in zip(layers, space.direction(i).split(sizes), strict=True):
            squares[places[layer], i] += float(torch.dot(part, part))
    return views.layers(
        *views.fewer_layers(list(places), squares.sqrt().tolist()), of_directions=True
    )
