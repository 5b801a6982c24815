"""The results as a table in Markdown."""

from __future__ import annotations

from dldr_ext.performance.timing import Spread


def markdown(about: dict, rows: list[dict]) -> str:
    head = (
        f"{about['device']}, driver {about.get('driver')}, torch {about['torch']}, CUDA "
        f"{about['cuda']}, commit {about['commit']}; n = {about['n']:.3g}, d = {about['d']}.\n"
    )
    lines = [head, "Medians [quartiles]; in brackets behind them what is aimed at.\n"]
    lines += ["| case | % of the ceiling | against plain torch | time |", "|---|---|---|---|"]
    for row in rows:
        if row["case"] == "ceilings":
            speeds = (f"{name} {value / 1e12:.3g}" for name, value in row["values"].items())
            lines.insert(1, f"Ceilings in TB/s (multiply: TFLOP/s): {', '.join(speeds)}.\n")
        elif "failed" in row or "not_run" in row:
            lines.append(f"| {row['case']} | {row.get('failed') or row['not_run']} | | |")
        else:
            kinds = [kind for kind in ("eager", "graph") if kind in row]
            for kind in kinds or [""]:
                lines.append(_line(row, row[kind] if kind else row, kind))
    return "\n".join(lines) + "\n"


def _line(row: dict, measured: dict, kind: str) -> str:
    ceiling = ""
    if "of_ceiling" in measured:
        spread = Spread(**{k: 100 * v for k, v in measured["of_ceiling"].items()})
        wanted = row.get("wanted_of_ceiling")
        of = "" if row["ceiling"] == "read" else f" of {row['ceiling']}"
        ceiling = f"{spread.median:.0f} [{spread.low:.0f}, {spread.high:.0f}]{of}"
        ceiling += f" ({100 * wanted:.0f})" if wanted else ""
    against = []
    for name, values in measured.get("against", {}).items():
        wanted = row.get("wanted_against", {}).get(name)
        if kind == "graph" and wanted is not None:
            wanted = 1.3
        shown = f"{Spread(**values).show('x')}" + (f" ({wanted:g}x)" if wanted else "")
        against.append(f"{shown} of {name}")
    seconds = measured["seconds"]["median"]
    time = f"{1e3 * seconds:.3g} ms" if seconds > 1e-4 else f"{1e6 * seconds:.3g} us"
    name = row["case"] + (f", {kind}" if kind else "")
    return f"| {name} | {ceiling} | {'; '.join(against)} | {time} |"
