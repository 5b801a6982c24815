"""The results of the demo in short: means over the seeds, and a sentence on what came out."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from ..reporting.html import percent
from .methods import NAMES


@dataclass(frozen=True)
class Row:
    """One method over all seeds, as the tables show it; spreads are sample standard deviations."""

    method: str
    test_accuracy: float
    spread: float | None  # None with a single seed
    passes: float
    sampling_passes: float
    seconds: float
    explained_variance: float | None
    dim: int | None  # trained variables; None: all of them

    @property
    def accuracy(self) -> str:
        """The test accuracy with its spread, as text."""
        return percent(self.test_accuracy, self.spread)

    @property
    def all_passes(self) -> float:
        """Its own passes and those of the recorded SGD."""
        return self.sampling_passes + self.passes

    def cells(self, numel: int) -> list[str]:
        """Format the row of the result table, whose network has ``numel`` parameters."""
        return [
            NAMES[self.method],
            self.accuracy,
            f"{self.passes:.1f}",
            f"{self.sampling_passes:.1f}" if self.sampling_passes else "-",
            f"{self.seconds:.1f}",
            f"{numel if self.dim is None else self.dim:,}",
            "-" if self.explained_variance is None else f"{100 * self.explained_variance:.3f} %",
        ]


def summarize(results: dict[str, Any]) -> list[Row]:
    """Average the runs of each method over the seeds, in the order of `methods.NAMES`."""
    rows = []
    for method in NAMES:
        runs = [run for run in results["runs"] if run["method"] == method]

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.fmean(run[key] for run in runs)

        accuracies = [run["test_accuracy"] for run in runs]
        explained = runs[0]["explained_variance"]
        rows.append(
            Row(
                method,
                statistics.fmean(accuracies),
                statistics.stdev(accuracies) if len(runs) > 1 else None,
                mean("data_passes"),
                mean("sampling_passes"),
                mean("seconds"),
                None if explained is None else mean("explained_variance"),
                None if method.startswith("sgd") else runs[0]["dim"],
            )
        )
    return rows


def verdict(results: dict[str, Any]) -> str:
    """Say in one sentence what came out, whatever it is."""
    rows = {row.method: row for row in summarize(results)}
    sgd, pbfgs, random = rows["sgd"], rows["pbfgs"], rows["random"]

    def against(other: Row) -> str:
        gap = 100 * (pbfgs.test_accuracy - other.test_accuracy)
        if abs(gap) < 0.005:
            return "the same as"
        return f"{abs(gap):.2f} points {'more' if gap > 0 else 'less'} than"

    return (
        f"P-BFGS on {pbfgs.dim} variables came to {pbfgs.accuracy} in "
        f"{pbfgs.all_passes:.1f} passes ({pbfgs.sampling_passes:.1f} of SGD, "
        f"recorded, and {pbfgs.passes:.1f} of its own), {against(sgd)} SGD on all "
        f"{results['runs'][0]['numel']:,} in {sgd.passes:.1f} "
        f"({sgd.accuracy}), and {against(random)} P-BFGS in a random "
        "subspace of the same dimension."
    )


def footnote(results: dict[str, Any]) -> str:
    """Say what the columns of the result table mean."""
    seeds = len(results["config"]["seeds"])
    split = results["config"]["split"]
    spread = (
        f"Mean ± standard deviation over {seeds} seeds. "
        if seeds > 1
        else "One seed: no spread; --seeds 3 gives one. "
    )
    return (
        f"{spread}Test: {split['test']} digits set aside before training, read once at the end. "
        f"Passes: training images that went through the network, for gradients, for trials of the "
        f"line search and, in the subspaces, once over all for the batch-norm statistics, divided "
        f"by {split['train']:,}. Sampling passes come on top: the recorded epochs of SGD that the "
        f"subspace was made from. Variance kept: the share of the variance of the recorded "
        f"weights that lies in the subspace."
    )
