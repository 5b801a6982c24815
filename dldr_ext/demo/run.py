"""The whole experiment: all methods for all seeds."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch

from .. import Subspace, build_info
from ..ops.library import device_problem
from ..pca.random_walk import SHORTEST
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

    Raises
    ------
    ValueError
        Naming the option, what was expected and what came.
    """

    data: str = "mnist5k"
    dim: int | str = 40  # or "auto"
    seeds: int = 1
    epochs: int | None = None  # None: the recipe's
    threads: int | None = None  # None: torch's own choice
    device: str = "cpu"
    dtype: str = "float32"  # of the stored basis

    def __post_init__(self) -> None:
        if self.data not in SIZES:
            raise ValueError(f"data: expected {' or '.join(SIZES)}, got {self.data!r}")
        _check_device(self.device)
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
        """Directions that there has to be room for."""
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
    """Train everything.

    Returns
    -------
    results : dict, as results.json holds it
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
    }
    plane: Landscape | None = None
    for seed in range(config.seeds):

        def report(method: str, done: float, seed: int = seed) -> None:
            progress(seed, method, done)

        task = methods.Task(data, config.recipe, seed, config.snapshots, report)
        sgd, half, trajectory = methods.sgd(task)
        subspace = methods.stored_as(trajectory.subspace(dim=config.dim), config.dtype)
        outcomes = [
            sgd,
            half,
            methods.psgd(task, subspace),
            methods.pbfgs(task, subspace),
            methods.random(task, subspace.dim, config.dtype),
        ]
        ratio = trajectory.explained_variance_ratio()
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
                partial(report, "landscape"),
            )
        results["explained_variance_ratio_by_seed"].append(ratio.tolist())
        explained = float(ratio[: subspace.dim].sum())
        results["runs"] += [
            _record(outcome, task, config, subspace, explained) for outcome in outcomes
        ]
    results["explained_variance_ratio"] = results["explained_variance_ratio_by_seed"][0]
    return results, plane


def _record(
    outcome: methods.Outcome,
    task: methods.Task,
    config: Config,
    subspace: Subspace,
    explained: float,
) -> dict[str, Any]:
    """One entry of "runs". Here, after all training, the test part is read: once per model."""
    test = task.data.test
    in_dldr = outcome.method in ("psgd", "pbfgs")
    return {
        "method": outcome.method,
        "seed": task.seed,
        "dim": subspace.dim,
        "numel": subspace.numel,
        "test_accuracy": accuracy(outcome.model, test.images, test.labels),
        "data_passes": outcome.passes,
        "seconds": round(outcome.seconds, 3),
        # What had to be read before: the sampled stretch of SGD that the subspace came from.
        "sampling_passes": config.recipe.epochs / 2 if in_dldr else 0.0,
        "explained_variance": explained if in_dldr else None,
        "validation_accuracy": outcome.curve[-1][1],
        "validation_curve": [list(point) for point in outcome.curve],
    }


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= there:
            raise ValueError(f"device: expected one of the {there} GPUs of torch, got {name!r}")
        problem = device_problem(device)
        if problem is not None:
            raise ValueError(f"device: {problem}")


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
    found: dict[str, Any] = {"dldr_ext": info["version"], "cpu_capability": info["cpu_capability"]}
    found["torch"] = torch.__version__  # which build, too: its metadata may not say
    found["python"] = platform.python_version()
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
