"""The loss on the plane of the first two directions, and the paths of training in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import Subspace, Trajectory
from .data import Part
from .methods import Outcome, objective

_GRID = 19  # points along each side
_IMAGES = 400  # training images that the loss is taken over


@dataclass
class Landscape:
    """The loss at w0 + P theta, where theta[0] and theta[1] vary and the rest stays.

    Attributes
    ----------
    x, y : list of float, length G
        The grid's coordinates theta[0] and theta[1], ascending.
    loss : list of lists of float, G x G
        Row i belongs to y[i].
    sampled : list of (float, float)
        The path of the recorded first half of SGD, projected on the plane.
    sgd_end : (float, float)
        Where the full SGD run ended, projected.
    paths : dict of str to list of (float, float)
        The path of each method that trained in the subspace.
    """

    x: list[float]
    y: list[float]
    loss: list[list[float]]
    sampled: list[tuple[float, float]]
    sgd_end: tuple[float, float]
    paths: dict[str, list[tuple[float, float]]]


@torch.no_grad()
def landscape(
    subspace: Subspace,
    trajectory: Trajectory,
    outcomes: dict[str, Outcome],
    model: nn.Module,
    train: Part,
    weight_decay: float,
    progress: Callable[[float], None],
) -> Landscape:
    """Evaluate the training objective on a grid that holds all paths.

    The plane goes through the end of P-BFGS, so its loss there is the true one; batch norm uses
    the statistics of the evaluated images, as in training.

    Parameters
    ----------
    subspace : Subspace
        Of two or more dimensions; its origin is the trajectory's anchor.
    trajectory : Trajectory
        The recorded first half of SGD.
    outcomes : dict of str to Outcome
        By method: "sgd", "psgd" and "pbfgs" at least.
    model : nn.Module
        Its weights are overwritten.
    train : Part
    weight_decay : float
    progress : callable
        Called with the share that is done.

    Returns
    -------
    Landscape
    """
    progress(0.0)
    with torch.no_grad():
        end = subspace.coordinates(outcomes["pbfgs"].model.parameters())
        sgd = subspace.coordinates(outcomes["sgd"].model.parameters())
    plane = torch.stack([subspace.direction(i) for i in (0, 1)], 1)  # float32
    sampled = _pairs(trajectory.snapshots[:] @ plane)
    paths = {name: outcomes[name].path for name in ("psgd", "pbfgs")}
    shown = [*sampled, *_pairs(sgd[None]), *(point for path in paths.values() for point in path)]
    x, y = (_axis([point[i] for point in shown]) for i in (0, 1))
    images, labels = train.images[:_IMAGES], train.labels[:_IMAGES]
    parameters = list(model.parameters())
    model.train()
    loss = []
    for b in y:
        row = []
        for a in x:
            theta = end.clone()
            theta[0], theta[1] = a, b
            subspace.reconstruct_(parameters, theta)
            row.append(float(objective(model, images, labels, weight_decay)))
        loss.append(row)
        progress(len(loss) / len(y))
    return Landscape(x, y, loss, sampled, _pairs(sgd[None])[0], paths)


def _pairs(rows: Tensor) -> list[tuple[float, float]]:
    return [(x, y) for x, y in rows[:, :2].tolist()]


def _axis(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = 0.15 * (high - low) or 1.0
    return torch.linspace(low - margin, high + margin, _GRID, dtype=torch.float64).tolist()
