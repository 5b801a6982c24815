"""Averages of checkpoints: uniform and greedy soups, and the subspace of all averages.

Batch-norm statistics of an average are not the average of the statistics: re-estimate them with
``torch.optim.swa_utils.update_bn(loader, model)`` before a model is judged or used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..subspace.base import AffineSubspace
from ..subspace.dense import Subspace
from ..subspace.grouped import GroupedSubspace, group_slices
from ..tensors.parameters import named_parameters, type_name
from ..trajectory.trajectory import Trajectory

State = Mapping[str, Any]


class Soup(NamedTuple):
    """What `greedy_soup` found."""

    state_dict: dict[str, Any]
    members: list[int]  # indices of the checkpoints, in the order in which they came in
    score: float


def uniform_soup(checkpoints: Iterable[State] | Trajectory) -> dict[str, Any]:
    """The mean of checkpoints (Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482).

    Parameters
    ----------
    checkpoints : iterable of state dicts, or Trajectory
        With the same names and shapes. An iterator is read one at a time, so that
        ``uniform_soup(torch.load(path) for path in paths)`` holds one checkpoint and the sums. A
        trajectory, recorded with names, stands for the weights at its snapshots.

    Returns
    -------
    dict
        A state dict on the devices and in the dtypes of the first one; sums are float64. What is
        not floating-point (counts of batches) is that of the last one.

    Raises
    ------
    ValueError
        No checkpoint; one with other names or shapes.
    """
    mean = _Mean()
    for state in _states(checkpoints):
        mean.add(state)
    return mean.state_dict()


def greedy_soup(
    checkpoints: Sequence[State] | Trajectory, score: Callable[[dict[str, Any]], float]
) -> Soup:
    """The greedy soup of the same paper: checkpoints from the best on, as long as they help.

    Parameters
    ----------
    checkpoints : sequence of state dicts, or Trajectory
        As for `uniform_soup`. A sequence may read a checkpoint each time it is asked for it.
    score : callable
        Of a state dict, higher is better, on data held out from training: say, loads it into a
        model, re-estimates batch-norm statistics (`update_bn`) and returns the accuracy. Called
        2 T - 1 times for T checkpoints.

    Returns
    -------
    Soup
        The mean of those that were kept. Its score is at least that of the best checkpoint.

    Raises
    ------
    ValueError
        As for `uniform_soup`; a score that is NaN.
    """
    many = isinstance(checkpoints, (Trajectory, Sequence))
    states = checkpoints if many else list(_states(checkpoints))
    alone = [_scored(score, dict(state)) for state in _states(states)]
    if not alone:
        raise ValueError("checkpoints: expected at least one, got none")
    order = sorted(range(len(alone)), key=lambda i: -alone[i])
    soup, members, best = _Mean(), order[:1], alone[order[0]]
    soup.add(_state(states, order[0]))
    for i in order[1:]:
        candidate = soup.with_one_more(_state(states, i))
        reached = _scored(score, candidate.state_dict())
        if reached >= best:
            soup, best = candidate, reached
            members.append(i)
    return Soup(soup.state_dict(), members, best)


def weight_averaging_subspace(
    checkpoints: Sequence[State] | Trajectory,
    model: nn.Module,
    *,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> AffineSubspace:
    """The subspace of all weighted averages of checkpoints, with theta = 0 their mean.

    Training in it with any optimizer is trainable weight averaging (Li, Huang, Tao, Wu, Huang,
    "Trainable Weight Averaging", ICLR 2023, arXiv:2205.13104): the basis is the checkpoints
    themselves, not centred, made orthonormal.

    Parameters
    ----------
    checkpoints : sequence of state dicts, or Trajectory
        As for `uniform_soup`; 2 to 1024. Only the trainable parameters of the model are used.
    model : nn.Module
        Names the parameters and their order; its weights do not matter.
    groups : sequence of int, optional
        The number of parameters in each group: each has weights of its own for the checkpoints.
        ``layer_groups(model)`` makes it layer-wise.
    dtype : torch.dtype, optional
        Of the basis: see `Subspace.from_snapshots`.

    Returns
    -------
    Subspace, or GroupedSubspace if there are groups

    Raises
    ------
    ValueError
        A parameter that a checkpoint lacks; fewer than two checkpoints.
    """
    params, names = named_parameters(model.named_parameters(), "model")
    assert names is not None
    states = [_only(state, names, t) for t, state in enumerate(_states(checkpoints))]
    if len(states) < 2:
        raise ValueError(f"checkpoints: expected at least two, got {len(states)}")
    mean = list(uniform_soup(states).values())
    if groups is None:
        return _spanned(states, names, dtype).with_origin(mean)
    parts = group_slices(groups, len(params))
    spaces = []
    for i, part in enumerate(parts):
        try:
            spaces.append(_spanned(states, names[part], dtype))
        except ValueError as error:
            raise ValueError(f"groups[{i}]: {error}") from None
    return GroupedSubspace(spaces).with_origin(mean)


def _spanned(states: list[State], names: list[str], dtype: torch.dtype | None) -> Subspace:
    rows = [{name: state[name] for name in names} for state in states]
    dim = min(len(rows), sum(tensor.numel() for tensor in rows[0].values()))
    return Subspace.from_snapshots(rows, dim, "qr", dtype=dtype)


class _Mean:
    """A mean of state dicts that more can be added to."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.last: State = {}
        self.first: State = {}

    def add(self, state: State) -> None:
        if self.count == 0:
            self.first = dict(state)
        _check_same(self.first, state, self.count)
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                if name in self.sums:
                    self.sums[name] = self.sums[name] + value.detach().to(self.sums[name].device)
                else:
                    self.sums[name] = value.detach().to(torch.float64, copy=True)
        self.last = {name: state[name] for name in state if name not in self.sums}
        self.count += 1

    def with_one_more(self, state: State) -> _Mean:
        result = _Mean()
        result.__dict__.update(self.__dict__, sums=dict(self.sums))
        result.add(state)
        return result

    def state_dict(self) -> dict[str, Any]:
        if self.count == 0:
            raise ValueError("checkpoints: expected at least one, got none")
        return {
            name: (self.sums[name] / self.count).to(value.dtype)
            if name in self.sums
            else self.last[name]
            for name, value in self.first.items()
        }


