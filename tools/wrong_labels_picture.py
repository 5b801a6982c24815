"""Draw docs/wrong_labels.svg, the README's picture, from results that are committed."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "experiments" / "results.json"
PICTURE = ROOT / "docs" / "wrong_labels.svg"
LEFT, RIGHT, TOP, BOTTOM = 52, 584, 58, 286  # of the plot
PASSES, LOWEST, HIGHEST = 40, 0.4, 1.0
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 336" width="620" height="336" role="img"
     aria-label="Validation accuracy against passes over the data, 40 % of the labels wrong: \
SGD rises to {best:.0%} and falls to {last:.0%}; P-BFGS in 10 dimensions stays at {ours:.0%}">
  <style>
    .page {{ fill: #ffffff }} .grid {{ stroke: #d5dae1 }}
    text {{ font: 14px -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #3c4652 }}
    .title {{ font-weight: 600; fill: #1f2933 }}
    .line {{ fill: none; stroke-width: 2.5 }} .band {{ opacity: .18 }}
    .sgd {{ stroke: #b3261e }} .ours {{ stroke: #0b5cad }}
    .sgd-fill {{ fill: #b3261e }} .ours-fill {{ fill: #0b5cad }}
    @media (prefers-color-scheme: dark) {{
      .page {{ fill: #0d1117 }} .grid {{ stroke: #333c48 }}
      text {{ fill: #b6c2cf }} .title {{ fill: #e6edf3 }}
      .sgd {{ stroke: #ff8a80 }} .ours {{ stroke: #79b8ff }}
      .sgd-fill {{ fill: #ff8a80 }} .ours-fill {{ fill: #79b8ff }}
    }}
  </style>
  <rect class="page" width="620" height="336" rx="8"/>
  <text class="title" x="16" y="26">40 % of the training labels are wrong: accuracy</text>
  <text x="16" y="45">LeNet, 5,000 MNIST digits; validation part; mean and range of 5 seeds</text>
"""


def x(passes: float) -> str:
    return f"{LEFT + (RIGHT - LEFT) * passes / PASSES:.1f}"


def y(accuracy: float) -> str:
    return f"{BOTTOM - (BOTTOM - TOP) * (accuracy - LOWEST) / (HIGHEST - LOWEST):.1f}"


def curves(method: str, before: int) -> list[tuple[float, list[float]]]:
    """Every whole number of passes, with the last accuracy of each seed up to there."""
    runs = [
        run["curve"]
        for run in json.loads(RESULTS.read_text())["runs"]
        if (run["experiment"], run["method"], run["noise"]) == ("noise", method, 0.4)
    ]
    most = round(max(curve[-1][0] for curve in runs))
    return [
        (before + passes, [[a for p, a in curve if p <= passes + 0.5][-1] for curve in runs])
        for passes in range(1 if before else 0, most + 1)
    ]


def draw() -> str:
    sgd, ours = curves("sgd", 0), curves("pbfgs", 4)
    means = [mean(accuracies) for _, accuracies in sgd]
    parts = [HEAD.format(best=max(means), last=means[-1], ours=mean(ours[-1][1]))]
    for percent in range(40, 101, 20):
        level = y(percent / 100)
        parts.append(f'  <path class="grid" d="M{LEFT} {level}H{RIGHT}"/>')
        parts.append(
            f'  <text x="{LEFT - 6}" y="{level}" text-anchor="end" dy="5">{percent}</text>'
        )
    for passes in range(0, PASSES + 1, 10):
        parts.append(f'  <text x="{x(passes)}" y="306" text-anchor="middle">{passes}</text>')
    parts.append(f'  <text x="{RIGHT}" y="326" text-anchor="end">passes over the data</text>')
    for name, curve in (("sgd", sgd), ("ours", ours)):
        above = [f"{x(p)} {y(min(max(a), 1))}" for p, a in curve if min(a) > LOWEST]
        below = [f"{x(p)} {y(min(a))}" for p, a in reversed(curve) if min(a) > LOWEST]
        parts.append(f'  <path class="band {name}-fill" d="M{"L".join(above + below)}Z"/>')
        line = "L".join(f"{x(p)} {y(mean(a))}" for p, a in curve if mean(a) > LOWEST)
        parts.append(f'  <path class="line {name}" d="M{line}"/>')
    parts.append(f'  <text class="ours-fill" x="{x(24.5)}" y="{y(0.925)}" dy="5">')
    parts.append("    P-BFGS, 10 numbers</text>")
    parts.append(f'  <text class="sgd-fill" x="{x(20)}" y="{y(0.5)}">SGD, 61,706 parameters</text>')
    parts.append(f'  <text x="{x(5)}" y="{y(0.45)}">4 passes of SGD are recorded</text>')
    parts.append(f'  <path class="grid" d="M{x(4)} {TOP}V{BOTTOM}" stroke-dasharray="4 4"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw())
