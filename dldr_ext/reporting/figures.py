"""The style that all figures share, and how they become files and parts of a page.

Drawing needs matplotlib. A figure is drawn in the light colours; inside a page each colour is a CSS
variable of its name, which the page sets for light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: By name, in light and in dark. Each is told from the paper at 4.5:1 (line: a rule, apart).
PALETTE = {
    "paper": ("#ffffff", "#171c23"),
    "ink": ("#1d2430", "#e6eaf0"),
    "soft": ("#515c6b", "#a9b4c2"),
    "line": ("#dde2e9", "#39424e"),
    "blue": ("#0a69a8", "#5cb6ee"),
    "orange": ("#a15c00", "#efaa3f"),
    "green": ("#00755a", "#3cc79f"),
    "purple": ("#7d4bb8", "#c3a1f2"),
    "red": ("#b8380f", "#ff9066"),
    "grey": ("#68717f", "#97a1af"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
#: Of images, which cannot change their colours: told from light and from dark.
MIDDLE = {"blue": "#2f86cc", "red": "#d9622b"}
COLOURS = {
    "sgd": LIGHT["ink"],
    "sgd_half": LIGHT["grey"],
    "psgd": LIGHT["orange"],
    "pbfgs": LIGHT["blue"],
    "one_pass": LIGHT["purple"],
    "random": LIGHT["green"],
}
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": LIGHT["soft"],
    "axes.grid": True,
    "axes.labelcolor": LIGHT["soft"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": LIGHT["line"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
}
_WIDTH = 5.4  # inches
_SVG: Any = {"svg.fonttype": "none", "svg.image_inline": True, "path.simplify_threshold": 0.5}
_NAMES = {light: f"var(--{name})" for name, light in LIGHT.items()}


class Drawing(NamedTuple):
    """A figure of a report: what draws it, and what it says."""

    name: str  # of its file, without a suffix
    title: str
    alt: str  # the same in words, for those who cannot see it
    draw: Callable[[Any], None]  # into a figure, or a part of one; without a title
    caption: str = ""
    height: float = 3.9  # inches; the width, 5.4, is read on a phone too


def require_matplotlib(what: str) -> None:
    """Raise an error that says how to get matplotlib, if it is missing.

    Parameters
    ----------
    what : str
        What needs it.

    Raises
    ------
    ModuleNotFoundError
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            f"{what} needs matplotlib, which is not installed. To get it: pip install "
            '"dldr_ext[demo]"; in the folder of the source: pip install --no-build-isolation '
            '".[demo]"',
            name="matplotlib",
        )


def drawn(drawings: Sequence[Drawing], titled: bool = True) -> Figure:
    """Draw figures in the shared style, side by side.

    Parameters
    ----------
    drawings : sequence of Drawing
        One at least.
    titled : bool
        False: as parts of a page, which has titles and a background.

    Returns
    -------
    matplotlib.figure.Figure
    """
    import matplotlib
    from matplotlib.figure import Figure

    size = (_WIDTH * len(drawings), max(drawing.height for drawing in drawings))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        if titled:
            figure.set_facecolor(LIGHT["paper"])
        parts = figure.subfigures(1, len(drawings), squeeze=False)[0]
        for drawing, part in zip(drawings, parts, strict=True):
            drawing.draw(part)
            part.set_facecolor("none")
            if titled:
                part.suptitle(drawing.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def save_figures(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Save figures as PNG files.

    Parameters
    ----------
    drawings : sequence of Drawing
    folder : Path
        An existing folder.

    Returns
    -------
    list of Path
        The files, in the order of ``drawings``.
    """
    import matplotlib

    paths = [folder / f"{drawing.name}.png" for drawing in drawings]
    with matplotlib.rc_context(STYLE):
        for drawing, path in zip(drawings, paths, strict=True):
            drawn([drawing]).savefig(path, dpi=150)
    return paths


def svg(drawing: Drawing, prefix: str = "") -> Markup:
    """Return a figure as a part of a page: its text is text, its colours are those of the page.

    Parameters
    ----------
    drawing : Drawing
    prefix : str
        Of all ids in it: figures with names of their own, or prefixes, may stand in one page.

    Returns
    -------
    Markup
        An ``svg`` element with its title and description.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | _SVG | {"svg.hashsalt": drawing.name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn([drawing], titled=False).savefig(buffer, format="svg", metadata=nothing)
    name = prefix + drawing.name
    head, _, body = buffer.getvalue().partition("<svg")[2].partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None
    body = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"#[0-9a-f]{6}", lambda c: _NAMES.get(c[0], c[0]), body)
    body = re.sub(r"\bfont(-family)?: *[^;\"]*'[^;\"]*(; )?", _font, body)
    body = re.sub(r"-?\d+\.\d{3,}", _short, body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body.replace("xlink:href", "href"))
    body = re.sub(r"\s*\n\s*", "\n", _own_ids(body, name))
    return Markup(
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-alt" '
        f'xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{name}-title">{Markup.escape(drawing.title)}</title>'
        f'<desc id="{name}-alt">{Markup.escape(drawing.alt)}</desc>{body}'
    )


def shades(colour: str, most: float = 1.0) -> Any:
    """Return a colour map from nothing to a colour, or ``most`` of it: the paper shines through."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    ends = [(*to_rgb(colour), 0.04), (*to_rgb(colour), most)]
    return LinearSegmentedColormap.from_list(colour, ends)


def two_sided() -> Any:
    """Return a colour map from blue over nothing to red, told apart on light and dark."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    low, high = to_rgb(MIDDLE["blue"]), to_rgb(MIDDLE["red"])
    return LinearSegmentedColormap.from_list("both", [low, (*low, 0), (*high, 0), high])


def whole_numbers(axis: Axis) -> None:
    """Put the ticks of an axis on whole numbers; one tick is enough."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def percentages(axis: Axis) -> None:
    """Label the ticks of an axis of shares in percent; no tick is above 100 %."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:g} %" if share < 1 + 1e-9 else "")


def _own_ids(body: str, name: str) -> str:
    """Keep the ids that are referred to, as ids of this figure."""
    used = set(re.findall(r"(?:url\(|href=\")#([^\")]+)", body))
    new = {old: f"{name}-{i}" for i, old in enumerate(sorted(used))}
    body = re.sub(r' id="([^"]*)"', lambda c: f' id="{new[c[1]]}"' if c[1] in new else "", body)
    return re.sub(r'(url\(|href=")#([^")]+)', lambda c: f"{c[1]}#{new[c[2]]}", body)


def _short(number: re.Match[str]) -> str:
    value = float(number[0])
    text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"
    return text.rstrip("0").rstrip(".")


def _font(style: re.Match[str]) -> str:
    """Leave the size and the weight of a font: its family is that of the page."""
    text = style[0]
    size = re.search(r"[\d.]+px", text)
    weight = re.search(r"\b(bold|[67]00)\b", text)
    kept = f"font-size: {size[0]}; " if size else ""
    return kept + ("font-weight: bold; " if weight else "")
