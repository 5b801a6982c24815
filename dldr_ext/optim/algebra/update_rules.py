"""Update rules as PBFGS holds them: what is known of the curvature, and how it learns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..status import Curvature
from . import bfgs
from .transfer import carried

_quasi_newton_ = torch.ops.dldr_ext.quasi_newton_.default


class Rule(ABC):
    """Curvature in d dimensions, float64.

    Attributes
    ----------
    guess : Tensor, shape (d, d)
        The diagonal matrix B that `reset` goes back to; all other tensors are where it is.
    fresh : bool
        Nothing has been learnt since.
    condition : float
        Estimate of the condition number, or NaN.
    """

    def __init__(self, guess: Tensor) -> None:
        self.guess = guess
        self.reset()

    def reset(self) -> None:
        """Forgets all curvature."""
        self.fresh, self.condition = True, math.nan

    @abstractmethod
    def direction(self, c: Tensor) -> tuple[Tensor, float] | None:
        """p and the slope c.p < 0, or None if there is no direction downhill."""

    @abstractmethod
    def learn(
        self, s: Tensor, y: Tensor, hs: Tensor, *, damped: bool, published: bool
    ) -> Curvature:
        """Learns from a step s and the change y of c; hs is B^-1 s where p was -B c.

        ``damped`` as in `bfgs.update`; ``published``: by `bfgs.published_update`.
        """

    @abstractmethod
    def carry(self, m: Tensor, guess: Tensor) -> None:
        """Into another subspace, M = P'^T P of shape (d', d), with the first guess there."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything above but the guess, as copies."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Takes over entries of `state`, checked by `checked`."""

    @classmethod
    @abstractmethod
    def checked(cls, state: dict[str, Any], dim: int) -> dict[str, Any]:
        """Entries of `state` as loaded, checked and copied.

        Raises
        ------
        ValueError
            "key: expected ..., got ...".
        """


class BFGS(Rule):
    """The inverse d x d matrix B."""

    def reset(self) -> None:
        super().reset()
        self.b = self.guess.clone()

    def run_ahead(
        self, c: Tensor, pair: tuple[Tensor, ...] | None, *, damped: bool, published: bool
    ) -> tuple[Tensor, Tensor]:
        """`learn` and `direction` as one op, of which nothing is read: p, and numbers for `heed`.

        Where B has no direction it is set back, which `learn` and `direction` leave to the caller.
        """
        s, y, hs = pair or (None, None, None)
        p, info = _quasi_newton_(
            self.b, self.guess.diagonal(), c, s, y, hs,
            fresh=self.fresh, damped=damped, published=published,
        )  # fmt: skip
        return p, info

    def heed(self, learnt: float, reset: float, condition: float) -> Curvature:
        """Takes note of what `run_ahead` did to B."""
        if reset:
            self.fresh, self.condition = True, math.nan
            return "reset"
        if not learnt:
            return "skipped"
        self.fresh, self.condition = False, condition
        return "damped" if learnt == 2.0 else "updated"

    def direction(self, c: Tensor) -> tuple[Tensor, float] | None:
        return bfgs.descent_direction(self.b, c)

    def learn(
        self, s: Tensor, y: Tensor, hs: Tensor, *, damped: bool, published: bool
    ) -> Curvature:
        if published:
            new = bfgs.published_update(self.b, s, y)
            if new is None:
                return "skipped"
            self.b, self.fresh = new, False
            return "updated"
        result = bfgs.update(self.b, s, y, hs=hs, fresh=self.fresh, damped=damped)
        if result is None:
            return "skipped"
        self.condition = bfgs.condition(result[0])
        if self.condition >= bfgs.CONDITION_LIMIT:
            self.reset()
            return "reset"
        self.b, self.fresh = result[0], False
        return "damped" if result[1] else "updated"

    def carry(self, m: Tensor, guess: Tensor) -> None:
        b, fresh, self.guess = self.b, self.fresh, guess
        self.reset()
        if not fresh:
            b = carried(b.cpu(), m).to(guess.device)
            condition = bfgs.condition(b)
            if condition < bfgs.CONDITION_LIMIT:
                self.b, self.fresh, self.condition = b, False, condition

    def state(self) -> dict[str, Any]:
        return {"inverse_hessian": self.b.clone(), "fresh": self.fresh}

    def load(self, state: dict[str, Any]) -> None:
        self.b, self.fresh = state["inverse_hessian"].to(self.guess.device), state["fresh"]

    @classmethod
    def checked(cls, state: dict[str, Any], dim: int) -> dict[str, Any]:
        return {
            "inverse_hessian": _matrix(state, "inverse_hessian", (dim, dim)),
            "fresh": bool(state["fresh"]),
        }


def _matrix(state: dict[str, Any], key: str, shape: tuple[int, ...]) -> Tensor:
    """A float64 copy of a saved tensor."""
    value = state[key]
    if not isinstance(value, Tensor) or value.shape != shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{key}: expected a tensor of shape {shape}, got {got}")
    return value.to(device="cpu", dtype=torch.float64, copy=True)
