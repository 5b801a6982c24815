"""The ops against what a user would write and against the memory: for `dldr bench` and others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..pca.gram import exact_gram
from ..tensors.formats import blocks
from ..tensors.memory import free_memory
from ..tensors.parameters import dtype_name
from .timing import Spread, Work, bandwidth, multiplier, paired, reader

#: Formats of stored rows that `roofline` goes through.
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
# Bytes a parameter that `roofline` needs at once: for each of the d directions the rows in
# float32, a result of that size, and half of it once more for another format or a copy ...
_ROW_BYTES = 12
_VECTOR_BYTES = 24  # ... and for flat vectors.
# Parameters for which all rows are far beyond a cache (8-bit ones 160 MB).
_MOST = 4_000_000
_ARITHMETIC_ROUNDS = 3


def resnet18_sizes(total: int) -> list[int]:
    """Return 62 tensor sizes in the proportions of ResNet-18 (torchvision), of ``total`` in all."""
    sizes = [9408, 64, 64]
    width = 64
    for stage, planes in enumerate((64, 128, 256, 512)):
        for block in range(2):
            sizes += [width * planes * 9, planes, planes, planes * planes * 9, planes, planes]
            if block == 0 and stage:
                sizes += [width * planes, planes, planes]
            width = planes
    sizes += [512 * 1000, 1000]
    scale = total / sum(sizes)
    scaled = [max(1, round(size * scale)) for size in sizes]
    scaled[-2] += total - sum(scaled)
    return scaled


class Problem:
    """Random rows in float32 (the peers read those), gradients, parameters and a flat origin.

    Parameters
    ----------
    sizes : list of int
        Elements of each parameter tensor.
    dim : int
        Rows.
    device : torch.device or str
    """

    def __init__(self, sizes: list[int], dim: int = 40, device: torch.device | str = "cpu") -> None:
        self.sizes, self.n, self.dim = sizes, sum(sizes), dim
        self.device = torch.device(device)
        self.basis = torch.empty(dim, self.n, device=self.device)
        for row in self.basis:
            row.normal_()
        self.gradients = [torch.randn(size, device=self.device) for size in sizes]
        self.params = [torch.zeros(size, device=self.device) for size in sizes]
        self.origin = torch.randn(self.n, device=self.device)
        self.theta = torch.randn(dim, device=self.device)

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return the rows in another format, with the scale of an 8-bit one (both random)."""
        if dtype == torch.float32:
            return self.basis, None
        if dtype.itemsize == 1:
            rows = torch.randint(-127, 128, self.basis.shape, dtype=torch.int8, device=self.device)
            return rows.to(dtype), torch.rand(self.dim, blocks(self.n), device=self.device)
        return self.basis.to(dtype), None

    def torch_project(self) -> Tensor:
        """Project the gradients as a user would write it."""
        return torch.mv(self.basis, torch.cat(self.gradients))

    def torch_reconstruct(self) -> None:
        """Write w0 + P theta into the parameters as a user would write it."""
        flat = torch.addmv(self.origin, self.basis.t(), self.theta)
        for param, weights in zip(self.params, flat.split(self.sizes), strict=True):
            param.copy_(weights)

    def torch_append(self) -> Tensor:
        """Record a snapshot and its products with the others as a user would write it."""
        self.basis[-1] = torch.cat(self.gradients) - self.origin
        return torch.mv(self.basis, self.basis[-1])

    def torch_gram(self) -> Tensor:
        """Multiply the rows with each other as a user would write it."""
        return self.basis @ self.basis.T


@dataclass
class Case:
    """One line of the table: an op, its least work, and its peer.

    Attributes
    ----------
    name : str
    work : callable
        The op.
    size : float
        Bytes that must move.
    peer, peer_name : callable and str, or None
        What a user would write in plain torch, in float32, and how to call it.
    flops : float
        Operations that must be done, where they may take longer than the bytes.
    kind : torch.dtype
        The format that they are done in.
    """

    name: str
    work: Work
    size: float
    peer: Work | None = None
    peer_name: str | None = None
    flops: float = 0.0
    kind: torch.dtype = torch.float32


