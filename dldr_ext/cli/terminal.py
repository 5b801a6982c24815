"""What is said in a terminal, whatever it can show and whatever the names are."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from ..reporting.text import printable


def any_encoding() -> None:
    """Let no character end the command that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def console(stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that shows text as it is: brackets in a path are no markup."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


def say(text: object, err: bool = False) -> None:
    """Print one line."""
    # Not click's echo, which writes UTF-8 to a terminal that is not.
    print(printable(text), file=sys.stderr if err else sys.stdout)


def fits(screen: Console, table: Table) -> bool:
    """Return whether a table can be shown in the width of the terminal, no cell folded."""
    anywhere = screen.options.update(width=1000)
    return screen.measure(table, options=anywhere).maximum <= screen.width
