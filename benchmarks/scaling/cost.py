"""What the ops cost against n, T, d, the number of tensors and threads, beside plain torch.

``python -m benchmarks.scaling.cost``; ``--only n`` runs one sweep and keeps the others. In a round
every op and its peer are timed one after the other; figures are medians over rounds. Writes
`cost.json` and a figure for each sweep beside the other results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dldr_ext import ops
from dldr_ext.performance.roofline import Problem, resnet18_sizes
from dldr_ext.performance.timing import Spread, seconds
from dldr_ext.reporting.figures import LIGHT, Drawing, save_figures

from .. import RESULTS
from ..measure import processor

D, T = 40, 40
LEAST_SECONDS = 0.01  # a shorter call is made several times in a row
# An op and what a user would write for it.
Pairs = dict[str, tuple[Callable[[], object], Callable[[], object]]]
COLOURS = {
    "project": "blue", "reconstruct_": "orange", "gram_append_": "green", "gram": "purple",
    "form_basis": "red",
}  # fmt: skip


def passes(sizes: list[int], d: int) -> Pairs:
    """The two passes over a float32 basis."""
    p = Problem(sizes, d)
    return {
        "project": (lambda: ops.project(p.basis, p.gradients), p.torch_project),
        "reconstruct_": (
            lambda: ops.reconstruct_(p.params, p.origin, p.basis, p.theta),
            p.torch_reconstruct,
        ),
    }


def snapshots(n: int, t: int) -> Pairs:
    """What is made of bfloat16 snapshots."""
    p = Problem(resnet18_sizes(n), t)
    p.basis = rows = p.stored(torch.bfloat16)[0]
    gram = torch.zeros(t, t, dtype=torch.float64)
    c = torch.randn(min(t, D), t, dtype=torch.float64)
    low = c.bfloat16()
    return {
        "gram_append_": (
            lambda: ops.gram_append_(rows, gram, t - 1, p.gradients, p.origin),
            p.torch_append,
        ),
        "gram": (lambda: ops.gram(rows), p.torch_gram),
        "form_basis": (lambda: ops.form_basis(rows, c), lambda: low @ rows),
    }


def on_threads(count: int) -> Pairs:
    """All of them on so many threads."""
    pairs = passes(resnet18_sizes(8_000_000), D) | snapshots(2_000_000, T)

    def limited(work: Callable[[], object]) -> object:
        torch.set_num_threads(count)
        return work()

    return {op: (partial(limited, a), partial(limited, b)) for op, (a, b) in pairs.items()}


# What is varied: its values, the ops and peers of one, its axis, and what is kept.
Sweep = tuple[list[int], Callable[[int], Pairs], str, str]
SWEEPS: dict[str, Sweep] = {
    "n": (
        [1000, 10_000, 100_000, 1_000_000, 10_000_000, 30_000_000],
        lambda n: passes(resnet18_sizes(n), D),
        "parameters n",
        f"float32 basis, d = {D}, 62 tensors",
    ),
    "d": (
        [4, 8, 16, 32, 64, 128, 256],
        lambda d: passes(resnet18_sizes(1_000_000), d),
        "directions d",
        "float32 basis, n = 1M",
    ),
    "snapshots": (
        [8, 16, 32, 64, 128],
        lambda t: snapshots(2_000_000, t),
        "snapshots T",
        f"bfloat16 snapshots, n = 2M, d = {D} at most",
    ),
    "tensors": (
        [1, 4, 16, 62, 250, 1000, 2000],
        lambda count: passes([100_000 // count] * count, 4),
        "tensors of one list",
        "float32 basis, d = 4, n = 100,000 in all",
    ),
    "threads": (
        list(range(1, torch.get_num_threads() + 1)),
        on_threads,
        "threads",
        "passes: float32, n = 8M, d = 40; others: bfloat16, n = 2M, T = 40",
    ),
}


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call, of several in a row where one is short."""
    first = seconds(work)
    count = min(500, int(LEAST_SECONDS / first) + 1)
    return first if count == 1 else seconds(lambda: [work() for _ in range(count)]) / count


def measure(sweep: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of every op and its peer at each value."""
    values, pairs, _, _ = SWEEPS[sweep]
    found: dict[str, Any] = {}
    for value in values:
        for op, (ours, peer) in pairs(value).items():
            times = [(timed(ours), timed(peer)) for _ in range(rounds + 1)][1:]
            row = found.setdefault(op, {"ms": [], "torch_ms": [], "against_torch": []})
            row["ms"].append(1e3 * Spread.of([a for a, _ in times]).median)
            row["torch_ms"].append(1e3 * Spread.of([b for _, b in times]).median)
            row["against_torch"].append(vars(Spread.of([b / a for a, b in times])))
    return {"values": values, "ops": found}


def draw(sweep: str, measured: dict[str, Any], figure: Any) -> None:
    """Milliseconds over what is varied; plain torch is dashed."""
    axes = figure.add_subplot()
    for op, row in measured["ops"].items():
        colour = LIGHT[COLOURS[op]]
        axes.plot(measured["values"], row["ms"], "o-", color=colour, label=op, markersize=4)
        axes.plot(measured["values"], row["torch_ms"], "--", color=colour, linewidth=1.2)
    axes.plot([], [], "--", color=LIGHT["grey"], linewidth=1.2, label="the same in plain torch")
    _, _, axis, kept = SWEEPS[sweep]
    axes.set(xlabel=f"{axis}\n({kept})", ylabel="milliseconds", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    if sweep == "threads":
        axes.set_xticks(measured["values"])
    else:
        axes.set_xscale("log")
        axes.set_xticks(measured["values"], [_short(value) for value in measured["values"]])
        axes.minorticks_off()
    figure.legend(loc="outside lower left", ncols=3)


def _short(value: int) -> str:
    return f"{value // 1_000_000}M" if value >= 1_000_000 else f"{value:,}"


def drawings(results: dict[str, Any]) -> list[Drawing]:
    """A figure of every sweep that was run."""
    found = []
    for sweep, measured in results.items():
        axis = SWEEPS[sweep][2]
        said = [
            f"{op} {row['ms'][0]:.3g} to {row['ms'][-1]:.3g} ms, in plain torch "
            f"{row['torch_ms'][0]:.3g} to {row['torch_ms'][-1]:.3g}"
            for op, row in measured["ops"].items()
        ]
        words = f"From {measured['values'][0]} to {measured['values'][-1]} {axis}: "
        draws = partial(draw, sweep, measured)
        title, said_all = f"Time against {axis}", words + "; ".join(said)
        found.append(Drawing(f"cost-{sweep}", title, said_all, draws, height=4.4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SWEEPS, nargs="+", default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    path = RESULTS / "cost.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    results = kept.get("results", {})
    about = {"processor": processor(), "threads": torch.get_num_threads()}
    for sweep in options.only:
        results[sweep] = measure(sweep, options.rounds)
        about |= {"torch": torch.__version__, "results": results}
        path.write_text(json.dumps(about, indent=1) + "\n")
        for op, row in results[sweep]["ops"].items():
            ratios = [f"{Spread(**spread).median:.2f}x" for spread in row["against_torch"]]
            print(f"{sweep:10} {op:14} against torch: {', '.join(ratios)}", flush=True)
    save_figures(drawings(results), RESULTS)


if __name__ == "__main__":
    main()