def cases(problem: Problem, dtype: torch.dtype) -> Iterator[Case]:
    """Make a case of each op on rows of one format."""
    rows, scale = problem.stored(dtype)
    n, d = problem.n, problem.dim
    stored = rows.numel() * rows.element_size() + (0 if scale is None else 4 * scale.numel())
    device, name = problem.device, dtype_name(dtype)
    yield Case(
        f"project {name}",
        lambda: ops.project(rows, problem.gradients, scale=scale),
        stored + 4 * n,
        problem.torch_project,
        "mv(cat)",
    )
    yield Case(
        f"reconstruct_ {name}",
        lambda: ops.reconstruct_(problem.params, problem.origin, rows, problem.theta, scale=scale),
        stored + 8 * n,
        problem.torch_reconstruct,
        "addmv, split, copy",
    )
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    yield Case(
        f"gram_append_ {name}",
        lambda: ops.gram_append_(rows, gram, d - 1, problem.gradients, problem.origin, scale=scale),
        stored + 8 * n,
        problem.torch_append,
        "cat, sub, mv",
    )
    yield Case(
        f"gram {name}",
        lambda: ops.gram(rows, scale=scale),
        stored,
        problem.torch_gram,
        "X @ X.T",
        n * d * (d + 1),
    )
    if scale is None:  # the one that a basis is made from
        yield Case(
            f"gram64 {name}",
            lambda: exact_gram(rows),
            stored,
            flops=n * d * (d + 1),
            kind=torch.float64,
        )
    # An orthogonal C. What is formed of 8-bit rows is float32: the ops do not round to 8 bits.
    out = torch.float32 if scale is not None else dtype
    c = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=device))[0]
    short = c.float()
    yield Case(
        f"form_basis {name}",
        lambda: ops.form_basis(rows, c, scale=scale, dtype=out),
        stored + n * d * out.itemsize,
        lambda: short @ problem.basis,
        "C @ X",
        2 * n * d * d,
        torch.float64,
    )


def fitting(dim: int, device: torch.device | str = "cpu") -> int:
    """Return the number of parameters for which `roofline` needs half of the free memory."""
    return max(1, min(_MOST, free_memory(device) // 2 // (_ROW_BYTES * dim + _VECTOR_BYTES)))


def roofline(
    numel: int | None = None,
    dim: int = 40,
    device: torch.device | str = "cpu",
    rounds: int = 5,
) -> Iterator[dict[str, Any]]:
    """Measure the ops against the memory of this machine and against plain torch.

    Parameters
    ----------
    numel : int, optional
        Parameters n. Default: what half of the free memory holds, 4 million at most.
    dim : int
        Rows, d = T.
    device : torch.device or str
    rounds : int
        At least two; each times the op, its peer and a read of the same rows back to back.

    Yields
    ------
    dict
        First ``{"case": "read"}`` and ``{"case": "copy"}`` with ``gb_per_second``; then one for
        each op and format with ``bytes``, ``flops``, ``seconds``, ``gb_per_second``,
        ``of_ceiling`` (share of the read ceiling of the same round), ``of_multiply`` (where
        products may take longer: share of the rate of torch's product of two large matrices),
        ``against_torch`` (speed-up over ``peer``, which works in float32, if there is one).
        Measured values are quartiles ``{"low", "median", "high"}``. "gram64" is the Gram matrix
        summed in float64 that a basis is made from.
    """
    numel = fitting(dim, device) if numel is None else numel
    problem = Problem(resnet18_sizes(numel), dim, device)
    for name, speeds in zip(("read", "copy"), bandwidth(problem.basis, rounds), strict=True):
        yield {"case": name, "gb_per_second": vars(Spread.of([s / 1e9 for s in speeds]))}
    read = reader(problem.basis[: dim // 2 * 2])
    read_bytes = 4 * numel * (dim // 2 * 2)
    for dtype in DTYPES:
        for case in cases(problem, dtype):
            measured = paired(case.work, case.size, case.peer, read, read_bytes, rounds)
            if case.flops:
                multiply = multiplier(case.kind, problem.device)
                share = paired(case.work, case.flops, None, *multiply, _ARITHMETIC_ROUNDS)
                measured["of_multiply"] = share["of_ceiling"]
            measured["gb_per_second"] = [case.size / s / 1e9 for s in measured["seconds"]]
            row: dict[str, Any] = {"case": case.name, "bytes": case.size, "flops": case.flops}
            row |= {key: vars(Spread.of(values)) for key, values in measured.items() if values}
            yield row | ({} if case.peer is None else {"peer": case.peer_name})
