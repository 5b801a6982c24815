"""`dldr bench`: a roofline table of this machine."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from .. import build_info
from ..performance.roofline import DTYPES, fitting, roofline
from ..performance.timing import Spread
from .options import INTERRUPTED, Threads, count, device_of, number
from .terminal import console, fits, say

# Parameters below which the rows may stay in a cache (8-bit rows of 40: 80 MB).
_CACHED = 2_000_000


def bench(
    numel: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="N",
            help="Parameters, as 4M.",
            show_default="half of the free memory, 4M at most",
        ),
    ] = None,
    dim: Annotated[int, number("Rows: directions, snapshots.", 2, 1024)] = 40,
    rounds: Annotated[int, number("Times that each case is timed.", 2)] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the ops against this machine's memory and plain torch, in one to two minutes.

    \b
    Examples:
      dldr bench
      dldr bench --numel 1e6 --rounds 2
      dldr bench --device cuda --json > roofline.json
    """
    place = device_of(device)
    numel = fitting(dim, place) if numel is None else numel
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    total = 2 + 6 * len(DTYPES) - 1  # no gram64 of 8-bit rows
    interrupted = False
    try:
        with console(stderr=True).status("preparing buffers", spinner="line") as status:
            for row in roofline(numel, dim, place, rounds):
                rows.append(row)
                status.update(f"{len(rows)} of {total}: {row['case']}")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        about = _about(place, numel, dim, rounds)
        torch.set_num_threads(before)
    if interrupted:
        say(f"dldr: interrupted; {len(rows)} of {total} cases were measured", err=True)
    if not rows:
        raise typer.Exit(INTERRUPTED)
    if as_json:
        typer.echo(json.dumps(about | {"results": rows}, indent=1))
    else:
        _print(about, rows)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _about(place: torch.device, numel: int, dim: int, rounds: int) -> dict[str, Any]:
    cuda = place.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(place) if cuda else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "numel": numel,
        "dim": dim,
        "rounds": rounds,
        "build": build_info(),
    }


def _print(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    screen = console()
    table = _table(rows, quartiles=True)
    whole = fits(screen, table)
    screen.print(
        f"{about['device']}, {about['threads']} threads, "
        f"{about['build']['cpu_capability']}: {about['numel']:,} parameters in 62 tensors, "
        f"{about['dim']} rows\n"
    )
    screen.print(table if whole else _table(rows, quartiles=False))
    screen.print(
        f"\nMedians{' [quartiles]' if whole else ' (quartiles: --json, or a wider terminal)'} over "
        "rounds in which the op, a read of the float32 rows and plain torch in float32 were timed "
        "back to back. GB/s count the bytes that must move, however many did. gram and form_basis "
        "are bound by arithmetic; gram64 is what a basis is made from. "
        f"In torch: {_peers(rows)}.",
        style="dim",
    )
    if about["numel"] < _CACHED:
        screen.print(
            "So few parameters partly stay in a cache: these are not the memory's figures.",
            style="yellow",
        )


def _table(rows: list[dict[str, Any]], quartiles: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("case", no_wrap=quartiles, overflow="fold")
    for heading in ("GB/s", "% of a read", "against torch"):
        table.add_column(heading, justify="right", no_wrap=quartiles)

    def cell(spread: dict[str, float], unit: str, digits: int, factor: float = 1.0) -> str:
        shown = Spread(**{key: factor * value for key, value in spread.items()})
        return shown.show(unit, digits) if quartiles else f"{shown.median:.{digits}f}{unit}"

    for row in rows:
        cells = [row["case"], cell(row["gb_per_second"], "", 1)]
        if "of_ceiling" in row:
            cells.append(cell(row["of_ceiling"], "", 0, 100))
        if "against_torch" in row:
            cells.append(cell(row["against_torch"], "x", 1))
        table.add_row(*cells)
    return table


def _peers(rows: list[dict[str, Any]]) -> str:
    """Name what each op was compared with."""
    peers = {row["case"].split()[0]: row["peer"] for row in rows if "peer" in row}
    return "; ".join(f"{op} {peer}" for op, peer in peers.items())
