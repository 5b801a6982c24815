"""What a result was measured on."""

from __future__ import annotations

import torch

from ..measure import commit, output


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
        "commit": commit(),
    }
    if build:
        from dldr_ext import build_info

        found["build"] = build_info()
    return found
