"""The parts of an HTML report that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

#: How the reports look.
STYLE = """\
:root { --ink: #1d2430; --soft: #5b6675; --line: #e2e6eb; --mark: #0072b2; --paper: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .6rem 0; max-width: 46rem; }
.lead { color: var(--soft); }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.1rem; margin: 1rem 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0; }
.numbers .card { margin: 0; }
.numbers b { display: block; font-size: 1.6rem; line-height: 1.3; }
.numbers .best b { color: var(--mark); }
.numbers span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-size: .82rem; color: var(--soft); font-weight: 600; white-space: normal;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
tr.best td { font-weight: 600; color: var(--mark); }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .6rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 30rem) { th, td { padding: .45rem .5rem; font-size: .88rem; } }
.plain td, .plain th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
small { color: var(--soft); }
"""
# How a page begins, up to its cards with numbers.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
<div class="numbers">
$cards
</div>
"""
TAIL = """</main>
</body>
</html>
"""


def folded(summary: str, rows: str) -> str:
    """A table of two columns that is opened by a click."""
    return f"""<details><summary>{summary}</summary>
<div class="card scroll"><table class="plain"><tbody>
{rows}
</tbody></table></div>
</details>
"""


def percent(value: float, spread: float | None = None) -> str:
    """A share as the tables print it: two decimals, with the spread where there is one."""
    return f"{100 * value:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}") + " %"


def tds(texts: Iterable[str]) -> str:
    """The cells of a row."""
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def figure(image: Path, heading: str, caption: str) -> str:
    """A PNG file as part of the page."""
    data = base64.b64encode(image.read_bytes()).decode("ascii")
    return (
        f'<h2>{heading}</h2>\n<figure class="card"><img alt="{heading}" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def pairs(table: dict[str, Any]) -> str:
    """Rows of a name and a value."""
    return "\n".join(f"<tr>{tds([key, str(value)])}</tr>" for key, value in table.items())
