"""What devices can do: nominal figures of data sheets, or what is measured here."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

import torch

from ..performance.timing import bandwidth, multiply_rate, seconds
from ..tensors.memory import free_memory

# Of the buffer whose read and copy are timed, large beside any cache.
_BUFFER = 1 << 30
# A PCIe 4.0 x4 solid-state drive: sequential reads of 7,450 MB/s (data sheet, Samsung 990 PRO).
_DISK = 7.45e9


@dataclass(frozen=True)
class Device:
    """Speeds of a device, in bytes and operations a second.

    Attributes
    ----------
    name : str
    memory : bytes that it holds (of a measured one: that are free)
    read, copy : of its memory; a copy counts bytes read and written
    float32, float64 : operations, a multiply-add counts as two
    link : to the host's memory, one way; None if it is the host
    interconnect : to other devices, one way; None if there is none
    disk : sequential reads
    source : where the figures are from
    measured : on this machine (else nominal)
    shares : of its floor that each step of a plan reaches, by name, where measured
    """

    name: str
    memory: float
    read: float
    copy: float
    float32: float
    float64: float
    link: float | None
    interconnect: float | None
    disk: float
    source: str
    measured: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)


# Data sheets give NVLink and PCIe as the sum of both ways: half of it here. No GPU reads at its
# nominal speed, and no copy is given: it counts as fast as a read.
TABLE = {
    # NVIDIA H200 Tensor Core GPU, data sheet (SXM): 141 GB HBM3e, 4.8 TB/s; FP32 67, FP64 34
    # TFLOPS; NVLink 900 GB/s, PCIe Gen5 128 GB/s.
    "h200": Device(
        "NVIDIA H200 SXM", 141e9, 4.8e12, 4.8e12, 67e12, 34e12, 64e9, 450e9, _DISK,
        "NVIDIA H200 Tensor Core GPU data sheet",
    ),
    # NVIDIA H100 Tensor Core GPU, data sheet (SXM): 80 GB, 3.35 TB/s; FP32 67, FP64 34 TFLOPS;
    # NVLink 900 GB/s, PCIe Gen5 128 GB/s.
    "h100": Device(
        "NVIDIA H100 SXM", 80e9, 3.35e12, 3.35e12, 67e12, 34e12, 64e9, 450e9, _DISK,
        "NVIDIA H100 Tensor Core GPU data sheet",
    ),
    # NVIDIA A100 Tensor Core GPU, data sheet (80 GB SXM): 2,039 GB/s; FP32 19.5, FP64 9.7 TFLOPS;
    # NVLink 600 GB/s, PCIe Gen4 64 GB/s.
    "a100": Device(
        "NVIDIA A100 80GB SXM", 80e9, 2.039e12, 2.039e12, 19.5e12, 9.7e12, 32e9, 300e9, _DISK,
        "NVIDIA A100 Tensor Core GPU data sheet",
    ),
}  # fmt: skip


def measure(device: torch.device | str = "cpu") -> Device:
    """Measures a device of this machine, in a few seconds; its disk is taken as nominal."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    free = free_memory(device)
    data = torch.ones(min(_BUFFER, free // 4) // 8, dtype=torch.int64, device=device)
    read, copy = (median(speeds) for speeds in bandwidth(data))
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU"
    threads = "" if cuda else f", {torch.get_num_threads()} threads"
    link = None
    if cuda:
        host = data.cpu().pin_memory()
        link = 8 * len(data) / median(seconds(lambda: data.copy_(host)) for _ in range(5))
    float32, float64 = (multiply_rate(kind, device) for kind in (torch.float32, torch.float64))
    return Device(
        f"{name} ({device}{threads})", free, read, copy, float32, float64, link, None, _DISK,
        "measured just now", measured=True,
    )  # fmt: skip
