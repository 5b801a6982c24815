"""How cost grows with n, T and d, and a basis of more than 2^31 elements.

``python -m benchmarks.scaling.scale``; ``--only n`` (or rows, large) runs one part and keeps the
results of the others. Within a round every size is timed once, over the same memory piece by piece
(some pages are slower than others), beside a read of a large buffer; slopes are fitted to each
round of its own, so that a memory that changes its speed between rounds does not bend them. The C
library (glibc) is told to keep memory that was freed, for `form_basis` returns as much as it reads:
how it goes where the system hands out all of that anew is measured beside it. Takes 10 GB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from collections.abc import Callable

import torch

from dldr_ext import ops
from dldr_ext.performance.roofline import resnet18_sizes
from dldr_ext.performance.timing import Spread, reader, seconds
from dldr_ext.plan.costs import ITEMSIZE

from .. import RESULTS

DTYPE = torch.bfloat16
B = int(ITEMSIZE["bfloat16"])
T, D = 20, 16
SIZES = [100_000, 300_000, 1_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000, 64_000_000]
# The basis, 32 bytes a parameter, is then four times as large as the processor's 32 MB cache.
BEYOND_CACHE = 4_000_000
ROWS = [8, 16, 32, 64, 128]
ROWS_NUMEL = 8_000_000
LEAST_SECONDS = 0.12
LARGE_DIM, LARGE_NUMEL = 64, 34_000_000


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, a few millions of them again and again."""
    out = torch.empty(count, dtype=dtype)
    few = torch.randn(min(count, 5_000_011)).to(dtype)
    for piece in out.split(len(few)):
        piece.copy_(few[: len(piece)])
    return out


def slope(x: list[float], y: list[float]) -> float:
    """Of a straight line through log y over log x, least squares."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    u, v = sum(a) / len(a), sum(b) / len(b)
    return sum((p - u) * (q - v) for p, q in zip(a, b, strict=True)) / sum((p - u) ** 2 for p in a)


def keep_memory() -> None:
    """From here on memory that is freed stays with the process, and there is enough of it."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1)):
        raise OSError("scale.py needs the mallopt of glibc")
    torch.ones(3 * B * D * SIZES[-1], dtype=torch.uint8)


class Buffers:
    """Memory for the largest problem; a smaller one has many places in it."""

    def __init__(self, rows: int, numel: int) -> None:
        self.rows = numbers(rows * numel, DTYPE)
        self.gradient = numbers(numel, torch.float32)
        self.params = torch.zeros(numel)
        self.origin = torch.ones(numel)

    def works(self, n: int, t: int, d: int, place: int = 0) -> dict[str, Callable[[], object]]:
        front = self.rows[place * t * n :]
        rows, basis = front[: t * n].view(t, n), front[: d * n].view(d, n)
        sizes, here = resnet18_sizes(n), slice(place * n, place * n + n)
        gradients, params = self.gradient[here].split(sizes), self.params[here].split(sizes)
        origin, theta = self.origin[here], torch.randn(d)
        gram = torch.zeros(t, t, dtype=torch.float64)
        c = torch.randn(d, t, dtype=torch.float64)
        return {
            "record": lambda: ops.gram_append_(rows, gram, t - 1, gradients, origin),
            "form_basis": lambda: ops.form_basis(rows, c),
            "project": lambda: ops.project(basis, gradients),
            "reconstruct_": lambda: ops.reconstruct_(params, origin, basis, theta),
        }


