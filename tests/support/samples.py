"""One set of samples for every test of the ops: dtype x shape x list, fresh numbers each time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import dldr_ext

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
STORAGE = FLOATS + QUANTIZED
CAPABILITIES = tuple(dldr_ext.build_info()["cpu_capabilities"])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_rows(rows: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Random stored rows and, for the 8-bit formats, their scale."""
    if dtype in FLOATS:
        return torch.randn(rows, n).to(dtype), None
    scale = torch.rand(rows, -(-n // 256)) + 0.5
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, n), dtype=torch.int8), scale / 127
    return (torch.randn(rows, n) * 60).clamp(-448, 448).to(dtype), scale / 448


def _strided(n: int) -> Tensor:
    return torch.randn(2 * n)[::2]


LISTS = ("one", "cut", "mixed", "strided", "channels_last", "empty", "constant", "many")


def make_list(kind: str, n: int) -> list[Tensor]:
    """A list of n elements in all."""
    if kind == "one":
        return [torch.randn(n)]
    if kind == "cut":
        return _pieces([torch.randn(k) for k in _cut(n, 5)])
    if kind == "mixed":
        return [torch.randn(k).to(FLOATS[i % 4]) for i, k in enumerate(_cut(n, 9))]
    if kind == "strided":
        return [_strided(k) if i % 2 else torch.randn(k) for i, k in enumerate(_cut(n, 4))]
    if kind == "channels_last":
        image = n // 24 * 24
        tensors = [torch.randn(n - image)]
        if image:
            conv = torch.randn(image // 24, 2, 3, 4).to(memory_format=torch.channels_last)
            tensors.insert(0, conv)
        return tensors
    if kind == "empty":
        first, second = _cut(n, 2)
        none = torch.zeros
        return [none(0), torch.randn(first), none(3, 0), torch.randn(second), none(0, 2)]
    if kind == "constant":
        first, second = _cut(n, 2)
        return [torch.randn(first), torch.full((), 0.75, dtype=torch.float16).expand(second)]
    if kind == "many":
        return [torch.randn(k) for k in _cut(n, min(n, 5000))] if n else []
    raise AssertionError(kind)


def _cut(n: int, parts: int) -> list[int]:
    """n as a sum of odd-sized parts."""
    edges = sorted(torch.randint(0, n + 1, (parts - 1,)).tolist())
    return [b - a for a, b in zip([0, *edges], [*edges, n], strict=True)]


def _pieces(tensors: list[Tensor]) -> list[Tensor]:
    """Some of them with two dimensions."""
    return [t.view(-1, 1) if i % 2 else t for i, t in enumerate(tensors)]


@dataclass
class Sample:
    """Everything an op may want, for one storage dtype and shape."""

    basis: Tensor
    scale: Tensor | None
    tensors: list[Tensor]
    theta: Tensor
    origin: Tensor
    label: str = field(repr=True, default="")


def make_sample(dtype: torch.dtype, n: int, d: int, kind: str = "cut") -> Sample:
    basis, scale = make_rows(d, n, dtype)
    return Sample(
        basis=basis,
        scale=scale,
        tensors=make_list(kind, n),
        theta=torch.randn(d, dtype=wide(dtype)),
        origin=torch.randn(n, dtype=wide(dtype)),
        label=f"{dtype} n={n} d={d} {kind}",
    )


# Around vector widths, scale blocks and tiles; several chunks' worth comes in tests of its own.
SIZES = (0, 1, 7, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 20_011)
DIMS = (1, 2, 3, 4, 5, 8, 40)
