"""What is measured: each op on large and on small problems, and what a user would write instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dldr_ext import ops

from .timing import Work

BF16 = torch.bfloat16
FP32_PEER = "float32 mv(cat)"


@dataclass
class Case:
    """One line of the table.

    Attributes
    ----------
    size : bytes that must move (floating-point operations for ``ceiling`` "multiply")
    peers : what a user would write in plain torch
    fraction : wanted of the ceiling
    wanted : speed-up wanted over each peer
    short : bound by launches: timed as a row of calls, eager and in a captured graph
    """

    name: str
    work: Work
    size: float
    peers: dict[str, Work] = field(default_factory=dict)
    fraction: float | None = None
    wanted: dict[str, float] = field(default_factory=dict)
    ceiling: str = "read"
    short: bool = False


@dataclass
class Setting:
    """Sizes: n parameters in `count` tensors, d directions; `most` elements of one matrix."""

    n: int
    d: int
    device: torch.device
    count: int = 160
    most: int = 26_000_000_000

    def columns(self, rows: int) -> int:
        """n, or what fits with so many rows."""
        return min(self.n, self.most // rows)

    def rows(self, count: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Random stored rows and their scale."""
        # On a GPU each starts at a multiple of 256 bytes, as in a Trajectory.
        gap = -n % (256 // dtype.itemsize) if self.device.type == "cuda" else 0
        rows = torch.empty(count, n + gap, dtype=dtype, device=self.device)[:, :n]
        for row in rows:
            numbers = torch.randn(n, device=self.device)
            row.copy_(numbers.mul_(60).clamp_(-127, 127) if dtype.itemsize == 1 else numbers)
        if dtype.itemsize > 1:
            return rows, None
        return rows, torch.rand(count, -(-n // 256), device=self.device) + 0.5

    def vector(self, n: int) -> Tensor:
        return torch.randn(n, device=self.device)

    def pieces(self, n: int) -> list[Tensor]:
        """A network's worth of tensors: every third one large, the larger the later."""
        shares = [4.0 ** (3 * i / self.count) if i % 3 == 0 else 0.002 for i in range(self.count)]
        sizes = [max(1, int(share / sum(shares) * n)) for share in shares]
        sizes[self.count // 3 * 3 - 3] += n - sum(sizes)
        return [torch.randn(size, device=self.device) for size in sizes]


def torch_mv(basis: Tensor, tensors: list[Tensor]) -> Tensor:
    return torch.mv(basis, torch.cat(tensors).to(basis.dtype))


def torch_reconstruct(params: list[Tensor], origin: Tensor, basis: Tensor, theta: Tensor) -> None:
    flat = torch.addmv(origin, basis.t(), theta)
    torch._foreach_copy_(params, list(flat.split([p.numel() for p in params])))


def project(s: Setting) -> Iterator[Case]:
    wide, _ = s.rows(s.d, s.n, torch.float32)
    tensors = s.pieces(s.n)
    formats = {
        torch.float32: (0.95, 1.1),
        BF16: (0.95, 1.9),
        torch.int8: (0.85, 4.0),
        torch.float8_e4m3fn: (0.85, 4.0),
    }
    for dtype, (fraction, speedup) in formats.items():
        basis, scale = (wide, None) if dtype == torch.float32 else s.rows(s.d, s.n, dtype)
        peers: dict[str, Work] = {FP32_PEER: lambda: torch_mv(wide, tensors)}
        wanted = {FP32_PEER: speedup}
        if dtype == BF16:
            peers["bfloat16 mv(cat)"] = lambda basis=basis: torch_mv(basis, tensors)
            wanted["bfloat16 mv(cat)"] = 1.1
        yield Case(
            f"project {str(dtype)[6:]}",
            lambda basis=basis, scale=scale: ops.project(basis, tensors, scale=scale),
            s.n * (s.d * dtype.itemsize + 4) + (0 if scale is None else 4 * scale.numel()),
            peers,
            fraction,
            wanted,
        )


def project_dims(s: Setting) -> Iterator[Case]:
    for d, fraction in ((8, 0.85), (256, 0.95)):
        n = s.columns(d)
        basis, _ = s.rows(d, n, BF16)
        tensors = s.pieces(n)
        peer = "bfloat16 mv(cat)"
        yield Case(
            f"project bfloat16 d={d}",
            lambda basis=basis, tensors=tensors: ops.project(basis, tensors),
            n * (d * 2 + 4),
            {peer: lambda basis=basis, tensors=tensors: torch_mv(basis, tensors)},
            fraction,
            {peer: 1.1},
        )


def combine(s: Setting) -> Iterator[Case]:
    """reconstruct_, the residual, a line search, several right-hand sides: one bfloat16 basis."""
    n, d = s.n, s.d
    basis, _ = s.rows(d, n, BF16)
    params, tensors = s.pieces(n), s.pieces(n)
    origin, theta, c = s.vector(n), s.vector(d), s.vector(d)
    short_origin, short_theta, short_c = origin.to(BF16), theta.to(BF16), c.to(BF16)

    def peer() -> None:
        torch_reconstruct(params, short_origin, basis, short_theta)

    name = "bfloat16 addmv, split, _foreach_copy_"
    yield Case(
        "reconstruct_ bfloat16",
        lambda: ops.reconstruct_(params, origin, basis, theta),
        n * (d * 2 + 8),
        {name: peer},
        0.92,
        {name: 1.15},
    )

    def two_passes() -> object:
        direction = torch.mv(basis.t(), short_theta)
        return direction, torch.cat(tensors) - torch.mv(basis.t(), short_c)

    yield Case(
        "reconstruct + residual bfloat16",
        lambda: ops.reconstruct_residual(basis, theta, c, tensors),
        n * (d * 2 + 16),
        {"two bfloat16 mv, cat, sub": two_passes},
        0.92,
        {"two bfloat16 mv, cat, sub": 1.9},
    )
    direction = torch.empty(n, device=s.device)

    def search() -> None:
        ops.reconstruct_([direction], None, basis, theta)
        for trial in range(10):
            ops.trial_(params, origin, direction, 0.5**trial)

    def ten() -> None:
        for _ in range(10):
            peer()

    yield Case(
        "10-trial line search bfloat16",
        search,
        n * (d * 2 + 4 + 120),
        {"ten reconstructs in plain torch": ten},
        0.90,
        {"ten reconstructs in plain torch": 4.0},
        ceiling="copy",
    )
    yield Case(
        "trial_",
        lambda: ops.trial_(params, origin, direction, 0.3),
        12 * n,
        {
            "add, split, _foreach_copy_": lambda: torch._foreach_copy_(
                params,
                list(torch.add(origin, direction, alpha=0.3).split([p.numel() for p in params])),
            )
        },
        ceiling="copy",
    )
    lists = [tensors] * 4 + [params] * 4
    many = "eight bfloat16 mv(cat)"
    yield Case(
        "project_many bfloat16, 8 right-hand sides",
        lambda: ops.project_many(basis, lists),
        n * (d * 2 + 8 * 4),
        {many: lambda: [torch_mv(basis, one) for one in lists]},
        0.90,
        {many: 6.0},
    )


def append(s: Setting) -> Iterator[Case]:
    t = 100
    n = s.columns(t + 8)
    rows, _ = s.rows(t + 8, n, BF16)
    gram = torch.zeros(t + 8, t + 8, dtype=torch.float64, device=s.device)
    tensors, anchor = s.pieces(n), s.vector(n)

    def peer() -> Tensor:
        rows[t] = (torch.cat(tensors) - anchor).to(BF16)
        return torch.mv(rows[: t + 1], rows[t])

    name = "cat, sub, cast, bfloat16 mv"
    yield Case(
        f"gram_append_ bfloat16 t={t}",
        lambda: ops.gram_append_(rows, gram, t, tensors, anchor),
        n * (2 * (t + 1) + 8),
        {name: peer},
        0.92,
        {name: 1.1},
    )

    def block() -> None:
        for k in range(8):
            ops.store_snapshot_(rows, t + k, tensors, anchor)
        ops.gram_block_(rows, gram, t, 8)

    def one_by_one() -> None:
        for k in range(8):
            ops.gram_append_(rows, gram, t + k, tensors, anchor)

    yield Case(
        f"8 snapshots bfloat16 t={t}, in one block",
        block,
        n * (2 * (t + 8) + 8 * 8),
        {"eight gram_append_": one_by_one},
        0.92,
        {"eight gram_append_": 6.0},
    )


def gram(s: Setting) -> Iterator[Case]:
    for t, dtype, speedup in (
        (40, torch.float32, 1.2),
        (40, BF16, 1.2),
        (100, BF16, 1.2),
        (400, BF16, 1.5),
    ):
        n = s.columns(t) if t < 400 else min(s.columns(t), s.n // 4)
        rows, _ = s.rows(t, n, dtype)
        name = f"{str(dtype)[6:]} X @ X.T"
        yield Case(
            f"gram T={t} {str(dtype)[6:]}" + (f" n={n:.3g}" if n != s.n else ""),
            lambda rows=rows: ops.gram(rows),
            # so many rows are bound by arithmetic: of float32 products, T (T + 1) a column
            n * t * dtype.itemsize if t < 400 else n * t * (t + 1),
            {name: lambda rows=rows: rows @ rows.T},
            0.90 if t < 400 else 0.70,
            {name: speedup},
            ceiling="read" if t < 400 else "multiply",
        )


def small(s: Setting) -> Iterator[Case]:
    n = min(s.n, 100_000)
    basis, _ = s.rows(s.d, n, BF16)
    tensors, origin, theta = s.pieces(n), s.vector(n), s.vector(s.d)
    short_origin, short_theta = origin.to(BF16), theta.to(BF16)
    few = [tensor.clone() for tensor in torch.cat(tensors).tensor_split(20)]
    one = [torch.cat(tensors)]
    tiny = list(torch.cat(tensors).tensor_split(min(2_000, n)))
    peer = "bfloat16 mv(cat)"
    for name, listed in (("160", tensors), ("20", few), ("1", one), ("2,000 tiny", tiny)):
        yield Case(
            f"project n={n:.0g}, {name} tensors",
            lambda listed=listed: ops.project(basis, listed),
            n * (s.d * 2 + 4),
            {peer: lambda listed=listed: torch_mv(basis, listed)},
            wanted={peer: 1.5 if len(listed) > 160 else 2.0},
            short=True,
        )
    yield Case(
        f"reconstruct_ n={n:.0g}, 160 tensors",
        lambda: ops.reconstruct_(tensors, origin, basis, theta),
        n * (s.d * 2 + 8),
        {
            "addmv, split, _foreach_copy_": lambda: torch_reconstruct(
                tensors, short_origin, basis, short_theta
            )
        },
        wanted={"addmv, split, _foreach_copy_": 2.0},
        short=True,
    )


GROUPS = (project, project_dims, combine, append, gram, small)
