"""One subspace of every kind over the same parameters, and the basis that each stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import reference
import torch
from samples import FLOATS, STORAGE, wide
from torch import Tensor, nn
from torch import distributed as dist

from dldr_ext import (
    GroupedSubspace,
    ImplicitSubspace,
    LocalSubspace,
    ShardedSubspace,
    Subspace,
    Trajectory,
)
from dldr_ext.subspace import AffineSubspace

FORMATS = ["int8", "float8_e4m3fn"]
SHAPES = [(2, 3, 3, 3), (7,), (11, 5), (), (300,)]
NAMES = [f"values.{i}" for i in range(len(SHAPES))]
N = 54 + 7 + 55 + 1 + 300
D = 6


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One in channels_last, one with swapped strides, one without dimensions."""
    tensors = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    tensors[2] = tensors[2].T.contiguous().T
    return [nn.Parameter(t) for t in tensors]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def orthonormal(d: int = D, n: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q.T.to(dtype).contiguous()


def dense(dtype: torch.dtype = torch.float32, d: int = D, **known: object) -> Subspace:
    """Random orthonormal rows, rounded to ``dtype``, at a random origin."""
    origin = torch.randn(N, dtype=wide(dtype))
    return Subspace(orthonormal(d, dtype=dtype), origin, **({"shapes": SHAPES} | known))


def values(space: AffineSubspace) -> Tensor:
    """The numbers that the basis stands for, (d, n) float64."""
    if isinstance(space, GroupedSubspace):
        return torch.block_diag(*map(values, space.subspaces))
    if isinstance(space, ImplicitSubspace):
        return space.coefficients @ reference.decode(space.snapshots, space.scale)
    if isinstance(space, ShardedSubspace | LocalSubspace):
        space = space.local
    return reference.decode(space.basis, space.scale)


def has_8_bit_basis(space: AffineSubspace) -> bool:
    parts = space.subspaces if isinstance(space, GroupedSubspace) else [space]
    return any(isinstance(part, Subspace) and part.scale is not None for part in parts)


def _named(dtype: torch.dtype = torch.float32) -> Subspace:
    ratio = torch.linspace(1, 0.5, D) / D
    return dense(dtype, names=NAMES, singular_values=ratio.sqrt(), explained_variance_ratio=ratio)


def _grouped(dtype: torch.dtype) -> GroupedSubspace:
    params = [p.to(wide(dtype)) for p in parameters()]
    named = list(zip(NAMES, params, strict=True))
    return GroupedSubspace.random(named, 2, [1, 2, 2], dtype=dtype)


def _mixed() -> GroupedSubspace:
    first, second, third = _grouped(torch.float32).subspaces
    return GroupedSubspace([first.quantize("int8"), second, third.to(dtype=torch.bfloat16)])


def _implicit(dtype: torch.dtype) -> ImplicitSubspace:
    params = parameters(wide(dtype))
    trajectory = Trajectory(zip(NAMES, params, strict=True), capacity=9, dtype=dtype)
    for t in range(9):
        trajectory.record()
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn_like(p), alpha=0.5 / (t + 1))
    return trajectory.subspace(dim=D, materialize=False)


# Those of ranks want a process group, of one rank here: tests/distributed has the others.
KINDS: dict[str, Callable[[], AffineSubspace]] = {
    **{f"dense-{dtype}": lambda dtype=dtype: _named(dtype) for dtype in FLOATS},
    **{f"dense-{name}": lambda name=name: _named().quantize(name) for name in FORMATS},
    **{f"grouped-{dtype}": lambda dtype=dtype: _grouped(dtype) for dtype in FLOATS},
    "grouped-int8": lambda: _grouped(torch.float32).quantize("int8"),
    "grouped-mixed": _mixed,
    **{f"implicit-{dtype}": lambda dtype=dtype: _implicit(dtype) for dtype in STORAGE},
}
OF_RANKS: dict[str, Callable[[], AffineSubspace]] = {
    "sharded-float32": lambda: ShardedSubspace(_named(), "world"),
    "sharded-int8": lambda: ShardedSubspace(_named().quantize("int8"), "world"),
    "local-float32": lambda: _local(_named()),
    "local-float64": lambda: _local(_named(torch.float64)),
}


def _local(space: Subspace) -> LocalSubspace:
    return LocalSubspace(
        space.basis, space.origin, dist.group.WORLD, shapes=SHAPES, names=NAMES,
        singular_values=space.singular_values,
        explained_variance_ratio=space.explained_variance_ratio,
    )  # fmt: skip


class Holder(nn.Module):
    """A model with these parameters; its output is their inner product with the input."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList(params)

    def forward(self, x: list[Tensor]) -> Tensor:
        return sum((p * t).sum() for p, t in zip(self.values, x, strict=True))
