"""The `dldr` command.

This module needs nothing beyond the package's own dependencies, so that `dldr` can say what is
missing; the commands are in `app`. `dldr` comes here by way of `dldr_command`.
"""

from __future__ import annotations

import sys

from .info import show
from .requirements import missing


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and end the process with its exit code."""
    problem = missing("typer", "rich")
    typed = sys.argv[1:] if arguments is None else arguments
    if problem and typed in (["info"], ["info", "--json"]):
        return show("--json" in typed)
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    from .app import app  # which imports both
    from .terminal import any_encoding

    any_encoding()
    try:
        app(args=arguments, prog_name="dldr")
    except OSError as error:  # of stdout: a full disk
        print(f"dldr: {error}", file=sys.stderr)
        sys.exit(1)
