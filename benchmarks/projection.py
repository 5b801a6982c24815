"""What `dldr plan` says of large models on many GPUs: python benchmarks/projection.py

Nothing is measured here: formulas and data sheets. Writes benchmarks/results/projection.json and
prints the table of docs/scaling.md, which a test compares.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dldr_ext.cli.plan import _bytes, _seconds  # noqa: E402
from dldr_ext.plan.costs import Job, Plan, plan  # noqa: E402
from dldr_ext.plan.devices import TABLE, Device  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "projection.json"
NUMELS, RANKS = (7 * 10**9, 13 * 10**9, 70 * 10**9), (1, 8, 64, 1024)
IN_A_NODE = 8
# Bytes a second from a node of 8 GPUs to the next: one network adapter of 400 Gb/s for each GPU, as
# in NVIDIA's DGX H200. Rings that share a sum out use all of them at once.
NETWORK = 8 * 50e9


def device(ranks: int) -> Device:
    found = TABLE["h200"]
    return found if ranks <= IN_A_NODE else replace(found, interconnect=NETWORK)


def projected(numel: int, ranks: int) -> Plan:
    """Model, basis and snapshots shared out (FSDP2), snapshots in the host's memory."""
    shard = "all" if ranks > 1 else "none"
    return plan(Job(numel, 40, 80, storage="host", ranks=ranks, shard=shard), device(ranks))


def row(found: Plan) -> dict[str, Any]:
    memory = {m.phase: m for m in found.memory}
    sent = {m.name: m for m in found.messages}
    step = next(s for s in found.steps if s.name == "P-BFGS step")
    ours, ddp = (sent.get(name) for name in ("a P-BFGS step", "DDP: the gradient"))
    return {
        "numel": found.job.numel,
        "ranks": found.job.ranks,
        "forming_device": memory["forming the basis"].device,
        "forming_host": memory["forming the basis"].host,
        "steps_device": memory["P-BFGS"].device,
        "fits": found.peak <= found.device.memory,
        "step_floor_seconds": step.floor,
        "step_sends": 0.0 if ours is None else ours.bytes,
        "ddp_sends": 0.0 if ddp is None else ddp.bytes,
        "ddp_floor_seconds": 0.0 if ddp is None else ddp.seconds,
    }


def rows() -> list[dict[str, Any]]:
    return [row(projected(numel, ranks)) for numel in NUMELS for ranks in RANKS]


def table(found: list[dict[str, Any]]) -> list[str]:
    """In Markdown."""
    lines = [
        "| n | ranks | forming the basis, and on the host | P-BFGS | fits 141 GB | P-BFGS step, "
        "least time | it sends beside FSDP | a gradient by DDP, least time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        sends = _bytes(one["step_sends"])
        ddp = "-"
        if one["ddp_sends"]:
            ddp = f"{_bytes(one['ddp_sends'])}, {_seconds(one['ddp_floor_seconds'])}"
        cells = [
            f"{one['numel'] / 1e9:g}e9",
            f"{one['ranks']:,}",
            f"{_bytes(one['forming_device'])}, {_bytes(one['forming_host'])}",
            _bytes(one["steps_device"]),
            "yes" if one["fits"] else "no",
            _seconds(one["step_floor_seconds"]),
            sends,
            ddp,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    found = rows()
    about = {
        "device": TABLE["h200"].name,
        "bytes_a_second_between_nodes": NETWORK,
        "ranks_in_a_node": IN_A_NODE,
        "d": 40,
        "snapshots": 80,
        "rows": found,
    }
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
