"""PBFGS against SciPy and torch on deterministic functions: evaluations and minima, as a table.

``python -m benchmarks.experiments.peers``.
"""

from __future__ import annotations

from statistics import median

import torch
from more_garbow_hillstrom import PROBLEMS
from peers import (
    SPECTRA,
    Result,
    pbfgs,
    quadratic,
    scipy_bfgs,
    scipy_trust_exact,
    torch_lbfgs,
)

MINIMISERS = {
    "PBFGS": pbfgs,
    "SciPy BFGS": scipy_bfgs,
    "torch LBFGS": torch_lbfgs,
    "SciPy trust-exact": scipy_trust_exact,
}


def cell(result: Result, best: float) -> str:
    """Evaluations; in brackets if the gradient stayed above the tolerance, * at a higher value."""
    shown = str(result.evaluations) if result.converged else f"({result.evaluations})"
    return shown + ("" if result.value <= best + 1e-6 + 1e-4 * abs(best) else "*")


def main() -> None:
    torch.set_num_threads(1)
    columns = [*MINIMISERS]
    print(f"| problem | d | lowest value | {' | '.join(columns)} |")
    print(f"|---|---|---|{'---|' * len(columns)}")
    ratios: dict[str, list[float]] = {name: [] for name in columns}
    quadratics = [quadratic(spectrum, dim, 0) for spectrum in SPECTRA for dim in (10, 40, 100)]
    for problem in [*PROBLEMS, *quadratics]:
        results = {name: minimise(problem) for name, minimise in MINIMISERS.items()}
        best = min(result.value for result in results.values())
        cells = " | ".join(cell(result, best) for result in results.values())
        print(f"| {problem.name} | {len(problem.start)} | {best:.6g} | {cells} |", flush=True)
        scipy = results["SciPy BFGS"]
        for name, result in results.items():
            if scipy.converged and result.converged:
                ratios[name].append(result.evaluations / scipy.evaluations)
    medians = " | ".join(f"{median(ratios[name]):.2f}" for name in columns)
    print(f"| median ratio to SciPy BFGS | | | {medians} |")


if __name__ == "__main__":
    main()
