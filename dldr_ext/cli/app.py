"""The commands of `dldr`. Needs typer and rich."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .analyze import analyze
from .bench import bench
from .demo import demo
from .info import show
from .plan import plan_command
from .soup import soup

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train neural networks in tiny subspaces.",
    epilog=(
        "Exit codes: 0 done, 1 failed, 2 bad options or something that is not installed, "
        "130 interrupted. Every command has examples in its --help."
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dldr_ext {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this installation is and can run, what is missing and how to get it.

    \b
    Examples:
      dldr info
      dldr info --json | jq .cpu_capability
    """
    show(as_json)


app.command()(info)
app.command("plan")(plan_command)
app.command()(bench)
app.command()(analyze)
app.command()(soup)
app.command()(demo)
