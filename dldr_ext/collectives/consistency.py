"""Consistency checks: facts that ranks compare before they step together, as pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.parameters import dtype_name

Facts = dict[str, Any]  # of what json can carry
# Elements of a tensor that are looked at one by one.
_SAMPLES = 64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(*tensors: Tensor | None) -> str:
    """Return a checksum of the bits of tensors: one read of each, the same on every device.

    The sum of the words of each row as integers, and the words at 64 places of each.
    """
    checksum = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        if tensor is None or tensor.numel() == 0:
            checksum.update(b"none")
            continue
        rows = tensor.detach().reshape(len(tensor) if tensor.ndim > 1 else 1, -1)
        for row in rows:
            words = row.contiguous().view(_WORDS[row.element_size()])
            sampled = words[_places(len(words), words.device)].to(torch.int64)
            summary = torch.cat([words.sum(dtype=torch.int64).reshape(1), sampled])
            checksum.update(summary.cpu().numpy().tobytes())
    return checksum.hexdigest()


def samples(params: Sequence[Tensor]) -> list[str]:
    """Return a digest of a few elements of each parameter, by which to tell them apart."""
    sampled = [
        p.detach().reshape(-1)[_places(p.numel(), p.device)].to(torch.float64) for p in params
    ]
    flat = torch.cat(sampled).cpu()
    return [
        hashlib.blake2b(of_parameter.numpy().tobytes(), digest_size=6).hexdigest()
        for of_parameter in flat.split([len(elements) for elements in sampled])
    ]


def difference(facts: Sequence[Facts]) -> str | None:
    """Return the first difference from rank 0 in words, or None.

    An ``error`` of a rank comes first. Lists are compared entry by entry. ``samples`` need not be
    equal, but must not be those of rank 0 in another order.
    """
    for rank, other in enumerate(facts):
        if "error" in other:
            return f"rank {rank} failed: {other['error']}"
    first = facts[0]
    for key, value in first.items():
        for rank, other in enumerate(facts[1:], 1):
            if key not in other:
                return f"expected every rank to make the same calls, got another one on rank {rank}"
            if other[key] != value:
                words = _in_words(key, value, other[key], rank)
                if words is not None:
                    return words
    return None


def described(params: Sequence[Tensor]) -> list[str]:
    """Return the shape and dtype of each parameter."""
    return [f"{tuple(p.shape)} {dtype_name(p.dtype)}" for p in params]


def _in_words(key: str, value: Any, other: Any, rank: int) -> str | None:
    if key == "samples":
        if sorted(value) != sorted(other):
            return None  # weights that differ: they are about to be written
        i = next(i for i, (a, b) in enumerate(zip(value, other, strict=True)) if a != b)
        return (
            "expected the parameters in the same order on every rank, got rank 0's params"
            f"[{value.index(other[i])}] as params[{i}] on rank {rank}"
        )
    if isinstance(value, list) and isinstance(other, list):
        if len(value) != len(other):
            return f"{key}: expected {len(value)}, as on rank 0, got {len(other)} on rank {rank}"
        i = next(i for i, (a, b) in enumerate(zip(value, other, strict=True)) if a != b)
        return f"{key}[{i}]: expected {value[i]}, as on rank 0, got {other[i]} on rank {rank}"
    if key in ("basis", "origin", "theta"):
        return (
            f"{key}: expected the same bits on every rank, got others on rank {rank} than on rank 0"
        )
    return f"{key}: expected {value}, as on rank 0, got {other} on rank {rank}"


def _places(count: int, device: torch.device) -> Tensor:
    """Up to 64 indices below ``count``, evenly spaced."""
    if count <= _SAMPLES:
        return torch.arange(count, device=device)
    return torch.arange(_SAMPLES, device=device) * (count - 1) // (_SAMPLES - 1)
