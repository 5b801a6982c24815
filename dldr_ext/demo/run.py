"""The whole experiment: all methods for all seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch

from .. import Subspace, build_info
from ..ops.library import usable_device
from ..pca.random_walk import SHORTEST
from ..reporting import html
from . import methods
from .data import DESCRIPTIONS, SIZES, Dataset, load
from .landscape import Landscape, landscape
from .model import accuracy
from .recipe import RECIPES, Recipe

#: Called with seed, method and the share of it that is done, 0 to 1.
Progress = Callable[[int, str, float], None]
_PACKAGES = ("numpy", "matplotlib", "mlxtend", "scikit-learn")


@dataclass(frozen=True)
class Config:
    """What to run.

    Parameters
    ----------
    data : str
        "mnist5k" or "digits".
    dim : int or "auto"
        Of the subspace.
    seeds : int
        Runs, with seeds 0, 1, ...
    epochs : int, optional
        Of the full SGD run. Default: the recipe's.
    threads : int, optional
        Of the CPU. Default: torch's own choice.
    device : str
        "cpu", "cuda" or "cuda:N".
    dtype : str
        Of the stored basis: one of `methods.DTYPES`.

    Raises
    ------
    ValueError
        Naming the option, what was expected and what came.
    """

    data: str = "mnist5k"
    dim: int | str = 40
    seeds: int = 1
    epochs: int | None = None
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.data not in SIZES:
            raise ValueError(f"data: expected {' or '.join(SIZES)}, got {self.data!r}")
        try:
            usable_device(self.device)
        except ValueError as error:
            raise ValueError(f"device: {error}") from None
        if self.dtype not in methods.DTYPES:
            raise ValueError(f"dtype: expected one of {list(methods.DTYPES)}, got {self.dtype!r}")
        for name, value in (
            ("dim", self.least),
            ("seeds", self.seeds),
            ("epochs", 1 if self.epochs is None else self.epochs),
            ("threads", 1 if self.threads is None else self.threads),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.least > self.first_half:
            raise ValueError(
                f"dim: expected at most {self.first_half}, got {self.dim}: the first half of "
                f"{self.recipe.epochs} epochs has {self.first_half} steps, and each gives at most "
                "one snapshot; more epochs allow more"
            )

    @property
    def least(self) -> int:
        """The fewest directions that the snapshots must allow."""
        if not isinstance(self.dim, str):
            return self.dim
        if self.dim != "auto":
            raise ValueError(f"dim: expected a number or 'auto', got {self.dim!r}")
        return SHORTEST

    @property
    def recipe(self) -> Recipe:
        """Hyperparameters."""
        recipe = RECIPES[self.data]
        return recipe if self.epochs is None else replace(recipe, epochs=self.epochs)

    @property
    def first_half(self) -> int:
        """Steps of SGD in the first half of the run."""
        return self.recipe.first_half(SIZES[self.data][0])

    @property
    def snapshots(self) -> int:
        """Snapshots after the initial weights: as the recipe has it, at least two a direction."""
        wanted = self.recipe.snapshots_per_epoch * self.recipe.epochs // 2
        return min(self.first_half, max(wanted, 2 * self.least))


def run(config: Config, progress: Progress) -> tuple[dict[str, Any], Landscape | None]:
    """Train by all methods for all seeds.

    Parameters
    ----------
    config : Config
    progress : callable
        Called with the seed, the method and the share of it that is done, 0 to 1.

    Returns
    -------
    results : dict
        As results.json holds it.
    plane : Landscape or None
        Of the first seed; None in one dimension.
    """
    before = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        return _run(config, progress)
    finally:
        torch.set_num_threads(before)


def _run(config: Config, progress: Progress) -> tuple[dict[str, Any], Landscape | None]:
    data = load(config.data).to(torch.device(config.device))
    results: dict[str, Any] = {
        "config": _describe(config),
        "versions": _versions(),
        "explained_variance_ratio": [],
        "explained_variance_ratio_by_seed": [],
        "runs": [],
        "interrupted": False,
    }
    plane: Landscape | None = None
    try:
        for seed in range(config.seeds):
            plane = _run_seed(config, data, seed, results, progress) or plane
    except KeyboardInterrupt:
        finished = len(results["explained_variance_ratio_by_seed"])
        if not finished:
            raise
        results["interrupted"] = True
        results["config"]["seeds"] = list(range(finished))
    results["explained_variance_ratio"] = results["explained_variance_ratio_by_seed"][0]
    return results, plane


def _run_seed(
    config: Config, data: Dataset, seed: int, results: dict[str, Any], progress: Progress
) -> Landscape | None:
    """Train by all methods and, once all are done, add them to the results."""
    task = methods.Task(data, config.recipe, seed, config.snapshots, partial(progress, seed))
    sgd, half, trajectory = methods.sgd(task)
    subspace = methods.stored_as(trajectory.subspace(dim=config.dim), config.dtype)
    outcomes = [
        sgd,
        half,
        methods.psgd(task, subspace),
        methods.pbfgs(task, subspace),
        methods.one_pass(task, subspace),
        methods.random(task, subspace.dim, config.dtype),
    ]
    ratio = trajectory.explained_variance_ratio()
    plane: Landscape | None = None
    if seed == 0 and subspace.dim > 1:
        named = {outcome.method: outcome for outcome in outcomes}
        decay = config.recipe.weight_decay
        plane = landscape(
            subspace,
            trajectory,
            named,
            task.model(),
            data.train,
            decay,
            partial(progress, seed, "landscape"),
        )
    explained = float(ratio[: subspace.dim].sum())
    runs = [_record(outcome, task, config, subspace, explained) for outcome in outcomes]
    results["runs"] += runs
    results["explained_variance_ratio_by_seed"].append(ratio.tolist())
    return plane


def _record(
    outcome: methods.Outcome,
    task: methods.Task,
    config: Config,
    subspace: Subspace,
    explained: float,
) -> dict[str, Any]:
    """Return one entry of "runs". Only here, after all training, is the test part read: once."""
    test = task.data.test
    in_dldr = outcome.method in ("psgd", "pbfgs", "one_pass")
    return {
        "method": outcome.method,
        "seed": task.seed,
        "dim": subspace.dim,
        "numel": subspace.numel,
        "test_accuracy": accuracy(outcome.model, test.images, test.labels),
        "data_passes": outcome.passes,
        "seconds": round(outcome.seconds, 3),
        # What had to be read before: the recorded half of SGD that the subspace came from.
        "sampling_passes": config.recipe.epochs / 2 if in_dldr else 0.0,
        "explained_variance": explained if in_dldr else None,
        "validation_accuracy": outcome.curve[-1][1],
        "validation_curve": [list(point) for point in outcome.curve],
    }


def _device_name(name: str) -> str:
    return torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else "cpu"


def _describe(config: Config) -> dict[str, Any]:
    sizes = dict(zip(("train", "validation", "test"), SIZES[config.data], strict=True))
    recipe = asdict(config.recipe) | {"passes_in_subspace": config.recipe.budget}
    return {
        "data": config.data,
        "description": DESCRIPTIONS[config.data],
        "split": sizes,
        "split_seed": Dataset.split_seed,
        "dim": config.dim,
        "seeds": list(range(config.seeds)),
        "snapshots": config.snapshots + 1,
        "threads": torch.get_num_threads(),
        "device": _device_name(config.device),
        "dtype": config.dtype,
        **recipe,
    }


def _versions() -> dict[str, Any]:
    info = build_info()
    versions = html.versions(info["version"], cpu_capability=info["cpu_capability"])
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
