"""Averages of checkpoints: uniform and greedy soups, and the subspace of all averages.

Batch-norm statistics of an average are not the average of the statistics: re-estimate them with
``torch.optim.swa_utils.update_bn(loader, model)`` before a model is judged or used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..subspace.base import AffineSubspace
from ..subspace.dense import Subspace
from ..subspace.grouped import GroupedSubspace, group_slices
from ..tensors.names import places_of
from ..tensors.parameters import named_parameters, type_name
from ..trajectory.trajectory import Trajectory
from .kinds import COMPLEX, FLOAT, INTEGER, OTHER, accumulator, describe, kind, same
from .weights import normalized

State = Mapping[str, Any]


class Soup(NamedTuple):
    """A greedy soup: the mean of the checkpoints that were kept, and what it scores.

    Attributes
    ----------
    state_dict : dict
        The mean, on the devices and in the dtypes of the best checkpoint.
    members : list of int
        The indices of the checkpoints in it, in the order in which they were added: the best one
        first.
    score : float
        Of the mean.

    See Also
    --------
    greedy_soup : makes one.
    """

    state_dict: dict[str, Any]
    members: list[int]
    score: float


def uniform_soup(
    checkpoints: Iterable[State] | Trajectory, weights: Sequence[float] | None = None
) -> dict[str, Any]:
    """Average checkpoints [1]_, with equal weights unless others are given.

    Parameters
    ----------
    checkpoints : iterable of state dicts, or Trajectory
        With the same names and shapes. An iterator is read one at a time, so that
        ``uniform_soup(torch.load(path) for path in paths)`` holds one checkpoint and the sums. A
        trajectory, recorded with names, stands for the weights at its snapshots.
    weights : sequence of float, optional
        One for each checkpoint, negative ones among them; divided by their sum. Those of
        ``averaging.schedule_weights`` stand for a decay of the learning rate.

    Returns
    -------
    dict
        A state dict on the devices and in the dtypes of the first one; sums are float64 or
        complex128. Integers (counts of batches) and what is no tensor are those of the last one;
        a warning names arrays of integers that differ.

    Raises
    ------
    TypeError
        Not an iterable of state dicts; values that are no numbers (quantized, float8, of a packed
        subclass) and differ.
    ValueError
        No checkpoint; one with other names, shapes or kinds of numbers; a trajectory without names;
        weights that sum to 0, or not one for each checkpoint.

    See Also
    --------
    greedy_soup : leaves out the checkpoints that do not help.
    weight_averaging_subspace : makes the weights of the average trainable.

    Notes
    -----
    ``dldr soup`` averages files of any size, a window at a time.

    References
    ----------
    .. [1] Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
       accuracy without increasing inference time", ICML 2022, arXiv:2203.05482.

    Examples
    --------
    >>> import torch
    >>> uniform_soup([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}])
    {'w': tensor([2., 4.])}
    """
    factors = None if weights is None else normalized(weights)
    mean = _RunningMean()
    for t, state in enumerate(_each_state(checkpoints)):
        mean.add(state, factors[t] if factors is not None and t < len(factors) else 1.0)
    if factors is not None and mean.count not in (0, len(factors)):
        raise ValueError(
            f"weights: expected {mean.count} numbers, one for each checkpoint, got {len(factors)}"
        )
    mean.warn()
    return mean.state_dict(None if factors is None else 1.0)


def greedy_soup(
    checkpoints: Sequence[State] | Trajectory, score: Callable[[dict[str, Any]], float]
) -> Soup:
    """Average checkpoints from the best one on, each as long as the score does not fall [1]_.

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
    TypeError
        As for `uniform_soup`.
    ValueError
        As for `uniform_soup`; a score that is NaN.

    See Also
    --------
    uniform_soup : averages all of them.

    References
    ----------
    .. [1] Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
       accuracy without increasing inference time", ICML 2022, arXiv:2203.05482, algorithm 1.

    Examples
    --------
    A score that is best where the only weight is 3:

    >>> import torch
    >>> checkpoints = [{"w": torch.tensor(value)} for value in (0.0, 4.0, 3.5, 2.0)]
    >>> soup = greedy_soup(checkpoints, lambda state: -abs(float(state["w"]) - 3))
    >>> soup.members, soup.state_dict
    ([2, 3], {'w': tensor(2.7500)})
    """
    indexable = isinstance(checkpoints, (Trajectory, Sequence))
    states = checkpoints if indexable else list(_each_state(checkpoints))
    scores = [_scored(score, dict(state)) for state in _each_state(states)]
    if not scores:
        raise ValueError("checkpoints: expected at least one, got none")
    best_first = sorted(range(len(scores)), key=lambda t: -scores[t])
    mean, members, highest = _RunningMean(), best_first[:1], scores[best_first[0]]
    mean.add(_state_at(states, best_first[0]))
    for t in best_first[1:]:
        candidate = mean.with_one_more(_state_at(states, t))
        candidate_score = _scored(score, candidate.state_dict())
        if candidate_score >= highest:
            mean, highest = candidate, candidate_score
            members.append(t)
    mean.warn()
    return Soup(mean.state_dict(), members, highest)


def weight_averaging_subspace(
    checkpoints: Sequence[State] | Trajectory,
    model: nn.Module,
    *,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> AffineSubspace:
    """Return the subspace of all weighted averages of checkpoints, with theta = 0 their mean.

    Training in it with any optimizer is trainable weight averaging [1]_: the basis is the
    checkpoints themselves, not centred, made orthonormal.

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
    Subspace or GroupedSubspace
        Of as many dimensions as there are checkpoints (at most n); grouped if there are groups.

    Raises
    ------
    TypeError
        As for `uniform_soup`.
    ValueError
        A parameter that a checkpoint lacks; fewer than two checkpoints; groups that do not add up
        to the parameters.

    See Also
    --------
    uniform_soup : the average at theta = 0.
    dldr_ext.layer_groups : a group for each layer.
    dldr_ext.InSubspace : trains the coordinates with an optimizer of torch.

    References
    ----------
    .. [1] Li, Huang, Tao, Wu, Huang, "Trainable Weight Averaging: Efficient Training by Optimizing
       Historical Solutions", ICLR 2023, arXiv:2205.13104.

    Examples
    --------
    >>> import torch
    >>> checkpoints = [{"weight": row.view(2, 3)} for row in 3 * torch.eye(6)[:3]]
    >>> averages = weight_averaging_subspace(checkpoints, torch.nn.Linear(3, 2, bias=False))
    >>> averages.dim
    3
    >>> averages.reconstruct(torch.zeros(3))  # the mean
    tensor([1., 1., 1., 0., 0., 0.])
    """
    params, names = named_parameters(model.named_parameters(), "model")
    assert names is not None
    states = [_of_model(state, names, t) for t, state in enumerate(_each_state(checkpoints))]
    if len(states) < 2:
        raise ValueError(f"checkpoints: expected at least two, got {len(states)}")
    mean = list(uniform_soup(states).values())
    if groups is None:
        return _span(states, names, dtype).with_origin(mean)
    subspaces = []
    for i, group in enumerate(group_slices(groups, len(params))):
        try:
            subspaces.append(_span(states, names[group], dtype))
        except ValueError as error:
            raise ValueError(f"groups[{i}]: {error}") from None
    return GroupedSubspace(subspaces).with_origin(mean)


def _span(states: list[State], names: list[str], dtype: torch.dtype | None) -> Subspace:
    """Return the subspace that some parameters of all states span."""
    rows = [{name: state[name] for name in names} for state in states]
    dim = min(len(rows), sum(tensor.numel() for tensor in rows[0].values()))
    return Subspace.from_snapshots(rows, dim, "qr", dtype=dtype)


class _RunningMean:
    """A mean of state dicts that more can be added to."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}  # never changed in place: copies share them
        self.last: State = {}
        self.first: State = {}
        self.differing: frozenset[str] = frozenset()  # names of arrays of integers

    def add(self, state: State, weight: float = 1.0) -> None:
        if self.count == 0:
            self.first = dict(state)
        _check_same(self.first, state, self.count)
        for name, value in state.items():
            if kind(value) not in (FLOAT, COMPLEX):
                if kind(value) == INTEGER and value.dim() and not same(self.first[name], value):
                    self.differing |= {name}
                continue
            if name in self.sums:
                sums = self.sums[name]
                self.sums[name] = sums.add(value.detach().to(sums.device, sums.dtype), alpha=weight)
            else:
                self.sums[name] = (
                    value.detach().to(accumulator(value.dtype), copy=True).mul_(weight)
                )
        self.last = {name: state[name] for name in state if name not in self.sums}
        self.count += 1

    def with_one_more(self, state: State) -> _RunningMean:
        extended = copy(self)
        extended.sums = dict(self.sums)
        extended.add(state)
        return extended

    def warn(self) -> None:
        """Say what is no mean; single integers are counters."""
        if self.differing:
            listed = ", ".join(name for name in self.first if name in self.differing)
            warnings.warn(
                f"not averaged, but as in the last one: {listed} (integers that differ)",
                UserWarning,
                stacklevel=3,
            )

    def state_dict(self, total: float | None = None) -> dict[str, Any]:
        """Return the sums over ``total``, by default over the number of states."""
        if self.count == 0:
            raise ValueError("checkpoints: expected at least one, got none")
        return {
            name: (self.sums[name] / (total or self.count)).to(value.dtype)
            if name in self.sums
            else self.last[name]
            for name, value in self.first.items()
        }


