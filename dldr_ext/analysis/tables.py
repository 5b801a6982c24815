"""What the report and the terminal say in tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..reporting.html import Table
from .plots import checkpoint_names, named_runs

MOST = 300  # rows of checkpoints in the report
_MOST_LAYERS = 100


def runs(results: dict[str, Any]) -> Table:
    """Set two runs side by side."""
    both, together = named_runs(results), results["comparison"]
    ones = list(both.values())

    def percent(share: float) -> str:
        return f"{100 * share:.2f} %"

    dimensions = [run["effective_dimension"] for run in ones]
    drifts = [run["drift"] for run in ones]
    rows: list[list[Any]] = [
        ["checkpoints", *(len(run["checkpoints"]) for run in ones)],
        ["participation ratio", *(f"{d['participation_ratio']:.2f}" for d in dimensions)],
        *(
            [f"directions for {100 * float(share):g} %", *(d[share] for d in dimensions)]
            for share in ("0.9", "0.95", "0.99")
        ),
        ["length of the path", *(f"{sum(drift['steps']):.4g}" for drift in drifts)],
        ["from first to last", *(f"{drift['from_first'][-1]:.4g}" for drift in drifts)],
        [
            f"variance along {together['kept']} directions of the other",
            percent(together["first_in_second"]),
            percent(together["second_in_first"]),
        ],
        ["between their first checkpoints", f"{together['distance_of_first']:.4g}", ""],
        ["between their last checkpoints", f"{together['distance_of_last']:.4g}", ""],
    ]
    if "loss" in results:
        along = results["loss"]["along"]
        rows.append(["loss at the end", *(f"{values[-1]:.5g}" for values in along)])
        rows.append(["lowest loss", *(f"{min(values):.5g}" for values in along)])
    return Table("Two runs side by side", ["run", *both], rows)


def checkpoints(results: dict[str, Any]) -> Iterator[Table]:
    """List the checkpoints of each run, or some of them if they are many."""
    for name, run in named_runs(results).items():
        drift, cosines = run["drift"], run["cosines"]["successive"]
        shown = _some(len(run["checkpoints"]), MOST)
        rows = [
            [
                run["checkpoints"][t],
                t,
                f"{drift['from_first'][t]:.4g}",
                "-" if t == 0 else f"{drift['steps'][t - 1]:.4g}",
                "-" if t < 2 else f"{cosines[t - 2]:.3f}",
            ]
            for t in shown
        ]
        columns = ["checkpoint", "number", "from the first", "step", "cosine with the step before"]
        yield Table(_caption("Checkpoints", results, name, shown, run), columns, rows)


def loss_along(results: dict[str, Any], most: int = MOST) -> Iterator[Table]:
    """List the loss of the checkpoints of each run."""
    pairs = zip(named_runs(results).items(), results["loss"]["along"], strict=True)
    for (name, run), values in pairs:
        names = checkpoint_names(run["checkpoints"])
        shown = sorted({*_some(len(values), most), len(values) - 1, int(np.argmin(values))})
        rows = [[names[t], t, f"{values[t]:.6g}"] for t in shown]
        yield Table(
            _caption("Loss along the path", results, name, shown, run),
            ["checkpoint", "number", "loss"],
            rows,
            shown.index(int(np.argmin(values))),
        )


def loss_on_plane(results: dict[str, Any], every: int = 1) -> Table:
    """List the loss on the plane, or on each ``every``-th point of the grid: up is up."""
    grid = results["loss"]["plane"]
    rows = [
        [f"{y:.3g}", *("-" if v is None else f"{v:.4g}" for v in values[::every])]
        for y, values in list(zip(grid["y"], grid["loss"], strict=True))[::-every]
    ]
    columns = ["up / along", *(f"{x:.3g}" for x in grid["x"][::every])]
    return Table("Loss on the plane: direction 1 along, direction 2 up", columns, rows)


def layers(results: dict[str, Any]) -> Table:
    """List the layers by the length of their path."""
    both = named_runs(results)
    lengths = [np.sum(run["layers"]["steps"], axis=1) for run in both.values()]
    first = results["layers"]
    order = np.argsort(-lengths[0], kind="stable")[:_MOST_LAYERS]
    rows = [
        [
            first["names"][i],
            f"{first['numel'][i]:,}",
            *(f"{length[i]:.4g}" for length in lengths),
            *(
                f"{np.linalg.norm(run['layers']['steps'][i]) ** 2 / _squares(run) * 100:.1f} %"
                for run in both.values()
            ),
        ]
        for i in order
    ]
    of = [f": {name}" if len(both) > 1 else "" for name in both]
    columns = ["layer", "numbers", *(f"length of its path{run}" for run in of)]
    columns += [f"share of all steps, squared{run}" for run in of]
    count = len(first["names"])
    which = f"The {len(order)} of {count} layers" if len(order) < count else "Layers"
    return Table(f"{which} by how far they moved", columns, rows)


def _squares(run: dict[str, Any]) -> float:
    return float(np.square(run["layers"]["steps"]).sum()) or 1.0


def _some(count: int, most: int) -> list[int]:
    return list(range(0, count, -(-count // most)))


def _caption(
    what: str, results: dict[str, Any], name: str, shown: list[int], run: dict[str, Any]
) -> str:
    count = len(run["checkpoints"])
    which = f", {len(shown)} of {count}" if len(shown) < count else ""
    return f"{what}{f' of {name}' if 'other' in results else ''}{which}"
