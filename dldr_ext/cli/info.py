"""`dldr info`: this installation, what is missing and how to get it. Needs no extra."""

from __future__ import annotations

import json
import os
import platform
import shutil
import textwrap
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from .. import build_info
from ..ops.library import cuda_problem, device_problem
from ..reporting.text import printable
from ..tensors.memory import free_memory
from .requirements import absent, install

# Modules of each optional extra.
_EXTRAS = {
    "cli": ("typer", "rich"),
    "demo": ("matplotlib", "sklearn", "mlxtend"),
    "tensorboard": ("tensorboard",),
    "examples": ("tensorboard", "sklearn", "lightning", "transformers"),
    "bench": ("pytest", "pytest_benchmark"),
}


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
        "extras": {name: _extra(modules) for name, modules in _EXTRAS.items()},
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


def _extra(modules: tuple[str, ...]) -> dict[str, Any]:
    names = absent(*modules)
    return {"missing": names, "command": install(names) if names else None}


def show(as_json: bool) -> None:
    """Print `facts` as JSON or as a table."""
    collected = facts()
    if as_json:
        print(json.dumps(collected, indent=1))
        return
    start = max(map(len, collected)) + 4
    width = max(shutil.get_terminal_size().columns - start, 20)
    for key, value in collected.items():
        text = _SHOW.get(key, _plain)(value).split("\n")
        lines = [
            part
            for line in text
            for part in textwrap.wrap(printable(line), width, break_on_hyphens=False)
        ]
        print(f"  {key}".ljust(start) + f"\n{' ' * start}".join(lines))


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
    return "\n".join(f"{name}: {extra['command'] or 'there'}" for name, extra in extras.items())


_SHOW: dict[str, Callable[[Any], str]] = {
    "machine": _show_machine,
    "devices": _show_devices,
    "extras": _show_extras,
}
