"""The `dldr` command.

This module needs nothing beyond the package's own dependencies, so that `dldr` can say what is
missing; the commands are in `_commands`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

#: Where each optional module comes from.
_INSTALL = 'pip install "dldr_ext[demo]"'


def missing(*modules: str) -> str | None:
    """One line that says what to install, or None if all `modules` can be imported."""
    absent = [name for name in modules if find_spec(name) is None]
    if not absent:
        return None
    return f"dldr: not installed: {', '.join(absent)}. To get what is missing: {_INSTALL}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    problem = missing("typer", "rich")
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    from ._commands import app

    app(args=arguments, prog_name="dldr")
