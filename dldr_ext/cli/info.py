"""`dldr info`: this installation, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from .. import build_info
from ..ops.library import cuda_problem, device_problem
from ..tensors.memory import free_memory
from .terminal import console

# Modules of each optional extra; those of `cli` are here, or this would not run.
_EXTRAS = {
    "cli": ("typer", "rich"),
    "demo": ("matplotlib", "sklearn", "mlxtend"),
    "tensorboard": ("tensorboard",),
    "examples": ("tensorboard", "sklearn", "lightning", "transformers"),
    "bench": ("pytest", "pytest_benchmark"),
}
# Modules whose distribution has another name.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "pytest_benchmark": "pytest-benchmark"}


def facts() -> dict[str, Any]:
    """Collect `build_info` and facts on the machine, its devices and optional packages.

    Returns
    -------
    dict
        ``machine``: Python, system, processor cores and memory. ``cuda_library``: "loaded", or
        why not. ``devices``: name, memory in bytes and what is against using it, of each.
        ``packages``: releases of the required ones. ``extras``: for each its modules that are
        ``missing``, and the command that gets them (None if all are there).
    """
    return {
        **build_info(),
        "cuda_library": cuda_problem() or "loaded",
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "free_memory": free_memory(),
        },
        "devices": _devices(),
        "packages": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")},
        "extras": {name: _extra(name, modules) for name, modules in _EXTRAS.items()},
    }


def _devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "problem": device_problem(torch.device("cuda", index)),
            }
        )
    return devices


def _extra(name: str, modules: tuple[str, ...]) -> dict[str, Any]:
    missing = [_DISTRIBUTIONS.get(m, m) for m in modules if find_spec(m) is None]
    return {
        "missing": missing,
        "command": f'pip install "dldr_ext[{name}]"' if missing else None,
    }


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this installation is and can run, what is missing and how to get it.

    \b
    Examples:
      dldr info
      dldr info --json | jq .cpu_capability
    """
    collected = facts()
    if as_json:
        typer.echo(json.dumps(collected, indent=1))
        return
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in collected.items():
        table.add_row(key, _SHOW.get(key, _plain)(value))
    console().print(table)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(item)}" for key, item in value.items()) or "-"
    return "-" if value is None else str(value)


def _show_machine(machine: dict[str, Any]) -> str:
    free = f"{machine['free_memory'] / 1e9:.1f} GB"
    return _plain(machine | {"free_memory": free})


def _show_devices(devices: list[dict[str, Any]]) -> str:
    lines = []
    for d in devices:
        lines.append(f"{d['device']}: {d['name']}, {d['memory'] / 1e9:.0f} GB, {d['capability']}")
        lines += [d["problem"]] if d["problem"] else []
    return "\n".join(lines) or "no CUDA device"


def _show_extras(extras: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, extra in extras.items():
        lacks = ", ".join(extra["missing"])
        lines.append(f"{name}: without {lacks}: {extra['command']}" if lacks else f"{name}: there")
    return "\n".join(lines)


_SHOW: dict[str, Callable[[Any], str]] = {
    "machine": _show_machine,
    "devices": _show_devices,
    "extras": _show_extras,
}
