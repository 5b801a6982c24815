"""Objects that draw themselves: `plot()`, and a table with figures in notebooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from . import html
from .figures import PALETTE, Drawing, drawn, require_matplotlib, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class View(NamedTuple):
    """What an object shows of itself."""

    facts: dict[str, Any]
    drawings: list[Drawing]
    missing: str = ""  # what was expected to draw, where there is no drawing


class Shown(ABC):
    """What has figures of its own."""

    @abstractmethod
    def _view(self, at_once: bool) -> View:
        """Return facts and figures; ``at_once``: those alone that take no pass over large data."""

    def plot(self) -> Figure:
        """Draw what there is to see, side by side. Needs matplotlib, which the extra demo brings.

        Of a trajectory: its path in the plane of the first two directions, its spectrum, and the
        distances; all from the Gram matrix. Of a subspace: its spectrum as far as it is known, and
        which layers the directions move, from one pass over up to 24 of them.

        Returns
        -------
        matplotlib.figure.Figure
            ``figure.savefig("plot.png")`` writes it; a notebook shows it.

        Raises
        ------
        ModuleNotFoundError
            No matplotlib: with the command that installs it.
        ValueError
            There is nothing to draw: fewer than two snapshots; directions of which neither the
            spectrum nor the layers are known.
        """
        require_matplotlib("plot()")
        view = self._view(False)
        if not view.drawings:
            raise ValueError(f"plot: expected {view.missing}")
        return drawn(view.drawings)

    def _repr_html_(self) -> str:
        """Return a table for notebooks, with figures where matplotlib is there."""
        view = self._view(True)
        images = []
        if find_spec("matplotlib") is not None:
            # Of one object shown twice, and of several in a notebook, no two ids are the same.
            images = [svg(drawing, f"dldr{next(_NUMBERS)}-") for drawing in view.drawings]
        return html.fragment("notebook", type(self).__name__, view.facts, images, PALETTE)


_NUMBERS = iter(range(1 << 62))
