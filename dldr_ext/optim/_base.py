"""What every optimizer in a subspace does: parameters, theta, closures, saving."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .._affine import AffineSubspace
from .._params import check_matches, numel, unique_parameters
from ._closure import Evaluator
from .status import Status

__all__ = ["SubspaceOptimizer", "check_choice", "check_number"]

_log = logging.getLogger("dldr_ext")

# Weights further than this from origin + P theta, relative to their norm, count as moved.
_MOVED = 1e-5
# A loaded point further than this from origin + P theta belongs to another subspace.
_FOREIGN = 1e-2


class SubspaceOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose only unknowns are the d coordinates theta of a subspace.

    Keeps theta in float64 on the CPU (it is d numbers) and the rules that its subclasses share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        defaults: dict[str, Any],
        theta0: Tensor | Literal["current"] | None,
    ) -> None:
        name = type(self).__name__
        if not isinstance(subspace, AffineSubspace):
            raise TypeError(
                f"{name}: subspace: expected a dldr_ext.Subspace or GroupedSubspace, got "
                f"{type(subspace).__name__}"
            )
        self._params = _trainable(name, params)
        self._subspace = subspace
        self._check_subspace(name)
        super().__init__(self._params, defaults)
        self._status = Status.INITIAL
        self._evaluator = Evaluator(self._params)
        self._theta = self._first_theta(name, theta0)
        self._place(name, said=theta0 is not None)

    @property
    def subspace(self) -> AffineSubspace:
        """The subspace that the weights move in."""
        return self._subspace

    @property
    def theta(self) -> Tensor:
        """Coordinates (d,) of the weights, w = origin + P theta: a copy, in the ops' precision."""
        return self._to_basis(self._theta, copy=True)

    @property
    def status(self) -> Status:
        """How the last step ended."""
        return self._status

    @property
    def closure_calls(self) -> int:
        """Calls of closures so far, trials included: the passes over the data, in batches."""
        return self._evaluator.calls

    @property
    def gradient_calls(self) -> int:
        """Those of `closure_calls` that went through a backward pass."""
        return self._evaluator.gradient_calls

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the subspace was made for one list of parameters."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__}: add_param_group: a subspace belongs to one list of "
                "parameters; make a new subspace and a new optimizer for another list"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as copies; see `load_state_dict`.

        Beside torch's ``state`` (empty) and ``param_groups`` (all options) there is the key
        ``subspace``, which holds tensors, numbers and strings only. Not included, because they
        are not the optimizer's: the model, its buffers, torch's random state, the subspace.
        """
        state_dict = super().state_dict()
        state_dict["subspace"] = {
            "theta": self._theta.clone(),
            "status": self._status.name,
            "closure_calls": self._evaluator.calls,
            "gradient_calls": self._evaluator.gradient_calls,
            **self._own_state(),
        }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from `state_dict`, bit for bit, and puts the model where it was saved.

        Raises
        ------
        ValueError
            The state of another optimizer, of another dimension or number of parameters, or of
            another subspace. Nothing has changed then.
        """
        name = type(self).__name__
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get("subspace"), dict):
            raise ValueError(f"{name}: state_dict: expected what {name}.state_dict() returns")
        state = state_dict["subspace"]
        expected = {"theta", "status", "closure_calls", "gradient_calls", *self._own_state()}
        if set(state) != expected:
            raise ValueError(
                f"{name}: state_dict: expected the keys {sorted(expected)} in 'subspace', got "
                f"{sorted(map(str, state))}"
            )
        theta = self._saved_tensor(state, "theta", self._theta)
        try:
            status = Status[state["status"]]
        except KeyError:
            raise ValueError(
                f"{name}: state_dict: status: expected a Status, got {state['status']!r}"
            ) from None
        own = self._checked_own_state(state, theta)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "subspace"})
        self._theta, self._status = theta, status
        self._evaluator.calls = int(state["closure_calls"])
        self._evaluator.gradient_calls = int(state["gradient_calls"])
        self._adopt(own)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only the groups; a copy without theta would be none. Hooks stay behind, as
        # torch has it, since they may hold anything.
        return {k: v for k, v in self.__dict__.items() if not k.endswith("_hooks")}

    # What subclasses add.

    def _own_state(self) -> dict[str, Any]:
        """Further entries of the state dict."""
        return {}

    def _checked_own_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        """The same entries as loaded, checked and copied; changes nothing."""
        return {}

    def _adopt(self, own: dict[str, Any]) -> None:
        """Takes over checked entries and writes the weights."""
        raise NotImplementedError

    def _start_at(self, point: Tensor) -> None:
        """Takes over the flat point origin + P theta that the model now stands at."""

    # What subclasses use.

    def _to_basis(self, vector: Tensor, copy: bool = False) -> Tensor:
        """A d-vector as the ops take it: on the basis's device, in the ops' precision."""
        subspace = self._subspace
        return vector.to(device=subspace.device, dtype=subspace.coordinate_dtype, copy=copy)

    def _projected(self, *lists: list[Tensor]) -> Tensor:
        """c = P^T g of each list, (len(lists), d) float64 on the CPU. One pass over the basis."""
        return self._subspace.project_many(lists).to(device="cpu", dtype=torch.float64)

    def _saved_tensor(self, state: dict[str, Any], key: str, like: Tensor) -> Tensor:
        """A copy of a saved tensor, on the device and in the dtype of ``like``."""
        value = state[key]
        if not isinstance(value, Tensor) or value.shape != like.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{type(self).__name__}: state_dict: {key}: expected a tensor of shape "
                f"{tuple(like.shape)}, got {got}"
            )
        return value.to(device=like.device, dtype=like.dtype, copy=True)

    def _check_point(self, point: Tensor, origin: Tensor | None, theta: Tensor) -> None:
        """Refuses a saved point that is not origin + P theta in this subspace."""
        here = torch.empty_like(point)
        self._subspace.combine_(here, self._to_basis(theta), origin)
        distance = float(torch.linalg.vector_norm(here - point))
        if not distance <= _FOREIGN * float(torch.linalg.vector_norm(point)):
            raise ValueError(
                f"{type(self).__name__}: state_dict: point: expected origin + P theta in this "
                f"optimizer's subspace, got a point at distance {distance:.3g} from it; the state "
                "was saved with another subspace"
            )

    def _check_subspace(self, name: str) -> None:
        subspace, params = self._subspace, self._params
        if subspace.shapes is not None:
            check_matches(params, subspace.shapes, subspace.names, what="subspace")
        if numel(params) != subspace.numel:
            raise ValueError(
                f"{name}: params: expected {subspace.numel} elements in all, as in the subspace, "
                f"got {numel(params)}"
            )
        if params[0].device != subspace.device:
            raise ValueError(
                f"{name}: subspace: expected it on {params[0].device}, where the parameters are, "
                f"got {subspace.device}; see Subspace.to"
            )

    def _first_theta(self, name: str, theta0: Tensor | str | None) -> Tensor:
        dim = self._subspace.dim
        if theta0 is None:
            return torch.zeros(dim, dtype=torch.float64, device="cpu")
        if isinstance(theta0, str) and theta0 == "current":
            theta = self._subspace.coordinates(self._params)
        elif isinstance(theta0, Tensor):
            theta = theta0.detach()
        else:
            raise TypeError(
                f"{name}: theta0: expected a tensor of shape ({dim},), 'current' or None, got "
                f"{theta0!r}"
            )
        if theta.shape != (dim,) or not theta.dtype.is_floating_point:
            raise ValueError(
                f"{name}: theta0: expected a floating-point tensor of shape ({dim},), got shape "
                f"{tuple(theta.shape)} and dtype {theta.dtype}"
            )
        if not bool(theta.isfinite().all()):
            raise ValueError(f"{name}: theta0: expected finite numbers, got NaN or infinity")
        return theta.to(device="cpu", dtype=torch.float64, copy=True)

    def _place(self, name: str, said: bool) -> None:
        """Puts the model at origin + P theta and says so if it was elsewhere."""
        with torch.no_grad():
            point = self._subspace.reconstruct(self._to_basis(self._theta))
            before = torch.cat([p.detach().reshape(-1).to(point.dtype) for p in self._params])
            distance = float(torch.linalg.vector_norm(point - before))
            norm = float(torch.linalg.vector_norm(before))
            ops.trial_(self._params, point, point, 0.0)
            self._start_at(point)
        if not distance <= _MOVED * norm:
            _log.warning(
                "%s: the weights were moved to %s, a distance of %.3g (their norm was %.3g)%s",
                name,
                "origin + P theta0" if said else "the origin of the subspace",
                distance,
                norm,
                "" if said else '; pass theta0="current" to start from the weights\' projection',
            )


def _trainable(name: str, params: Iterable[Any]) -> list[Tensor]:
    """The list of parameters; one group only, since theta has one learning rate."""
    if not isinstance(params, Tensor) and isinstance(params, Iterable):
        params = list(params)
        for group in params:
            options = sorted(set(group) - {"params"}) if isinstance(group, dict) else []
            if options:
                raise ValueError(
                    f"{name}: params: expected no options of single parameter groups, got "
                    f"{options}: the coordinates of a subspace belong to all parameters"
                )
    result = unique_parameters(params)
    for i, p in enumerate(result):
        if not p.requires_grad:
            raise ValueError(f"{name}: params[{i}]: expected requires_grad=True, got False")
    return result


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = True,
) -> float:
    """A finite number in an interval, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name}: expected a number, got {value!r}")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (math.isfinite(value) and above and below):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        raise ValueError(f"{owner}: {name}: expected a number in {interval}, got {value!r}")
    return float(value)


def check_choice(owner: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of a few values, or an error that lists them."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name}: expected one of {listed}, got {value!r}")