def _each_state(checkpoints: Iterable[State] | Trajectory) -> Iterator[State]:
    if isinstance(checkpoints, Trajectory):
        yield from (_state_at(checkpoints, t) for t in range(len(checkpoints)))
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


def _state_at(checkpoints: Sequence[State] | Trajectory, t: int) -> State:
    """Return checkpoint ``t``; of a trajectory the weights at that snapshot."""
    if not isinstance(checkpoints, Trajectory):
        return checkpoints[t]
    if checkpoints.names is None:
        raise ValueError(
            "checkpoints: expected a trajectory that knows names; record with "
            "Trajectory(model.named_parameters())"
        )
    assert checkpoints.anchor is not None
    flat = checkpoints.anchor + checkpoints.snapshots[t]
    weights = flat.split([p.numel() for p in checkpoints.params])
    return {
        name: weight.view(p.shape).to(p.dtype)
        for name, weight, p in zip(checkpoints.names, weights, checkpoints.params, strict=True)
    }


def _of_model(state: State, names: list[str], t: int) -> State:
    """Return the entries of checkpoint ``t`` that are parameters of the model."""
    stored = [str(name) for name in state]
    values, weights = list(state.values()), {}
    for name, place in zip(names, places_of(names, stored), strict=True):
        if place is None:
            raise ValueError(
                f"checkpoints[{t}]: expected the parameter {name}, as in the model, got "
                f"{', '.join(sorted(stored))}"
            )
        weights[name] = values[place]
    return weights


