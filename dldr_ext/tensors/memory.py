"""Memory of a device: how much is free, and matrices whose rows lie in it as kernels read them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# On CUDA rows start at multiples of this many bytes: their kernels read 16 bytes at a time.
CUDA_ALIGNMENT = 256


def free_memory(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can be allocated on a device without swapping."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def empty_rows(
    rows: int, columns: int, *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return an uninitialised (rows, columns) matrix; on CUDA a view of a slightly wider one."""
    width = columns
    if torch.device(device).type == "cuda":
        width += -columns % (CUDA_ALIGNMENT // dtype.itemsize)
    return torch.empty((rows, width), dtype=dtype, device=device)[:, :columns]


def readable_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy if the kernels could read its rows not at all or slowly."""
    if matrix.device.type != "cuda":
        return matrix.contiguous()
    packed = matrix.stride(1) == 1 or matrix.shape[1] == 1
    row_bytes = matrix.stride(0) * matrix.itemsize
    if packed and matrix.data_ptr() % 16 == 0 and (len(matrix) == 1 or row_bytes % 16 == 0):
        return matrix
    result = empty_rows(*matrix.shape, dtype=matrix.dtype, device=matrix.device)
    return result.copy_(matrix)
