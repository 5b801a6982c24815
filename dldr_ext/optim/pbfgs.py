"""P-BFGS: a quasi-Newton method on the coordinates of a subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from .._affine import AffineSubspace
from .._params import gradients
from . import bfgs
from ._base import SubspaceOptimizer, check_choice, check_number
from ._closure import Closure, Loss, number
from ._replay import Replay, buffer_list
from ._trials import Trials
from .line_search import SearchResult, armijo, fixed, strong_wolfe
from .status import Status

__all__ = ["PBFGS"]

# Curvature condition of the strong Wolfe search.
_C2 = 0.9
# Accepted steps after which the flat point is computed anew from theta: rounding in its sums
# would let it leave the subspace slowly.
_ANCHOR_EVERY = 32
_FAILURES = (
    Status.LINE_SEARCH_FAILED,
    Status.NON_FINITE_LOSS,
    Status.NON_FINITE_GRADIENT,
)


class PBFGS(SubspaceOptimizer):
    """P-BFGS (Li et al., TPAMI 2022, algorithm 2), with the step made safe.

    A step takes c = P^T g (pass 1 over the basis), the direction p = -B c with B an approximation
    of the d x d inverse Hessian, u = P p (pass 2), and searches along w + alpha u without touching
    the basis again. The projected gradient at the accepted point, which ``curvature="same_batch"``
    wants, is made in pass 1 of the next step.

    Constructing it puts the model at origin + P theta0 and logs a warning (logger ``dldr_ext``) if
    that moved the weights. From then on the weights are the optimizer's: it writes them from its
    own copy in each step.

    Parameters
    ----------
    params : iterable of Tensor
        The parameters that the subspace was made for.
    subspace : Subspace or GroupedSubspace
    lr : float
        First trial step of each search, > 0 (the step itself without a search); in
        ``param_groups``, so that schedulers work.
    line_search_fn : "armijo", "strong_wolfe" or None
        Backtracking; bracketing and interpolation, which also uses gradients of the trials; none.
    c1 : float
        Sufficient decrease, in (0, 1): f(w + alpha u) < f(w) + c1 alpha c.p.
    backtrack : float
        Factor in (0, 1) from trial to trial (strong Wolfe: after a trial that is not finite).
    max_ls : int
        Largest number of trials of one search.
    curvature : "same_batch" or "consecutive"
        Where y comes from. "same_batch": the change of the projected gradient of this step's
        closure from the old to the new point; costs one evaluation with backward, the accepted
        trial itself whenever that kept its graph, and a flat copy of the gradient (n numbers).
        "consecutive": the change between the gradients of two consecutive steps, whatever their
        batches; costs nothing, and is the same if the closure always uses all data.
    damping : "powell" or None
        Powell's damping of y, which keeps B positive definite where the curvature is negative.
    residual_lr : float
        Learning rate, >= 0, of the part g - P P^T g of the gradient outside the subspace, by which
        the weights move too after each accepted step (P+-BFGS). The weights then leave
        origin + P theta; costs 2 n numbers and no pass of its own.
    residual_momentum : float
        Momentum of that part, in [0, 1).
    buffers : module, iterable of Tensor, or None
        Tensors that an evaluation changes (batch-norm statistics): pass the model. Every
        evaluation of a step sees them as before the step.
    process_group : None
        Only None is supported: one process.
    theta0 : Tensor of shape (d,), "current" or None
        Where to start; None is 0, "current" the projection of the current weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing has moved then.

    Notes
    -----
    B starts at diag(sigma_i / sigma_1) if the subspace knows its singular values, else at I; it is
    scaled up before its first update where the curvature allows longer steps; updates use a
    relative curvature test. Only ``curvature="consecutive", damping=None`` follows the published
    rule: B starts at I, is never scaled, and is updated when y.s > 1e-20. Together with
    ``line_search_fn="armijo", c1=0.4, backtrack=0.4, max_ls=20`` that is the published algorithm,
    except that a failed search does not step.

    A step that ends without moving (`Status`) leaves weights and buffers bitwise as they were and
    sets B back to its start. Random numbers (torch's, CPU and the parameters' CUDA devices) are
    the same in every evaluation of a step, and go on afterwards as after one evaluation. After an
    accepted step the buffers are as the evaluation at the accepted weights leaves them.

    The state that `state_dict` saves includes a flat copy of the weights, n numbers.
    """

    _point: Tensor  # flat weights, origin + P theta
    _direction: Tensor  # u = P p

    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        lr: float = 1.0,
        *,
        line_search_fn: Literal["armijo", "strong_wolfe"] | None = "armijo",
        c1: float = 1e-4,
        backtrack: float = 0.5,
        max_ls: int = 20,
        curvature: Literal["same_batch", "consecutive"] = "same_batch",
        damping: Literal["powell"] | None = "powell",
        residual_lr: float = 0.0,
        residual_momentum: float = 0.9,
        buffers: nn.Module | Iterable[Tensor] | None = None,
        process_group: None = None,
        theta0: Tensor | Literal["current"] | None = None,
    ) -> None:
        if process_group is not None:
            raise ValueError(
                "PBFGS: process_group: expected None (one process; closures over several processes "
                f"are not supported), got {process_group!r}"
            )
        check_choice("PBFGS", "line_search_fn", line_search_fn, ("armijo", "strong_wolfe", None))
        check_choice("PBFGS", "curvature", curvature, ("same_batch", "consecutive"))
        check_choice("PBFGS", "damping", damping, ("powell", None))
        if isinstance(max_ls, bool) or not isinstance(max_ls, int):
            raise TypeError(f"PBFGS: max_ls: expected an int, got {max_ls!r}")
        if max_ls < 1:
            raise ValueError(f"PBFGS: max_ls: expected at least 1, got {max_ls}")
        most = _C2 if line_search_fn == "strong_wolfe" else 1.0
        defaults = {
            "lr": check_number("PBFGS", "lr", lr, 0.0, low_open=True),
            "line_search_fn": line_search_fn,
            "c1": check_number("PBFGS", "c1", c1, 0.0, most, low_open=True),
            "backtrack": check_number("PBFGS", "backtrack", backtrack, 0.0, 1.0, low_open=True),
            "max_ls": max_ls,
            "curvature": curvature,
            "damping": damping,
            "residual_lr": check_number("PBFGS", "residual_lr", residual_lr, 0.0),
            "residual_momentum": check_number(
                "PBFGS", "residual_momentum", residual_momentum, 0.0, 1.0
            ),
        }
        replayed = buffer_list(buffers)
        super().__init__(params, subspace, defaults, theta0)
        self._replay = Replay(self._params[0].device, replayed)
        self._b = self._first_guess()
        self._fresh = True  # B is still the first guess
        # "consecutive" only: s, c and B^-1 s of the last step.
        self._previous: tuple[Tensor, Tensor, Tensor] | None = None
        # "same_batch" only: the same, and the flat gradient at the point that was accepted. It is
        # projected beside the next step's gradient, by when B is needed.
        self._unlearned: tuple[Tensor, Tensor, Tensor] | None = None
        self._after: Tensor | None = None
        self._since_anchor = 0
        # P+-BFGS only: momentum outside the subspace, and where it has carried the origin.
        self._residual: Tensor | None = None
        self._moved_origin: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Closure) -> Loss:  # type: ignore[override]
        """One step.

        Parameters
        ----------
        closure : callable
            Evaluates the loss of one batch at the current weights; called several times, for the
            same batch. Either it zeroes the gradients, calls backward and returns the loss (as for
            torch's LBFGS), or it only returns a loss with a graph: then the optimizer calls
            backward where a gradient is needed, gradients need not be zeroed, and the trials of
            the search run under ``torch.no_grad()``, except where a trial is likely to be accepted
            and its gradient is wanted next (same-batch curvature, once B has been updated).

        Returns
        -------
        Tensor or float
            The loss before the step, detached.

        Raises
        ------
        TypeError
            The closure is none, or does not return a scalar.
        Exception
            Whatever the closure raises. Weights and buffers are then as before the step.
        """
        if not callable(closure):
            raise TypeError(f"PBFGS: step: closure: expected a callable, got {closure!r}")
        self._replay.begin()
        try:
            loss = self._evaluator.first(closure)
            self._replay.mark()
            self._status = self._move(closure, number(loss))
            if self._status in _FAILURES:
                self._put_back()
                self._reset()
                self._residual = None
        except BaseException:
            self._put_back()
            raise
        self._replay.finish()
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _move(self, closure: Closure, loss: float) -> Status:
        """Direction, search and update, with the gradients of the first call in place."""
        if not self._evaluator.has_gradient():
            return Status.NO_GRADIENT
        if not math.isfinite(loss):
            return Status.NON_FINITE_LOSS
        gradient = gradients(self._params)
        c = self._project_and_learn(gradient)
        size = float(torch.linalg.vector_norm(c))
        if not math.isfinite(size):
            return Status.NON_FINITE_GRADIENT
        if size == 0.0:
            return Status.CONVERGED
        group = self.param_groups[0]
        if group["curvature"] == "consecutive" and self._previous is not None:
            s, before, hs = self._previous
            self._update(s, c - before, hs)
        direction = bfgs.descent_direction(self._b, c)
        if direction is None:
            self._reset()
            direction = bfgs.descent_direction(self._b, c)
        if direction is None:  # |c|^2 over- or underflows
            return Status.LINE_SEARCH_FAILED
        p, slope = direction
        residual = self._next_direction(p, c, gradient)
        del gradient  # the next evaluation may use its memory
        trials = Trials(
            closure, self._evaluator, self._replay, self._params, self._point, self._direction
        )
        result = self._search(trials, loss, slope)
        if not result.status.moved:
            return result.status
        settled = self._settle(trials, result, c, result.alpha * p)
        if settled is not None:
            return settled
        self._advance(result.alpha, p, residual)
        return result.status

    def _search(self, trials: Trials, loss: float, slope: float) -> SearchResult:
        group = self.param_groups[0]
        lr, kind = float(group["lr"]), group["line_search_fn"]
        if kind is None or lr == 0.0:  # a schedule may end at 0: there is nothing to search
            return fixed(lr)
        options = {"c1": group["c1"], "backtrack": group["backtrack"], "max_ls": group["max_ls"]}
        if kind == "strong_wolfe":
            return strong_wolfe(
                lambda alpha: trials.loss(alpha, graph=True),
                lambda _: trials.slope(),
                loss,
                slope,
                lr,
                c2=_C2,
                **options,
            )
        # A trial that keeps its graph needs only a backward pass to give the gradient that
        # same-batch curvature wants at the accepted point. Worth it unless B is a mere guess, of
        # which several trials are expected.
        graph = group["curvature"] == "same_batch" and not self._fresh
        return armijo(lambda alpha: trials.loss(alpha, graph=graph), loss, slope, lr, **options)

    def _settle(self, trials: Trials, result: SearchResult, c: Tensor, s: Tensor) -> Status | None:
        """Leaves the model as the accepted trial does and learns from it; a Status if it cannot."""
        same_batch = self.param_groups[0]["curvature"] == "same_batch"
        hs = -result.alpha * c  # B^-1 s, since s = -alpha B c
        if not same_batch and result.evaluations == 0:  # no search, and nothing to learn here
            ops.trial_(self._params, self._point, self._direction, result.alpha)
        elif not math.isfinite(trials.settle(result.alpha, gradient=same_batch)):
            return Status.LINE_SEARCH_FAILED
        if not same_batch:
            self._previous = (s, c, hs)
            return None
        if self._after is None:
            self._after = torch.empty_like(self._point)
        torch.cat([g.reshape(-1) for g in gradients(self._params)], out=self._after)
        # NaN and infinity reach the slope whatever they are multiplied with.
        if not math.isfinite(float(torch.dot(self._after, self._direction))):
            return Status.NON_FINITE_GRADIENT
        self._unlearned = (s, c, hs)
        return None

    def _project_and_learn(self, gradient: list[Tensor]) -> Tensor:
        """c of this step's gradient; B learns from the last step's pair. One pass for both."""
        if self._unlearned is None or self._after is None:
            return self._projected(gradient)[0]
        c, after = self._projected(gradient, [self._after])
        self._learn(after)
        return c

    def _learn(self, after: Tensor) -> None:
        if self._unlearned is not None:
            s, before, hs = self._unlearned
            self._unlearned = None
            self._update(s, after - before, hs)

    def _published_rule(self) -> bool:
        group = self.param_groups[0]
        return group["curvature"] == "consecutive" and group["damping"] is None

    def _first_guess(self) -> Tensor:
        known = None if self._published_rule() else self._subspace.singular_values
        return bfgs.first_guess(self._subspace.dim, known)

    def _update(self, s: Tensor, y: Tensor, hs: Tensor) -> None:
        if self._published_rule():
            b = bfgs.published_update(self._b, s, y)
        else:
            damped = self.param_groups[0]["damping"] == "powell"
            result = bfgs.update(self._b, s, y, hs=hs, fresh=self._fresh, damped=damped)
            b = None if result is None else result[0]
            if b is not None and bfgs.condition(b) >= bfgs.CONDITION_LIMIT:
                self._reset()
                return
        if b is not None:
            self._b, self._fresh = b, False

    def _advance(self, alpha: float, p: Tensor, residual: Tensor | None) -> None:
        """Carries theta and the flat point along with the accepted weights."""
        self._theta.add_(p, alpha=alpha)
        ops.trial_([self._point], self._point, self._direction, alpha)
        self._since_anchor += 1
        anchor = self._since_anchor >= _ANCHOR_EVERY
        if residual is not None:
            self._leave_subspace(residual)
        if anchor:
            self._since_anchor = 0
            origin = self._subspace.origin if self._moved_origin is None else self._moved_origin
            self._subspace.combine_(self._point, self._to_basis(self._theta), origin)
        if anchor or residual is not None:
            self._put_back_weights()

    def _next_direction(self, p: Tensor, c: Tensor, gradient: list[Tensor]) -> Tensor | None:
        """u = P p; and the momentum of g - P P^T g as it will be if the step is accepted."""
        group, theta = self.param_groups[0], self._to_basis(p)
        if group["residual_lr"] == 0.0:
            self._subspace.combine_(self._direction, theta)
            return None
        coordinates = self._to_basis(c)
        self._direction, residual = self._subspace.combine_residual(theta, coordinates, gradient)
        if self._residual is not None:
            residual.add_(self._residual, alpha=group["residual_momentum"])
        return residual

    def _leave_subspace(self, residual: Tensor) -> None:
        self._residual = residual
        if self._moved_origin is None:
            origin = self._subspace.origin
            self._moved_origin = origin.to(self._point.dtype, copy=True)
        for flat in (self._point, self._moved_origin):
            flat.add_(residual, alpha=-self.param_groups[0]["residual_lr"])

    def _reset(self) -> None:
        """Forgets all curvature."""
        self._b = self._first_guess()
        self._fresh = True
        self._previous = self._unlearned = None

    def _put_back(self) -> None:
        """Weights and buffers as before the step, bit for bit."""
        self._put_back_weights()
        self._replay.restore_buffers()

    def _put_back_weights(self) -> None:
        # The point times zero adds nothing; the direction may hold an infinity, which would.
        ops.trial_(self._params, self._point, self._point, 0.0)

    def _start_at(self, point: Tensor) -> None:
        self._point = point
        self._direction = torch.empty_like(point)

    def _own_state(self) -> dict[str, Any]:
        def copy(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        if self._unlearned is not None and self._after is not None:
            self._learn(self._projected([self._after])[0])  # as the next step would, to the bit
        s, c, hs = (None, None, None) if self._previous is None else self._previous
        return {
            "point": copy(self._point),
            "inverse_hessian": copy(self._b),
            "fresh": self._fresh,
            "since_anchor": self._since_anchor,
            "previous_step": copy(s),
            "previous_coordinates": copy(c),
            "previous_believed": copy(hs),
            "residual": copy(self._residual),
            "moved_origin": copy(self._moved_origin),
        }

    def _checked_own_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        like = {
            "point": self._point,
            "inverse_hessian": self._b,
            "previous_step": theta,
            "previous_coordinates": theta,
            "previous_believed": theta,
            "residual": self._point,
            "moved_origin": self._point,
        }
        needed = ("point", "inverse_hessian")
        own: dict[str, Any] = {
            key: None
            if state[key] is None and key not in needed
            else self._saved_tensor(state, key, tensor)
            for key, tensor in like.items()
        }
        own["fresh"] = bool(state["fresh"])
        own["since_anchor"] = int(state["since_anchor"])
        origin = own["moved_origin"]
        self._check_point(own["point"], self._subspace.origin if origin is None else origin, theta)
        return own

    def _adopt(self, own: dict[str, Any]) -> None:
        self._start_at(own["point"])
        self._b, self._fresh = own["inverse_hessian"], own["fresh"]
        self._since_anchor = own["since_anchor"]
        s, c, hs = (own[f"previous_{key}"] for key in ("step", "coordinates", "believed"))
        self._previous = None if s is None else (s, c, hs)
        self._unlearned = self._after = None
        self._residual, self._moved_origin = own["residual"], own["moved_origin"]
        self._put_back_weights()