def least_bytes(op: str, n: int, t: int, d: int) -> float:
    return (
        n
        * {
            "record": B * t + 8,
            "form_basis": B * (t + d),
            "project": B * d + 4,
            "reconstruct_": B * d + 8,
        }[op]
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call, of several in a row where one is short.

    What else a shared machine does then weighs as much on small problems as on large ones.
    """
    first = seconds(work)
    if first > LEAST_SECONDS:
        return first
    count = min(200, int(LEAST_SECONDS / first))
    return seconds(lambda: [work() for _ in range(count)]) / count


def over_n(rounds: int) -> dict:
    """Seconds of each op for each n, and the slopes beyond the cache."""
    buffers = Buffers(T, SIZES[-1])
    # Each size goes over all of the memory: some of its pages are slower than others.
    cases = {n: [buffers.works(n, T, D, i) for i in range(SIZES[-1] // n)] for n in SIZES}
    read = reader(buffers.rows[: 1 << 28])
    fresh = _slopes(["form_basis"], cases, read, rounds)
    keep_memory()
    found = _slopes([*cases[SIZES[0]][0]], cases, read, rounds)
    found["form_basis"]["fresh_memory"] = fresh["form_basis"]
    return {"T": T, "d": D, "numel": SIZES, "beyond_cache": BEYOND_CACHE, "ops": found}


def _slopes(names: list[str], cases: dict, read: Callable[[], object], rounds: int) -> dict:
    took: dict[str, list[list[float]]] = {op: [] for op in names}
    steady: dict[str, list[list[float]]] = {op: [] for op in names}
    for turn in range(-1, rounds):  # the first is not counted
        for op in took:
            row, level = [], []
            for n in SIZES:
                before = seconds(read)
                row.append(seconds(lambda: [work[op]() for work in cases[n]]) / len(cases[n]))  # noqa: B023
                level.append(row[-1] / min(before, seconds(read)))
            if turn >= 0:
                took[op].append(row)
                steady[op].append(level)
    far = [i for i, n in enumerate(SIZES) if n >= BEYOND_CACHE]
    far_n = [SIZES[i] for i in far]

    def slopes(rows: list[list[float]]) -> dict:
        return vars(Spread.of([slope(far_n, [row[i] for i in far]) for row in rows]))

    found = {}
    for op, rows in took.items():
        columns = [list(column) for column in zip(*rows, strict=True)]
        found[op] = {
            "seconds": [vars(Spread.of(column)) for column in columns],
            "slope": slopes(rows),
            "slope_of_best": slope(far_n, [min(columns[i]) for i in far]),
            # of the time in units of a read of 512 MB just before and after
            "slope_in_reads": slopes(steady[op]),
        }
    return found


def over_rows(rounds: int) -> dict:
    """Seconds against T and d, and the slope over the bytes that must move."""
    keep_memory()
    buffers = Buffers(ROWS[-1], ROWS_NUMEL)
    n = ROWS_NUMEL
    lines: dict[str, tuple[str, list[tuple[int, int]]]] = {
        "record, T": ("record", [(k, 8) for k in ROWS]),
        "form_basis, T (d = 16)": ("form_basis", [(k, 16) for k in ROWS]),
        "form_basis, d (T = 64)": ("form_basis", [(64, k) for k in ROWS[:-1]]),
        "project, d": ("project", [(8, k) for k in ROWS]),
        "reconstruct_, d": ("reconstruct_", [(8, k) for k in ROWS]),
    }
    found = {}
    for line, (op, shapes) in lines.items():
        works = [buffers.works(n, t, d)[op] for t, d in shapes]
        rows = [[seconds(work) for work in works] for _ in range(rounds + 1)][1:]
        sizes = [least_bytes(op, n, t, d) for t, d in shapes]
        varied = [
            t * d if op == "form_basis" else size
            for (t, d), size in zip(shapes, sizes, strict=True)
        ]
        found[line] = {
            "rows": [d if line.split(", ")[1][0] == "d" else t for t, d in shapes],
            "bytes": sizes,
            "seconds": [vars(Spread.of(list(c))) for c in zip(*rows, strict=True)],
            "against": "products" if op == "form_basis" else "bytes",
            "slope": vars(Spread.of([slope(varied, row) for row in rows])),
            "slope_of_best": slope(varied, [min(c) for c in zip(*rows, strict=True)]),
        }
    return {"numel": n, "lines": found}


def large(rounds: int) -> dict:
    """A basis of more than 2^31 elements against float64."""
    d, n = LARGE_DIM, LARGE_NUMEL
    assert d * n > 2**31
    basis = numbers(d * n, DTYPE).view(d, n)
    gradient, origin = torch.randn(n), torch.randn(n)
    gradients = gradient.split(resnet18_sizes(n))
    theta = torch.randn(d)
    got = ops.project(basis, gradients)
    # all of it, in float64, a few columns at a time
    want, size = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    step = 1 << 19
    for begin in range(0, n, step):
        part = basis[:, begin : begin + step].double()
        right = gradient[begin : begin + step].double()
        want += part @ right
        size += part.abs() @ right.abs()
    weights = torch.zeros(n)
    params = weights.split(resnet18_sizes(n))
    ops.reconstruct_(params, origin, basis, theta)
    # 200,000 columns anywhere, and the first and last of all
    some = torch.cat([torch.randint(n, (200_000,)), torch.arange(4096), torch.arange(n - 4096, n)])
    exact = origin[some].double() + theta.double() @ basis[:, some].double()
    scale = origin[some].abs().double() + theta.abs().double() @ basis[:, some].abs().double()
    read = reader(basis)
    found: dict = {
        "d": d,
        "numel": n,
        "elements": d * n,
        "project_error": float(((got - want).abs() / size).max()),
        "reconstruct_error": float(((weights[some] - exact).abs() / scale).max()),
        "unit": "largest error over the sum of magnitudes; 2^-24 is half a unit of float32",
    }
    works: dict[str, tuple[Callable[[], object], int]] = {
        "project": (lambda: ops.project(basis, gradients), 4),
        "reconstruct_": (lambda: ops.reconstruct_(params, origin, basis, theta), 8),
    }
    for op, (work, extra) in works.items():
        shares, took = [], []
        for _ in range(rounds):
            before, own, after = seconds(read), seconds(work), seconds(read)
            took.append(own)
            shares.append((d * B + extra) / own / (d * B / min(before, after)))
        found[op] = {"seconds": vars(Spread.of(took)), "of_ceiling": vars(Spread.of(shares))}
    return found


PARTS = {"n": over_n, "rows": over_rows, "large": large}


def show(result: dict) -> None:
    for op, found in result.get("n", {"ops": {}})["ops"].items():
        print(f"{op:14} slope over n {Spread(**found['slope']).show(digits=3)}, of the least times "
              f"{found['slope_of_best']:.3f}, in reads "
              f"{Spread(**found['slope_in_reads']).show(digits=3)}")  # fmt: skip
        if "fresh_memory" in found:
            fresh = Spread(**found["fresh_memory"]["slope"]).show(digits=3)
            print(f"{'':14} with memory that is new to the process {fresh}")
    for line, found in result.get("rows", {"lines": {}})["lines"].items():
        print(f"{line:24} slope over {found['against']} "
              f"{Spread(**found['slope']).show(digits=3)}, of the least times "
              f"{found['slope_of_best']:.3f}")  # fmt: skip
    if "large" in result:
        print(json.dumps(result["large"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    path = RESULTS / "scale.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in options.only:
        result[name] = PARTS[name](options.rounds)
        path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
