"""HTML reports that need no other file, from Jinja2 templates.

`page.html` is the skeleton of every report; `parts.html` holds the macros that they share. The
template of a report lies beside its code. Whatever is filled in is escaped.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

_PACKAGE = Path(__file__).parents[1]
_SURROGATE = re.compile("[\ud800-\udfff]")


class Card(NamedTuple):
    """A number at the head of a report, with a line above and one below."""

    above: str
    value: str
    below: str
    best: bool = False  # stands out


def write(path: Path, template: str, **content: Any) -> Path:
    """Write a report.

    Parameters
    ----------
    path : Path
        An earlier file is replaced.
    template : str
        Its path in the package, such as "demo/report.html".
    **content
        What the template asks for; every template for ``verdict`` (a sentence) and ``cards``.

    Returns
    -------
    Path
        The same path.
    """
    text = _environment().get_template(template).render(content)
    # File names may hold bytes that are not UTF-8, which come as surrogates.
    path.write_text(_SURROGATE.sub(lambda c: printable(c[0]), text), encoding="utf-8")
    return path


def percent(share: float, spread: float | None = None) -> str:
    """Format a share with two decimals, with its spread where there is one."""
    return f"{100 * share:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}") + " %"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = _base64
    return environment


def _base64(image: Path) -> str:
    return base64.b64encode(image.read_bytes()).decode("ascii")
