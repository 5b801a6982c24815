"""What a result was measured on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def output(*command: str) -> str | None:
    """First line that a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def machine(device: torch.device, build: bool = True) -> dict:
    """Device, driver, releases and commit; the package's build if it is there already."""
    found: dict = {"device": "CPU (the code was tried out, nothing was measured)"}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found = {
            "device": about.name,
            "memory": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    found |= {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        # a copy of the sources without its repository cannot be asked
        "commit": os.environ.get("DLDR_COMMIT") or output("git", "describe", "--always", "--dirty"),
    }
    if build:
        from dldr_ext import build_info

        found["build"] = build_info()
    return found
