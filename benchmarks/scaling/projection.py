"""What `dldr plan` says of large models on many GPUs: ``python -m benchmarks.scaling.projection``

Nothing is measured here: formulas and data sheets. Writes benchmarks/results/projection.json and
prints the table of docs/scaling.md, which a test compares.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from dldr_ext.plan.costs import Job, Plan, plan
from dldr_ext.plan.devices import TABLE, Device

from .. import RESULTS

RESULT = RESULTS / "projection.json"
NUMELS, RANKS = (7 * 10**9, 13 * 10**9, 70 * 10**9), (1, 8, 64, 1024)
IN_A_NODE = 8
# Bytes a second from a node of 8 GPUs to the next: one network adapter of 400 Gb/s for each GPU, as
# in NVIDIA's DGX H200. Rings that share a sum out use all of them at once.
NETWORK = 8 * 50e9
BYTES = {1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "KB", 1.0: "B"}
SECONDS = {3600.0: "h", 60.0: "min", 1.0: "s", 1e-3: "ms", 1e-6: "us"}


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


def shown(value: float, units: dict[float, str]) -> str:
    """In the largest unit that is not larger than the value."""
    unit = next((unit for unit in units if value >= unit), None)
    return "-" if unit is None else f"{value / unit:.3g} {units[unit]}"


def table(found: list[dict[str, Any]]) -> list[str]:
    """In Markdown."""
    lines = [
        "| n | ranks | forming the basis, and on the host | P-BFGS | fits 141 GB | P-BFGS step, "
        "least time | it sends beside FSDP | a gradient by DDP, least time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        ddp = "-"
        if one["ddp_sends"]:
            ddp = f"{shown(one['ddp_sends'], BYTES)}, {shown(one['ddp_floor_seconds'], SECONDS)}"
        cells = [
            f"{one['numel'] / 1e9:g}e9",
            f"{one['ranks']:,}",
            f"{shown(one['forming_device'], BYTES)}, {shown(one['forming_host'], BYTES)}",
            shown(one["steps_device"], BYTES),
            "yes" if one["fits"] else "no",
            shown(one["step_floor_seconds"], SECONDS),
            shown(one["step_sends"], BYTES),
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
    RESULT.write_text(json.dumps(about, indent=1) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
