"""HTML reports that need no other file, from Jinja2 templates.

`page.html` is the skeleton of every report; `parts.html` holds the macros that they share. The
template of a report lies beside its code. Whatever is filled in is escaped.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .figures import PALETTE, svg
from .text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
_SURROGATE = re.compile("[\ud800-\udfff]")
_PAPER = ("Li et al. 2022, arXiv:2103.11154", "https://arxiv.org/abs/2103.11154")


class Card(NamedTuple):
    """A number at the head of a report, with a line above and one below."""

    above: str
    value: str
    below: str
    best: bool = False  # stands out


class Table(NamedTuple):
    """A table: the first cell of each row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[Any]]
    best: int | None = None  # the row that stands out


def write(path: Path, template: Path, **content: Any) -> Path:
    """Write a report.

    Parameters
    ----------
    path : Path
        An earlier file is replaced.
    template : Path
        It may extend "page.html" and import "parts.html".
    **content
        What the template asks for; every template for ``verdict`` (a sentence), ``cards``,
        ``files`` (beside the report, to link to) and ``versions``.

    Returns
    -------
    Path
        The same path.
    """
    content = {"command": command(), "palette": PALETTE, "paper": _PAPER, **content}
    text = _environment(template.parent).get_template(template.name).render(content)
    # File names may hold bytes that are not UTF-8, which come as surrogates.
    path.write_text(_SURROGATE.sub(lambda c: printable(c[0]), text), encoding="utf-8")
    return path


def fragment(macro: str, *arguments: Any) -> str:
    """Return what a macro of `parts.html` makes, for a notebook."""
    template: Any = _environment(_HERE).get_template("parts.html").module
    return str(getattr(template, macro)(*arguments))


def percent(share: float, spread: float | None = None) -> str:
    """Format a share with two decimals, with its spread where there is one."""
    return f"{100 * share:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}") + " %"


def command() -> str:
    """Return the command line of this process, as one would type it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    started = [Path(sys.argv[0]).name] if spec is None else ["python", "-m", spec.parent]
    return shlex.join([*started, *map(printable, sys.argv[1:])])


def versions(package: str, **more: Any) -> dict[str, Any]:
    """Return the versions that a result depends on, and the machine.

    Parameters
    ----------
    package : str
        Version of this package.
    **more
        Further rows.
    """
    return {
        "dldr_ext": package,
        **more,
        "torch": torch.__version__,  # which build, too: its metadata may not say
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


@lru_cache(maxsize=4)
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = svg
    return environment
