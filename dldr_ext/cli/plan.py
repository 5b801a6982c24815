"""`dldr plan`: memory, bytes, time and communication of a run, worked out beforehand."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..ops.library import cuda_loaded
from ..plan.calibration import with_shares
from ..plan.costs import Job, Plan, plan
from ..plan.devices import TABLE, Device, measure
from ..plan.remedies import changes, remedies
from .options import STORED, count, device_of, dtype_of, number, one_line_errors
from .terminal import console, fits

# A message that would take less takes as long as any short one: some microseconds.
_LATENCY = 1e-6


class Storage(str, Enum):
    """Where snapshots are kept."""

    device = "device"
    host = "host"
    disk = "disk"


class Shard(str, Enum):
    """What is partitioned over the ranks."""

    none = "none"
    basis = "basis"
    all = "all"


def plan_command(
    params: Annotated[
        int, typer.Option(parser=count, metavar="N", help="Trainable parameters, as 7B or 7e9.")
    ],
    dim: Annotated[int, number("Directions.")] = 40,
    snapshots: Annotated[int, number("Snapshots that the directions come from.")] = 81,
    dtype: Annotated[
        str,
        dtype_of(
            "--dtype", "Of snapshots and basis: fp32, bf16, fp16, fp64, int8 or fp8.", *STORED
        ),
    ] = "bf16",
    param_dtype: Annotated[
        str, dtype_of("--param-dtype", "Of weights and gradients.", *STORED[:4])
    ] = "fp32",
    device: Annotated[
        str,
        typer.Option(help="Of a data sheet, as h200 or a100; cpu, cuda or this: measured here."),
    ] = "this",
    storage: Annotated[Storage, typer.Option(help="Where the snapshots are.")] = Storage.device,
    ranks: Annotated[int, number("Devices.")] = 1,
    shard: Annotated[
        Shard | None,
        typer.Option(
            help="What ranks share out: nothing, the basis, or the model too.",
            show_default="all with several ranks",
        ),
    ] = None,
    block: Annotated[int, number("Snapshots to each pass over earlier ones, off the device.")] = 8,
    steps: Annotated[int, number("P-BFGS steps of the run.")] = 100,
    trials: Annotated[float, typer.Option(help="Trials of a line search, on average.")] = 1.0,
    closure_seconds: Annotated[
        float, typer.Option(help="One forward and backward pass of the model, in seconds.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Work out what a run takes: memory, bytes, time and communication.

    Formulas alone for a device by name; a device of this machine is measured first, which takes
    about 20 seconds and up to half of its free memory.

    \b
    Examples:
      dldr plan --params 7e9 --dim 40 --snapshots 80 --device h200 --ranks 8
      dldr plan --params 11.2e6 --device cpu --storage disk
      dldr plan --params 1e9 --dtype int8 --device h100 --json
    """
    if shard is None:
        shard = Shard.all if ranks > 1 else Shard.none
    try:
        job = Job(
            params,
            dim,
            snapshots,
            dtype,
            param_dtype,
            storage.value,
            ranks,
            shard.value,
            block,
            steps,
            trials,
            closure_seconds,
        )
    except ValueError as error:
        option, _, reason = str(error).partition(": ")
        raise typer.BadParameter(reason, param_hint=f"--{option.replace('_', '-')}") from None
    with one_line_errors():
        planned = plan(job, _device(device, job))
    if as_json:
        facts = asdict(planned) | {"fits": _fits(planned), "remedies": _remedies(planned)}
        typer.echo(json.dumps(facts, indent=1))
    else:
        _print(planned)


def _device(name: str, job: Job) -> Device:
    if name.lower() in TABLE:
        return TABLE[name.lower()]
    if name == "this":
        name = "cuda" if cuda_loaded() and torch.cuda.is_available() else "cpu"
    elif not name.startswith(("cpu", "cuda")):
        raise typer.BadParameter(
            f"expected one of {', '.join(TABLE)}, cpu, cuda, this; got {name}",
            param_hint="--device",
        )
    where = device_of(name)
    return with_shares(measure(where), job, where)


def _fits(planned: Plan) -> bool:
    return planned.peak <= planned.device.memory


