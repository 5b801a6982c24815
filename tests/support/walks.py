"""Parameters of several shapes that take random steps, recorded."""

from __future__ import annotations

import torch
from torch import nn

from dldr_ext import Trajectory

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def parameters(dtype=torch.float32):
    """Several shapes and formats: 2 * 3 * 3 * 3 + 7 + 11 * 5 + 1 = 117 elements."""
    image = torch.randn(2, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    tensors = [image, torch.randn(7, dtype=dtype), torch.randn(5, 11, dtype=dtype).T]
    return [nn.Parameter(t) for t in (*tensors, torch.randn((), dtype=dtype))]


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def walk(params, count, record, step=0.1):
    """Random steps of decreasing size along directions that keep their place; the points."""
    points = []
    for t in range(count):
        points.append(flat(params))
        record()
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn(p.shape, dtype=torch.float64).to(p.dtype), alpha=step / (t + 1))
    return torch.stack(points)


def recorded(count=12, dtype=torch.float32, **options):
    params = parameters(torch.float64 if dtype == torch.float64 else torch.float32)
    result = Trajectory(params, capacity=count + 3, dtype=dtype, **options)
    points = walk(params, count, result.record)
    return result, params, points