def _states(checkpoints: Iterable[State] | Trajectory) -> Iterator[State]:
    if isinstance(checkpoints, Trajectory):
        yield from (_state(checkpoints, t) for t in range(len(checkpoints)))
        return
    if isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Iterable):
        raise TypeError(
            "checkpoints: expected a list of state dicts or a Trajectory, got "
            f"{type_name(checkpoints)}"
        )
    for t, state in enumerate(checkpoints):
        if not isinstance(state, Mapping):
            raise TypeError(f"checkpoints[{t}]: expected a state dict, got {type_name(state)}")
        yield state


def _state(checkpoints: Sequence[State] | Trajectory, index: int) -> State:
    if not isinstance(checkpoints, Trajectory):
        return checkpoints[index]
    if checkpoints.names is None:
        raise ValueError(
            "checkpoints: expected a trajectory that knows names; record with "
            "Trajectory(model.named_parameters())"
        )
    assert checkpoints.anchor is not None
    flat = checkpoints.anchor + checkpoints.snapshots[index]
    pieces = flat.split([p.numel() for p in checkpoints.params])
    return {
        name: piece.view(p.shape).to(p.dtype)
        for name, piece, p in zip(checkpoints.names, pieces, checkpoints.params, strict=True)
    }


def _only(state: State, names: list[str], t: int) -> State:
    for name in names:
        if name not in state:
            raise ValueError(
                f"checkpoints[{t}]: expected the parameter {name}, as in the model, got "
                f"{', '.join(sorted(map(str, state)))}"
            )
    return {name: state[name] for name in names}


def _check_same(first: State, state: State, t: int) -> None:
    if state.keys() != first.keys():
        missing = sorted(first.keys() ^ state.keys())
        raise ValueError(
            f"checkpoints[{t}]: expected the names of checkpoints[0], got a difference in "
            f"{', '.join(map(str, missing))}"
        )
    for name, value in state.items():
        shape = value.shape if isinstance(value, Tensor) else None
        expected = first[name].shape if isinstance(first[name], Tensor) else None
        if shape != expected:
            raise ValueError(
                f"checkpoints[{t}]: {name}: expected shape {expected and tuple(expected)}, as in "
                f"checkpoints[0], got {shape and tuple(shape)}"
            )


def _scored(score: Callable[[dict[str, Any]], float], state: dict[str, Any]) -> float:
    result = float(score(state))
    if math.isnan(result):
        raise ValueError("score: expected a number, got NaN")
    return result
