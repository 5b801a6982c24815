"""P-BFGS: a quasi-Newton method on the coordinates of a subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._affine import AffineSubspace
from .._params import flatten, gradients
from . import bfgs, policy
from ._base import SubspaceOptimizer
from ._closure import Closure, Loss, number
from ._good import GoodPoint
from ._objective import Objective
from ._options import names_options
from ._pairs import Pairs
from ._pbfgs_options import checked
from ._replay import Replay, buffer_list
from ._scaler import ScaleKeeper
from ._trials import Trials, search
from ._walk import Walk
from .history import Curvature
from .line_search import SearchResult
from .rules import BFGS, LBFGS, SR1, Rule
from .status import Status

__all__ = ["PBFGS"]


class PBFGS(SubspaceOptimizer):
    """P-BFGS (Li et al., TPAMI 2022, algorithm 2), with the step made safe.

    A step takes c = P^T g (pass 1 over the basis), the direction p = -B c with B an approximation
    of the d x d inverse Hessian, u = P p (pass 2), and searches along w + alpha u without touching
    the basis again. The projected gradient at the accepted point, which ``curvature="same_batch"``
    wants, is made in pass 1 of the next step.

    Constructing it puts the model at origin + P theta0 and logs a warning (logger ``dldr_ext``) if
    that moved the weights. From then on the weights are the optimizer's: it writes them from its
    own copy in each step, and refuses weights that something else has written (see `resync`).

    Parameters
    ----------
    params : iterable of Tensor
        The parameters that the subspace was made for.
    subspace : Subspace or GroupedSubspace
    lr : float or Tensor of one element
        First trial step of each search, > 0 (the step itself without a search); in
        ``param_groups``, so that schedulers work.
    update : "bfgs", "lbfgs" or "sr1"
        How B is learnt. "bfgs": a positive definite d x d matrix. "lbfgs": the last
        ``history_size`` pairs instead of a matrix, for d of many hundreds. "sr1": a d x d Hessian
        that may be indefinite, and the exact minimiser of its model in a trust region; where that
        is too long the search goes back along it.
    history_size : int
        Pairs that ``update="lbfgs"`` keeps.
    line_search_fn : "armijo", "strong_wolfe" or None
        Backtracking; bracketing and interpolation, which also uses gradients of the trials; none.
    c1 : float
        Sufficient decrease, in (0, 1): f(w + alpha u) < f(w) + c1 alpha c.p.
    backtrack : float
        Factor in (0, 1) from trial to trial (where a search interpolates: after a trial that is
        not finite).
    max_ls : int
        Largest number of trials of one search.
    interpolate : bool
        Armijo: choose the next trial from the losses of the last ones, not by ``backtrack``.
    first_step : float or None
        Longest first trial |alpha p| in theta while nothing is known of the curvature; None:
        no limit but ``lr``.
    curvature : "same_batch", "overlap" or "consecutive"
        Where y comes from. "same_batch": the change of the projected gradient of this step's
        closure from the old to the new point; costs one evaluation with backward, the accepted
        trial itself whenever that kept its graph, and a flat copy of the gradient (n numbers).
        "overlap": the change of the next step's closure between the same two points, on data that
        did not choose the step; costs one more evaluation with backward in each step, and the
        same copy. "consecutive": the change between the gradients of two consecutive steps,
        whatever their batches; costs nothing, and is the same if the closure always uses all data.
    damping : "powell" or None
        Powell's damping of y, which keeps B positive definite where the curvature is negative.
        Not used by "sr1", which has no need of it.
    max_iter : int
        Iterations of one step, all with the same closure, as in torch's LBFGS. From the second on
        the accepted trial is the first evaluation: one evaluation less for each.
    tolerance_grad : float
        A step whose |c| is not larger does not move (CONVERGED).
    weight_decay : float
        >= 0; wd / 2 |w|^2 is added to the objective: gradient, curvature and trials. What
        ``step`` returns and ``history`` holds is the closure's loss alone.
    maximize : bool
        Maximises what the closure returns.
    grad_scaler : torch.amp.GradScaler or None
        For float16 gradients: a closure that calls backward itself calls it on
        ``scaler.scale(loss)`` and returns ``loss``; for the other style the optimizer does so.
        The optimizer divides by the scale, makes it smaller after a gradient that is not finite
        and larger after ``growth_interval`` steps without: neither ``scaler.step`` nor
        ``scaler.unscale_`` nor ``scaler.update`` are called.
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
    relative curvature test. Only ``curvature="consecutive", damping=None`` with "bfgs" follows the
    published rule: B starts at I, is never scaled, and is updated when y.s > 1e-20. Together with
    ``line_search_fn="armijo", c1=0.4, backtrack=0.4, max_ls=20`` that is the published algorithm,
    except that a failed search does not step.

    A step that ends without moving (`Status`) leaves weights and buffers bitwise as they were; if
    it failed, B is back at its start. Where the loss or a gradient is not finite at weights whose
    loss or gradient nothing has looked at yet, the step goes back to the last point where both
    were finite (RESTORED). Random numbers (torch's, CPU and the parameters' CUDA devices) are the
    same in every evaluation of a step, and go on afterwards as after one evaluation. After an
    accepted step the buffers are as the evaluation at the accepted weights leaves them.

    The state that `state_dict` saves includes a flat copy of the weights, n numbers.
    """

    _walk: Walk

    @names_options
    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        lr: float | Tensor = 1.0,
        *,
        update: Literal["bfgs", "lbfgs", "sr1"] = "bfgs",
        history_size: int = 10,
        line_search_fn: Literal["armijo", "strong_wolfe"] | None = "armijo",
        c1: float = 1e-4,
        backtrack: float = 0.5,
        max_ls: int = 20,
        interpolate: bool = False,
        first_step: float | None = None,
        curvature: Literal["same_batch", "overlap", "consecutive"] = "same_batch",
        damping: Literal["powell"] | None = "powell",
        max_iter: int = 1,
        tolerance_grad: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
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
        defaults = checked(
            lr=lr,
            update=update,
            history_size=history_size,
            line_search_fn=line_search_fn,
            c1=c1,
            backtrack=backtrack,
            max_ls=max_ls,
            interpolate=interpolate,
            first_step=first_step,
            curvature=curvature,
            damping=damping,
            max_iter=max_iter,
            tolerance_grad=tolerance_grad,
            weight_decay=weight_decay,
            maximize=maximize,
            residual_lr=residual_lr,
            residual_momentum=residual_momentum,
        )
        replayed = buffer_list(buffers)
        scale = ScaleKeeper(grad_scaler)
        super().__init__(params, subspace, defaults, theta0)
        self._replay = Replay(self._params[0].device, replayed)
        self._scale = scale
        self._evaluator.scaler = scale.scaler
        self._rule = self._first_rule()
        self._pairs = Pairs()
        self._good = GoodPoint()

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
            and its gradient is wanted next (same-batch curvature, once B has been updated). For a
            batch in parts see `virtual_batch`.

        Returns
        -------
        Tensor or float
            The loss before the step, detached.

        Raises
        ------
        TypeError
            The closure is none, or does not return a scalar.
        ValueError
            The loss has no graph and the closure left no gradients; it is not finite in the very
            first step; something else wrote to the weights since the last step (see `resync`).
        Exception
            Whatever the closure raises. Weights and buffers are then as before the step.
        """
        if not callable(closure):
            raise TypeError(f"PBFGS: step: closure: expected a callable, got {closure!r}")
        self._check_untouched()
        self._scale.begin()
        self._replay.begin()
        try:
            first = self._first_evaluation(closure)
            loss = number(first)
            self._check_first_loss(loss)
            iterations = self.param_groups[0]["max_iter"]
            for k in range(iterations):
                more = k + 1 < iterations
                known: dict[str, Any] = {}
                status = self._iterate(closure, loss, k > 0, more, known)
                if not status.moved:
                    status = self._stay(status)
                self._record(loss, status, **known)
                if not more or "loss_after" not in known:
                    break
                self._replay.keep()
                loss = known["loss_after"]
        except BaseException:
            self._put_back()
            self._guard.remember()
            raise
        self._replay.finish()
        self._scale.end(self._status)
        self._guard.remember()
        return first.detach() if isinstance(first, Tensor) else first

    def _first_evaluation(self, closure: Closure) -> Loss:
        """Loss and gradients at the weights; with "overlap" at the last ones too, before that."""
        overlap = self._pairs.overlaps(self.param_groups[0]["curvature"])
        if overlap:
            self._walk.trial(-self._pairs.alpha)
        loss = self._evaluator.first(closure)
        self._replay.mark()
        if overlap:
            self._keep_gradient()
            self._walk.put_back()
            self._replay.rewind()
            loss = self._evaluator.again(closure, graph=True)
            self._evaluator.backward(loss)
        return loss

    def _iterate(
        self, closure: Closure, loss: float, inner: bool, more: bool, known: dict[str, Any]
    ) -> Status:
        """Direction, search and move, with the gradients at the weights in place.

        ``inner`` says that they are those of this closure's last accepted trial, ``more`` that
        another iteration may follow. Puts what it finds for the record into ``known``.
        """
        group, objective = self.param_groups[0], self._objective()
        if not self._evaluator.has_gradient():
            return Status.NO_GRADIENT
        if not math.isfinite(loss):
            return Status.NON_FINITE_LOSS
        gradient = gradients(self._params)
        c, pair = self._pairs.coordinates(
            self._projected, gradient, self._walk.point, objective, group["curvature"], inner
        )
        if pair is not None:
            known["curvature"] = self._learn(*pair)
        known["gradient_norm"] = size = float(torch.linalg.vector_norm(c))
        if (status := policy.at_start(size, group["tolerance_grad"])) is not None:
            return status
        self._good.see(self._theta, loss=True, gradient=True)
        direction = self._direction(c)
        known["condition"] = self._rule.condition
        if direction is None:  # |c|^2 over- or underflows
            return Status.LINE_SEARCH_FAILED
        p, slope = direction
        length = float(torch.linalg.vector_norm(p))
        residual = self._aim(p, c, gradient, objective)
        del gradient  # the next evaluation may use its memory
        trials = Trials(closure, self._evaluator, self._replay, self._params, self._walk, objective)
        wanted = more or group["curvature"] == "same_batch"
        before = objective.sign * loss
        result = search(trials, group, before, slope, length, wanted, self._rule.fresh)
        known["trials"] = result.evaluations
        status, after = result.status, math.nan
        if status.moved:
            status, after = self._settle(trials, result, wanted)
        if not status.moved:
            return status
        self._advance(result.alpha, p, residual)
        seen = residual is None and math.isfinite(after)
        self._good.see(self._theta, loss=seen, gradient=seen and wanted)
        self._pairs.put(result.alpha, p, c)
        self._rule.accepted(result.alpha, before - after)
        known["alpha"], known["step_length"] = result.alpha, result.alpha * length
        known["loss_after"] = trials.raw_loss
        return status

    def _settle(self, trials: Trials, result: SearchResult, wanted: bool) -> tuple[Status, float]:
        """Leaves the model as the accepted trial does; how that ended, and the objective there."""
        if not wanted and result.evaluations == 0:  # no search, and nothing to learn here
            self._walk.trial(result.alpha)
            return result.status, math.nan
        after, slope = trials.settle(result.alpha, gradient=wanted), 0.0
        if wanted:
            # NaN and infinity reach the slope whatever they are multiplied with.
            slope = float(torch.dot(self._keep_gradient(), self._walk.direction))
        return policy.after_search(after, slope) or result.status, after

    def _stay(self, status: Status) -> Status:
        """Ends an iteration that did not move."""
        if self._scale.overflowed(status):
            self._put_back()
            self._pairs.drop()
        elif policy.forgets(status):
            good = self._good.instead(status)
            if good is not None:
                status = Status.RESTORED
                self._theta.copy_(good)
                self._walk.retreat(self._to_basis(self._theta))
            self._put_back()
            self._reset()
            self._walk.forget_residual()
        return status

    def _keep_gradient(self) -> Tensor:
        return self._pairs.keep(gradients(self._params), self._walk.point, self._scale.value)

    def _learn(self, s: Tensor, y: Tensor, hs: Tensor) -> Curvature:
        damped = self.param_groups[0]["damping"] == "powell"
        return self._rule.learn(s, y, hs, damped=damped, published=self._published_rule())

    def _published_rule(self) -> bool:
        wanted = {"update": "bfgs", "curvature": "consecutive", "damping": None}
        return all(self.param_groups[0][key] == value for key, value in wanted.items())

    def _first_rule(self) -> Rule:
        group, guess = self.param_groups[0], self._first_guess()
        if group["update"] == "lbfgs":
            return LBFGS(guess, group["history_size"])
        return BFGS(guess) if group["update"] == "bfgs" else SR1(guess)

    def _first_guess(self) -> Tensor:
        known = None if self._published_rule() else self._subspace.singular_values
        return bfgs.first_guess(self._subspace.dim, known)

    def _reset(self) -> None:
        """Forgets all curvature."""
        self._rule.guess = self._first_guess()
        self._rule.reset()
        self._pairs.drop()

    def _objective(self) -> Objective:
        group = self.param_groups[0]
        sign = -1.0 if group["maximize"] else 1.0
        return Objective(sign, float(group["weight_decay"]), self._scale.value)

    def _direction(self, c: Tensor) -> tuple[Tensor, float] | None:
        """p = -B c and its slope, from the first guess if B has none."""
        direction = self._rule.direction(c)
        if direction is None:
            self._reset()
            direction = self._rule.direction(c)
        return direction

    def _aim(
        self, p: Tensor, c: Tensor, gradient: list[Tensor], objective: Objective
    ) -> Tensor | None:
        """u = P p; and the momentum of g - P P^T g as it will be if the step is accepted."""
        group, theta = self.param_groups[0], self._to_basis(p)
        if group["residual_lr"] == 0.0:
            self._walk.aim(theta)
            return None
        whole = objective.gradient(gradient, self._walk.point)
        return self._walk.aim_outside(theta, self._to_basis(c), whole, group["residual_momentum"])

    def _advance(self, alpha: float, p: Tensor, residual: Tensor | None) -> None:
        """Carries theta and the flat point along with the accepted weights."""
        self._theta.add_(p, alpha=alpha)
        self._walk.advance(alpha, self._to_basis(self._theta))
        if residual is not None:
            self._walk.leave_subspace(residual, self.param_groups[0]["residual_lr"])

    def _put_back(self) -> None:
        """Weights and buffers as before the step, bit for bit."""
        self._walk.put_back()
        self._replay.restore_buffers()

    # What the base class asks for.

    def resync(self) -> None:
        """Accepts weights that something else wrote, and goes on from there.

        Without it a step refuses such weights. With ``residual_lr=0`` they are moved to the
        nearest point of the subspace (with a warning in the logger ``dldr_ext`` if that is further
        than rounding); otherwise they stay, and the origin moves. B keeps what it has learnt.
        """
        if self.param_groups[0]["residual_lr"] == 0.0:
            super().resync()
        else:
            self._set_theta(self._first_theta("PBFGS", "current"))
            weights = flatten(self._params, self._walk.point.dtype)
            self._walk.stay_outside(self._to_basis(self._theta), weights)
            self._guard.remember()
        self._pairs.drop()
        self._good.forget()

    def _expected_weights(self) -> Tensor:
        return self._walk.point

    def _start_at(self, point: Tensor) -> None:
        self._walk = Walk(self._subspace, self._params, point)

    def change_subspace(self, subspace: AffineSubspace) -> None:
        self._learn_early()
        super().change_subspace(subspace)

    change_subspace.__doc__ = SubspaceOptimizer.change_subspace.__doc__

    def _carry(self, m: Tensor) -> None:
        self._rule.carry(m, self._first_guess())
        # What gradients before the change were in the new directions is not known.
        self._pairs, self._good = Pairs(), GoodPoint()

    def _learn_early(self) -> None:
        """What the next step would learn first, to the bit."""
        if self.param_groups[0]["curvature"] == "same_batch":
            pair = self._pairs.early(self._projected, self._walk.point, self._objective())
            if pair is not None:
                self._learn(*pair)

    def _own_state(self) -> dict[str, Any]:
        self._learn_early()
        return {
            **self._walk.state(),
            **self._pairs.state(self._walk.direction),
            **self._rule.state(),
            **self._good.state(),
            **self._scale.state(),
        }

    def _checked_own_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        numbers = {
            "since_anchor": int,
            "last_shift": float,
            "previous_alpha": float,
            "loss_seen": bool,
            "gradient_seen": bool,
            "finite_steps": int,
        }
        short = ("previous_step", "previous_coordinates", "previous_believed", "good")
        flat = ("residual", "moved_origin", "previous_direction")
        optional = dict.fromkeys(short, theta) | dict.fromkeys(flat, self._walk.point)
        own = {key: kind(state[key]) for key, kind in numbers.items()}
        for key, like in optional.items():
            own[key] = None if state[key] is None else self._saved_tensor(state, key, like)
        own["point"] = self._saved_tensor(state, "point", self._walk.point)
        try:
            own["rule"] = self._rule.checked(state, len(theta))
        except ValueError as error:
            raise ValueError(f"PBFGS: state_dict: {error}") from None
        origin = own["moved_origin"]
        self._check_point(own["point"], self._subspace.origin if origin is None else origin, theta)
        return own

    def _adopt(self, own: dict[str, Any]) -> None:
        self._walk.load(own)
        if own["previous_direction"] is not None:
            self._walk.direction = own["previous_direction"]
        self._rule = self._first_rule()
        self._rule.load(own["rule"])
        for part in (self._pairs, self._good, self._scale):
            part.load(own)
