"""results.json, tables, plots and a report of all runs in a store."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dldr_ext import build_info
from dldr_ext.reporting import html
from dldr_ext.reporting.figures import save_figures
from dldr_ext.reporting.html import Table

from . import methods, networks, plots, settings, tune
from .cells import Store
from .overhead import FILE
from .plans import METHODS
from .statistics import Run, groups, mean_and_spread, paired

_CURVES = ("compare", "noise")  # experiments whose curves against passes are kept and drawn


def write(store: Store, folder: Path, tuned: Path = settings.TUNED) -> list[Path]:
    """Write everything that has been run so far.

    Returns
    -------
    list of Path
        results.json, tables.md, report.html and the plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = collect(store, tuned)
    numbers, text = folder / "results.json", folder / "tables.md"
    numbers.write_text(_dump(results))
    found = tables(results)
    overhead = "" if results["overhead"] is None else _overhead(results["overhead"])
    text.write_text(markdown(found) + overhead)
    drawings = plots.drawings(results["runs"])
    images = save_figures(drawings, folder)
    page = html.write(
        folder / "report.html",
        Path(__file__).with_suffix(".html"),
        verdict=_verdict(results["runs"]),
        cards=[],
        drawings=drawings,
        tables=found,
        overhead=overhead.partition("\n\n")[2],
        settings=results["settings"],
        versions=results["versions"],
        files=[path.name for path in (numbers, text, *images)],
    )
    return [numbers, text, page, *images]


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
        "versions": html.versions(
            build_info()["version"], cpu_capability=build_info()["cpu_capability"]
        ),
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


def tables(results: dict[str, Any]) -> list[Table]:
    """All tables: mean ± standard deviation over the seeds."""
    found = []
    for (experiment, data, network), runs in groups(
        results["runs"], "experiment", "data", "network"
    ).items():
        seeds = len({run["seed"] for run in runs})
        title = f"{experiment}: {data}, {network}, n = {runs[0]['numel']:,}, seeds: {seeds}"
        columns, rows = _noise_table(runs) if experiment == "noise" else _table(runs)
        found.append(Table(title, columns, rows))
    return found


def markdown(found: list[Table]) -> str:
    """The same tables as Markdown."""
    parts = []
    for table in found:
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        rows = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
        rows[1] = rows[1].replace(" ", "")
        parts.append("\n".join([f"### {table.caption}", "", *rows]))
    return "\n\n".join(parts) + "\n"


def _verdict(runs: list[Run]) -> str:
    """What there is, and what it took."""
    kinds = list(dict.fromkeys(run["experiment"] for run in runs))
    passes = sum(run["passes"] + run["sampling_passes"] for run in runs)
    return (
        f"{len(runs)} runs: {', '.join(kinds)}. Each method is charged with every pass over the "
        f"training part, those of its sampling too: {passes:,.0f} in all."
    )


def _ordered(runs: list[Run]) -> Iterator[tuple[str, int | None, list[Run]]]:
    found = groups(runs, "method", "dim")
    order = list(methods.NAMES)
    for method, dim in sorted(found, key=lambda k: (order.index(k[0]), k[1] or 0)):
        yield method, dim, found[method, dim]


def _show(values: list[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
    mean, spread = mean_and_spread(values)
    return f"{form(mean)} ± {form(spread)}" if len(values) > 1 else form(mean)


def _table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    first = groups(runs, "method")
    base = first.get(("sgd",)) or first.get(("trained",)) or []
    columns = [
        "method",
        "d",
        "test accuracy, %",
        "against the first row",
        "test loss",
        "passes",
        "before",
        "processor s",
    ]
    rows = [
        [
            methods.NAMES[method],
            "" if dim is None else str(dim),
            _show([100 * run["test_accuracy"] for run in found]),
            "" if found[0] in base else _show(paired(found, base)),
            _show([run["test_loss"] for run in found], "{:.3f}".format),
            f"{statistics.fmean(run['passes'] for run in found):.1f}",
            f"{statistics.fmean(run['sampling_passes'] for run in found):.0f}",
            f"{statistics.fmean(run['cpu_seconds'] for run in found):.1f}",
        ]
        for method, dim, found in _ordered(runs)
    ]
    return columns, rows


def _noise_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    columns = [
        "wrong labels",
        "method",
        "last, %",
        "best epoch, %",
        "last against SGD's last",
        "last against SGD's best",
        "passes",
        "before",
    ]
    rows = []
    for (noise,), level in groups(sorted(runs, key=lambda r: r["noise"]), "noise").items():
        base = [run for run in level if run["method"] == "sgd"]
        best = [run | {"test_accuracy": run["early_test_accuracy"]} for run in base]
        for method, dim, found in _ordered(level):
            rows.append(
                [
                    f"{100 * noise:.0f} %",
                    methods.NAMES[method] + ("" if dim is None else f", d = {dim}"),
                    _show([100 * run["test_accuracy"] for run in found]),
                    _show([100 * run["early_test_accuracy"] for run in found]),
                    "" if method == "sgd" else _show(paired(found, base)),
                    _show(paired(found, best)),
                    f"{statistics.fmean(run['passes'] for run in found):.1f}",
                    f"{statistics.fmean(run['sampling_passes'] for run in found):.0f}",
                ]
            )
    return columns, rows


def _overhead(found: dict[str, Any]) -> str:
    low, middle, high = statistics.quantiles(found["ratios"], n=4)
    return "\n".join(
        [
            "",
            f"### overhead: {found['network']}, n = {found['numel']:,}, batch {found['batch']} of "
            f"{found['size']} x {found['size']}, d = {found['dim']}, {found['threads']} thread",
            "",
            f"A step without its closure calls takes {100 * middle:.2f} % "
            f"[{100 * low:.2f}, {100 * high:.2f}] of a forward + backward pass (median and "
            f"quartiles of {len(found['ratios'])} rounds in one process).",
            "",
        ]
    )
