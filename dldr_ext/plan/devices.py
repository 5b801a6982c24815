"""The speeds of devices: nominal figures of data sheets, or what is measured here."""

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
    """The memory and the speeds of a device, in bytes and operations a second.

    Parameters
    ----------
    name : str
    memory : float
        Bytes that it holds; of a measured one, that are free.
    read : float
        Bytes a second of reading its memory.
    copy : float
        Bytes a second of copying in its memory, read and written ones.
    float32, float64 : float
        Operations a second; a multiply-add counts as two.
    link : float or None
        Bytes a second to the host's memory, one way; None if it is the host.
    interconnect : float or None
        Bytes a second to other devices, one way; None if there is none.
    disk : float
        Bytes a second of sequential reads.
    source : str
        Where the figures are from.
    measured : bool
        Whether on this machine; else they are nominal.
    shares : mapping of str to float
        The share of its floor that each step of a plan reaches, by name, where that was measured.

    See Also
    --------
    measure : makes one of a device of this machine.
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


#: Devices of data sheets, by short name. Data sheets give NVLink and PCIe as the sum of both ways:
#: half of it here. They give no speed of copies: as fast as reads here. No GPU reaches the nominal
#: speed.
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
    """Measure a device of this machine, in a few seconds; its disk is taken as nominal.

    Parameters
    ----------
    device : torch.device or str
        "cpu", "cuda" or "cuda:N".

    Returns
    -------
    Device
        Without ``shares``. Its memory is what is free just now.

    See Also
    --------
    plan : works out what a run takes on it.

    Examples
    --------
    >>> plan(Job(11_200_000), measure("cpu"))  # doctest: +SKIP
    """
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
