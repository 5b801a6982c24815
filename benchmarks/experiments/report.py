"""results.json, tables and plots of all runs in a store."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dldr_ext import build_info

from . import methods, networks, plots, settings, tune
from .cells import Store
from .overhead import FILE
from .plans import METHODS
from .statistics import Run, groups, mean_and_spread, paired

_CURVES = ("compare", "noise")  # experiments whose curves against passes are kept and drawn


def write(store: Store, folder: Path, tuned: Path = settings.TUNED) -> list[Path]:
    """Write results.json, tables.md and the plots of everything that has been run so far.

    Returns
    -------
    list of Path
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = collect(store, tuned)
    numbers, tables = folder / "results.json", folder / "tables.md"
    numbers.write_text(_dump(results))
    tables.write_text(markdown(results))
    return [numbers, tables, *plots.draw(results["runs"], folder)]


def collect(store: Store, tuned: Path) -> dict[str, Any]:
    """The content of results.json."""
    # Of runs with several settings, those with the newest ones: tables mix nothing.
    saved = store.all()
    used = {_group(one["cell"]): one["settings"] for one in saved}
    runs = []
    for one in saved:
        cell, result = one["cell"], dict(one["result"])
        if one["settings"] | {"dim": None} != used[_group(cell)] | {"dim": None}:
            continue
        if cell["experiment"] not in _CURVES:
            del result["curve"]
        runs.append(cell | result)
    runs.sort(key=lambda run: [str(run[key]) for key in ("data", "method", "dim", "noise", "seed")])
    order, kinds = list(METHODS), networks.NAMES
    runs.sort(key=lambda run: (order.index(run["experiment"]), kinds.index(run["network"])))
    return {
        "versions": {
            "dldr_ext": build_info()["version"],
            "cpu_capability": build_info()["cpu_capability"],
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        },
        "settings": used,
        "overhead": store.other(FILE),
        "tuned": tune.read(tuned),
        "runs": runs,
    }


def _group(cell: dict[str, Any]) -> str:
    return f"{cell['experiment']}/{cell['data']}/{cell['network']}"


def _dump(results: dict[str, Any]) -> str:
    """JSON with a run on each line."""
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)
    lines = ",\n".join("  " + json.dumps(run) for run in results["runs"])
    return f'{head[:-2]},\n "runs": [\n{lines}\n ]\n}}\n'


def markdown(results: dict[str, Any]) -> str:
    """All tables: mean ± standard deviation over the seeds."""
    parts = []
    for (experiment, data, network), runs in groups(
        results["runs"], "experiment", "data", "network"
    ).items():
        lines = _noise_table(runs) if experiment == "noise" else _table(runs)
        seeds = len({run["seed"] for run in runs})
        title = f"### {experiment}: {data}, {network}, n = {runs[0]['numel']:,}, seeds: {seeds}"
        parts.append("\n".join([title, "", *lines]))
    if results["overhead"] is not None:
        parts.append(_overhead(results["overhead"]))
    return "\n\n".join(parts) + "\n"


def _ordered(runs: list[Run]) -> Iterator[tuple[str, int | None, list[Run]]]:
    found = groups(runs, "method", "dim")
    order = list(methods.NAMES)
    for method, dim in sorted(found, key=lambda k: (order.index(k[0]), k[1] or 0)):
        yield method, dim, found[method, dim]


def _show(values: list[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
    mean, spread = mean_and_spread(values)
    return f"{form(mean)} ± {form(spread)}" if len(values) > 1 else form(mean)


def _table(runs: list[Run]) -> list[str]:
    first = groups(runs, "method")
    base = first.get(("sgd",)) or first.get(("trained",)) or []
    lines = [
        "| method | d | test accuracy, % | against the first row | test loss | passes | before "
        "| processor s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, dim, rows in _ordered(runs):
        against = "" if rows[0] in base else _show(paired(rows, base))
        lines.append(
            f"| {methods.NAMES[method]} | {'' if dim is None else dim} "
            f"| {_show([100 * run['test_accuracy'] for run in rows])} | {against} "
            f"| {_show([run['test_loss'] for run in rows], '{:.3f}'.format)} "
            f"| {statistics.fmean(run['passes'] for run in rows):.1f} "
            f"| {statistics.fmean(run['sampling_passes'] for run in rows):.0f} "
            f"| {statistics.fmean(run['cpu_seconds'] for run in rows):.1f} |"
        )
    return lines


def _noise_table(runs: list[Run]) -> list[str]:
    lines = [
        "| wrong labels | method | last, % | best epoch, % | last against SGD's last "
        "| last against SGD's best | passes | before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (noise,), level in groups(sorted(runs, key=lambda r: r["noise"]), "noise").items():
        base = [run for run in level if run["method"] == "sgd"]
        best = [run | {"test_accuracy": run["early_test_accuracy"]} for run in base]
        for method, dim, rows in _ordered(level):
            own, name = method == "sgd", methods.NAMES[method]
            name += "" if dim is None else f", d = {dim}"
            lines.append(
                f"| {100 * noise:.0f} % | {name} "
                f"| {_show([100 * run['test_accuracy'] for run in rows])} "
                f"| {_show([100 * run['early_test_accuracy'] for run in rows])} "
                f"| {'' if own else _show(paired(rows, base))} | {_show(paired(rows, best))} "
                f"| {statistics.fmean(run['passes'] for run in rows):.1f} "
                f"| {statistics.fmean(run['sampling_passes'] for run in rows):.0f} |"
            )
    return lines


def _overhead(found: dict[str, Any]) -> str:
    low, middle, high = statistics.quantiles(found["ratios"], n=4)
    return "\n".join(
        [
            f"### overhead: {found['network']}, n = {found['numel']:,}, batch {found['batch']} of "
            f"{found['size']} x {found['size']}, d = {found['dim']}, {found['threads']} thread",
            "",
            f"A step without its closure calls takes {100 * middle:.2f} % "
            f"[{100 * low:.2f}, {100 * high:.2f}] of a forward + backward pass (median and "
            f"quartiles of {len(found['ratios'])} rounds in one process).",
        ]
    )