def _print(planned: Plan) -> None:
    job, device = planned.job, planned.device
    screen = console()
    screen.print(
        f"{job.numel:,} parameters in {job.param_dtype}, d = {job.dim}, T = {job.snapshots} in "
        f"{job.dtype}"
    )
    if job.ranks > 1:
        screen.print(f"{job.ranks} ranks: {_shared(job)}")
    screen.print(
        f"{device.name}: reads {_bytes(device.read)}/s, float64 {device.float64 / 1e12:.3g} TFLOP/s"
    )
    nominal = "" if device.measured else "; nominal, no device reaches it"
    screen.print(f"({device.source}{nominal})\n", style="dim")
    screen.print(_memory_table(planned))
    room = _bytes(device.memory) + (" that are free" if device.measured else "")
    if _fits(planned):
        screen.print(f"Fits the device: {_bytes(planned.peak)} of {room}.\n", style="green")
    else:
        screen.print(
            f"Does not fit the device: {_bytes(planned.peak)} of {room}.", style="bold red"
        )
        for remedy in _remedies(planned):
            options = " ".join(f"--{name} {value}" for name, value in remedy["changes"].items())
            beside = [f"{_bytes(remedy[k])} on the {k}" for k in ("host", "disk") if remedy[k]]
            screen.print("; ".join([f"Fits with {options}: {_bytes(remedy['peak'])}", *beside]))
        screen.print()
    screen.print(_step_table(planned))
    screen.print()
    if planned.messages:
        screen.print(_message_table(planned, screen))
        screen.print()
    run = ", ".join(f"{k} {_seconds(v)}" for k, v in planned.run.items() if k != "all")
    screen.print(
        f"A run of {job.steps} steps, {job.trials:g} trials each: "
        f"{_seconds(planned.run['all'])}\n({run})",
    )
    screen.print(_notes(planned), style="dim")


def _remedies(planned: Plan) -> list[dict[str, Any]]:
    """Return what to change in a run that does not fit, and what it takes then."""
    return [
        {
            "changes": changes(one.job, planned.job),
            "peak": one.peak,
            "host": max(memory.host for memory in one.memory),
            "disk": max(memory.disk for memory in one.memory),
        }
        for one in remedies(planned.job, planned.device)
    ]


def _shared(job: Job) -> str:
    return {
        "none": "each holds all",
        "basis": "basis and snapshots shared out",
        "all": "model, basis and snapshots shared out",
    }[job.shard]


def _memory_table(planned: Plan) -> Table:
    table = _table("memory, peak of a rank", "device", "host", "disk")
    for memory in planned.memory:
        cells = [_bytes(size) for size in (memory.device, memory.host, memory.disk)]
        table.add_row(memory.phase, *cells)
    return table


def _step_table(planned: Plan) -> Table:
    expected = any(step.expected is not None for step in planned.steps)
    table = _table("step of a rank", "moves", "floor", *["expected"] * expected, "in a run")
    for step in planned.steps:
        cells = [_bytes(step.bytes), _seconds(step.floor)]
        if expected:
            cells.append(_seconds(step.seconds))
        calls = f"{step.calls:g} x" if step.calls else ""
        table.add_row(step.name, *cells, calls)
    return table


def _message_table(planned: Plan, screen: Console) -> Table:
    table = _messages(planned, whole=True)
    return table if fits(screen, table) else _messages(planned, whole=False)


def _messages(planned: Plan, whole: bool) -> Table:
    headings = ["numbers"] * whole + ["sends", "least time", "on top of"]
    table = _table("communication of a rank", *headings)
    table.columns[0].min_width = 13  # the longest word
    table.columns[-1].no_wrap = whole
    for message in planned.messages:
        took = "-" if message.seconds is None else _seconds(message.seconds)
        if message.seconds is not None and message.seconds < _LATENCY:
            took = "latency"
        numbers = f"{message.numbers:,g}" if message.numbers < 1e6 else f"{message.numbers:.3g}"
        cells = [numbers] * whole + [_bytes(message.bytes), took, message.on_top_of]
        table.add_row(message.name, *cells)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _notes(planned: Plan) -> str:
    notes = [
        "Beside the model's activations and its optimizer while recording; d x d algebra not "
        "counted."
    ]
    if planned.job.closure_seconds == 0:
        notes.append("The model's own passes are not counted: --closure-seconds adds them.")
    if any(step.expected is not None for step in planned.steps):
        notes.append(
            "Expected: at the share of its floor that each step of a smaller run reached just now."
        )
    if planned.job.storage == "disk":
        notes.append(f"Disk: {_bytes(planned.device.disk)}/s (nominal).")
    return "\n".join(notes)


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B" if size else "-"


def _seconds(value: float) -> str:
    for unit, name in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{1e9 * value:.2g} ns" if value else "0 s"
