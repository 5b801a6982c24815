"""The `dldr` command.

This module needs nothing beyond the package's own dependencies, so that `dldr` can say what is
missing; the commands are in `app`.
"""

from __future__ import annotations

import sys

from .requirements import missing


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and end the process with its exit code."""
    problem = missing("typer", "rich")
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
