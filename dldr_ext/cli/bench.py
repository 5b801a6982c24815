"""`dldr bench`: a roofline table of this machine."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .. import build_info
from ..performance.roofline import DTYPES, fitting, roofline
from ..performance.timing import Spread
from .options import Threads, count, usable_device

# Parameters below which the rows may stay in a cache (8-bit rows of 40: 80 MB).
_CACHED = 2_000_000


def bench(
    numel: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="N",
            help="Parameters.",
            show_default="half of the free memory, 4M at most",
        ),
    ] = None,
    dim: Annotated[int, typer.Option(min=2, max=1024, help="Rows: directions, snapshots.")] = 40,
    rounds: Annotated[int, typer.Option(min=2, help="Times that each case is timed.")] = 5,
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
    place = usable_device(device)
    numel = fitting(dim, place) if numel is None else numel
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    total = 2 + 6 * len(DTYPES) - 1  # no gram64 of 8-bit rows
    try:
        console = Console(stderr=True)
        with console.status("preparing buffers") as status:
            for row in roofline(numel, dim, place, rounds):
                rows.append(row)
                status.update(f"{len(rows)} of {total}: {row['case']}")
        about = _about(place, numel, dim, rounds)
    finally:
        torch.set_num_threads(before)
    if as_json:
        typer.echo(json.dumps(about | {"results": rows}, indent=1))
    else:
        _print(about, rows)


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
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("case", no_wrap=True)
    for heading in ("GB/s", "% of a read", "against torch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["case"], Spread(**row["gb_per_second"]).show(digits=1)]
        if "of_ceiling" in row:
            share = {key: 100 * value for key, value in row["of_ceiling"].items()}
            cells.append(Spread(**share).show(digits=0))
        if "against_torch" in row:
            cells.append(Spread(**row["against_torch"]).show("x", digits=1))
        table.add_row(*cells)
    console.print(
        f"{about['device']}, {about['threads']} threads, "
        f"{about['build']['cpu_capability']}: {about['numel']:,} parameters in 62 tensors, "
        f"{about['dim']} rows\n",
        highlight=False,
    )
    console.print(table)
    console.print(
        "\nMedians [quartiles] over rounds in which the op, a read of the float32 rows and plain "
        "torch\nin float32 were timed back to back. GB/s count the bytes that must move, however "
        f"many did.\ngram and form_basis are bound by arithmetic; gram64 is what a basis is made "
        f"from.\nIn torch: {_peers(rows)}.",
        style="dim",
        highlight=False,
        markup=False,
    )
    if about["numel"] < _CACHED:
        console.print(
            "So few parameters partly stay in a cache: these are not the memory's figures.",
            style="yellow",
            highlight=False,
        )


def _peers(rows: list[dict[str, Any]]) -> str:
    """Name what each op was compared with."""
    peers = {row["case"].split()[0]: row["peer"] for row in rows if "peer" in row}
    return "; ".join(f"{op} {peer}" for op, peer in peers.items())
