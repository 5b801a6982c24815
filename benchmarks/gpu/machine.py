"""What a result was measured on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

import dldr_ext

ROOT = Path(__file__).resolve().parents[2]


def output(*command: str) -> str | None:
    """First line that a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def machine(device: torch.device) -> dict:
    """Device, driver, releases and commit."""
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
    return found | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": output("git", "describe", "--always", "--dirty"),
        "build": dldr_ext.build_info(),
    }