def _check_same(first: State, state: State, t: int) -> None:
    """Check that checkpoint ``t`` has the names and shapes of the first."""
    if state.keys() != first.keys():
        differing = sorted(first.keys() ^ state.keys())
        raise ValueError(
            f"checkpoints[{t}]: expected the names of checkpoints[0], got a difference in "
            f"{', '.join(map(str, differing))}"
        )
    for name, value in state.items():
        found, expected = kind(value), kind(first[name])
        if found != expected:
            raise ValueError(
                f"checkpoints[{t}]: {name}: expected {_what(first[name])}, as in checkpoints[0], "
                f"got {_what(value)}"
            )
        if found == OTHER:
            if not same(first[name], value):
                raise TypeError(
                    f"checkpoints[{t}]: {name}: expected floating-point or complex numbers, or "
                    f"the same values in all checkpoints, got {describe(value)}: leave it out, "
                    "or make it dense numbers"
                )
        elif found is not None and value.shape != first[name].shape:
            raise ValueError(
                f"checkpoints[{t}]: {name}: expected shape {tuple(first[name].shape)}, as in "
                f"checkpoints[0], got {tuple(value.shape)}"
            )


def _what(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type_name(value)}"
    return describe(value) if kind(value) == OTHER else f"{kind(value)} numbers"


def _scored(score: Callable[[dict[str, Any]], float], state: dict[str, Any]) -> float:
    value = float(score(state))
    if math.isnan(value):
        raise ValueError("score: expected a number, got NaN")
    return value
