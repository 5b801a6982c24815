"""Benchmarks on an NVIDIA GPU: `python3 -m benchmarks.gpu --json FILE --table FILE`.

Every case is timed by CUDA events, turn by turn with what a user would write in plain torch on the
same GPU, the L2 cache filled with something else before each; bandwidths are compared with the best
of torch's own plain reads and copies in the same process. `--device cpu --n 20000` tries the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from dldr_ext.performance.timing import Spread

from .cases import GROUPS, Case, Setting
from .machine import machine
from .step import steps
from .table import markdown
from .timing import Clock


def measure(case: Case, clock: Clock, ceilings: dict[str, float], rounds: int) -> dict:
    """Fraction of the ceiling and speed-ups over the peers, medians with quartiles."""
    found = {"case": case.name, "size": case.size, "ceiling": case.ceiling}
    found |= {"wanted_of_ceiling": case.fraction, "wanted_against": case.wanted}
    if case.short:
        kinds = {"eager": clock.looped} | ({"graph": clock.graphed} if clock.cuda else {})
        for kind, timed in kinds.items():
            times = [[timed(work) for work in (case.work, *case.peers.values())]
                     for _ in range(rounds)]  # fmt: skip
            found[kind] = _ratios(case, times)
        return found
    times = clock.rounds([case.work, *case.peers.values()], rounds)
    speed = [case.size / row[0] / ceilings[case.ceiling] for row in times]
    return found | _ratios(case, times) | {"of_ceiling": vars(Spread.of(speed))}


def _ratios(case: Case, times: list[list[float]]) -> dict:
    against = {
        name: vars(Spread.of([row[i] / row[0] for row in times]))
        for i, name in enumerate(case.peers, 1)
    }
    return {"seconds": vars(Spread.of([row[0] for row in times])), "against": against}


def run(options: argparse.Namespace) -> list[dict]:
    device = torch.device(options.device)
    clock = Clock(device)
    if options.ceilings and options.ceilings.is_file():
        clock.raise_ceilings(json.loads(options.ceilings.read_text()))
    ceilings = clock.ceilings | {"multiply": clock.multiply_rate()}
    setting = Setting(options.n, options.d, device, most=options.most)
    start = time.perf_counter()
    rows: list[dict] = [{"case": "ceilings", "values": ceilings, "kernels": clock.kernels}]

    def note(row: dict) -> None:
        rows.append(row)
        print(f"{time.perf_counter() - start:6.1f} s  {row['case']}", flush=True)
        options.write(rows)

    for group in GROUPS:
        if options.only and group.__name__ not in options.only:
            continue
        if time.perf_counter() - start > options.seconds:
            note({"case": group.__name__, "not_run": f"past {options.seconds} s"})
            continue
        try:
            for case in group(setting):
                note(measure(case, clock, ceilings, options.rounds))
                del case
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # The others are still worth having.
            note({"case": group.__name__, "failed": str(error).splitlines()[0]})
        if clock.cuda:
            torch.cuda.empty_cache()
    if not options.only or "step" in options.only:
        for row in steps(device, min(options.n, 11_200_000), options.d, 4 * options.rounds):
            note(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, default=100_000_000, help="parameters")
    parser.add_argument("--d", type=int, default=40, help="directions")
    parser.add_argument("--most", type=int, default=26_000_000_000, help="elements of a matrix")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=170, help="start no group after these")
    parser.add_argument("--only", nargs="+", help="groups, or step")
    parser.add_argument("--ceilings", type=Path, help="what benchmarks/gpu/sweep.cu measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args(arguments)
    about = machine(torch.device(options.device)) | {"n": options.n, "d": options.d}

    def write(rows: list[dict]) -> None:
        """After each case: what stops in the middle has left what came before."""
        if options.json:
            options.json.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")
        if options.table:
            options.table.write_text(markdown(about, rows))

    options.write = write
    torch.manual_seed(0)
    rows = run(options)
    print(markdown(about, rows))
    return any("failed" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
