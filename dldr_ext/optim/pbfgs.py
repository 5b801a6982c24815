"""P-BFGS: a quasi-Newton method on the coordinates of a subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..collectives.process_group import as_list, failing_together, ranks_for
from ..subspace.base import AffineSubspace
from ..tensors.buffers import checked_buffers
from ..tensors.parameters import flatten
from .algebra.bfgs import Direction, InverseHessian, Pair, Rule
from .algebra.line_search import SearchResult
from .base import SubspaceOptimizer
from .metric import Metric, Start
from .options import check_pbfgs_options, names_options
from .state_dict import check_point, saved_tensor
from .status import Curvature, Iteration, Status
from .step import policy
from .step.closure import Closure, Loss, LossT, check_closure, number
from .step.curvature_pairs import CurvaturePairs
from .step.grad_scale import ScaleKeeper
from .step.iterate import Iterate
from .step.line_trials import Trials, read_together, search
from .step.objective import Objective
from .step.plateau import Agreement, OtherLosses
from .step.replay import Replay
from .step.restore_point import RestorePoint

# Losses of one function at one point differ by less, relative: by rounding, and the ranks' order.
_SAME = 1e-6
# And two evaluations at one point by more than this only where they are not of one function.
_OTHER = 1e-2


class PBFGS(SubspaceOptimizer):
    """P-BFGS (Li et al., TPAMI 2022, algorithm 2), with the step made safe.

    A step takes c = P^T g (pass 1 over the basis), the direction p = -H c with H an approximation
    of the d x d inverse Hessian, u = P p (pass 2), and searches along w + alpha u without touching
    the basis again. The projected gradient at the accepted point, which ``curvature="same_batch"``
    wants, is made in pass 1 of the next step.

    Constructing it puts the model at origin + P theta0 and says so (logger ``dldr_ext``, level
    INFO) if that moved the weights. From then on the weights are the optimizer's: it writes them
    from its own copy in each step, and refuses weights that something else has written (see
    `resync`).

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        The parameters that the subspace was made for; groups may have their own ``weight_decay``.
    subspace : Subspace or GroupedSubspace
    lr : float or Tensor of one element
        First trial step of each search, > 0 (the step itself without a search), and an upper bound
        of it where the last step has seen the same function (see Notes); the first search of a run
        in the metric starts ``lr`` sqrt(d) standard deviations away; in ``param_groups``, so that
        schedulers work.
    line_search_fn : "armijo", "strong_wolfe" or None
        Backtracking; bracketing and interpolation, which also uses gradients of the trials; none.
    c1 : float
        Sufficient decrease, in (0, 1): f(w + alpha u) < f(w) + c1 alpha c.p.
    backtrack : float
        In (0, 1): a trial that follows a rejected one is so much shorter at least, by exactly that
        factor after one that is not finite and with the published rule.
    max_ls : int
        Largest number of trials of one search.
    max_iter : int
        Iterations of one step, all with the same closure, as in torch's LBFGS. From the second on
        the accepted trial is the first evaluation: one evaluation less for each.
    tolerance_grad : float
        A step whose |c| is not larger does not move (CONVERGED).
    curvature : "same_batch" or "consecutive"
        Where y comes from. "same_batch": the change of the projected gradient of this step's
        closure from the old to the new point; costs one evaluation with backward, the accepted
        trial itself whenever that kept its graph, and a flat copy of the gradient (n numbers).
        "consecutive": the change between the gradients of two consecutive steps, whatever their
        batches; costs nothing, and is the same if the closure always uses all data.
    damping : "powell" or None
        Powell's damping of y, which keeps H positive definite where the curvature is negative.
    metric : "auto", "trajectory" or None
        What theta is measured in. "trajectory": in the spread s_i = sigma_i / sqrt(T) of the T
        recorded snapshots along each direction (`Subspace.spread`), so that a step of length 1 is
        one standard deviation of the recorded weights whatever the network; H starts at diag(s^2).
        None: plain coordinates, H starts at I. "auto": "trajectory" where the subspace knows its
        singular values. `theta` is the coordinates of the basis with either.
    weight_decay : float
        >= 0; wd / 2 |w|^2 is added to the objective: gradient, curvature and trials; of groups with
        their own the sum. What ``step`` returns and ``history`` holds is the closure's loss alone.
    maximize : bool
        Maximises what the closure returns.
    residual_lr : float
        Learning rate, >= 0, of the part g - P P^T g of the gradient outside the subspace, by which
        the weights move too after each accepted step (P+-BFGS). The weights then leave
        origin + P theta; costs 2 n numbers and no pass of its own.
    residual_momentum : float
        Momentum of that part, in [0, 1).
    buffers : module, iterable of Tensor, or None
        What an evaluation changes besides random state (batch-norm statistics): pass the model.
        Every evaluation of a step sees its buffers, found by name, as before the step, so that
        they are updated once a step; tensors that are plain attributes of a module are not seen.
    grad_scaler : torch.amp.GradScaler or None
        For float16 gradients: a closure that calls backward itself calls it on
        ``scaler.scale(loss)`` and returns ``loss``; for the other style the optimizer does so.
        The optimizer divides by the scale, makes it smaller after a gradient that is not finite
        and larger after ``growth_interval`` steps without: neither ``scaler.step`` nor
        ``scaler.unscale_`` nor ``scaler.update`` are called.
    process_group : ProcessGroup, DeviceMesh, module, "world" or None
        The ranks that step together, each with a closure of its own batch: the objective is the
        mean of their losses, each counting the same. None: this process alone. Every rank calls
        `step`, `state_dict` and the like; d + 1 numbers are summed for a gradient, one for a
        trial, one for a slope. A module in ``DistributedDataParallel`` means its group, and that
        its own sum of n numbers is left out (`no_sync`).
    theta0 : Tensor of shape (d,), "current" or None
        Where to start; None is 0, "current" the projection of the current weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing has moved then.

    See Also
    --------
    PSGD : SGD with momentum on the coordinates.
    InSubspace : any optimizer of torch on the coordinates.
    virtual_batch : a closure of a batch that is evaluated in parts.

    Notes
    -----
    A rejected trial of "armijo" is followed by the minimiser of the parabola through it, and by
    none where the slope promises less than the dtype of the loss can show. Where a step starts with
    the loss that the last one ended with, it sees the same function. If the gradient at the
    accepted point is wanted anyway, the first trial is then the one that would lower a parabola by
    as much as the last step has done, and there, and as long as H has learnt nothing, "armijo"
    searches as "strong_wolfe" does: steps get longer too. A run in the metric of the trajectory
    begins with a step to the mean of its snapshots, where that is known and the loss is lower
    there; the first trial of its first search has a length of ``lr`` sqrt(d), the distance of the
    snapshots from their mean, however flat the loss is. With ``max_iter`` above 1 any other first
    trial of an H that has learnt nothing has a length of 1 at most in the metric. H is scaled up
    before its first update where the curvature allows longer steps; updates use a relative
    curvature test.
    Only ``curvature="consecutive", damping=None`` follows the published rule: ``lr`` is the first
    trial always, trials only get shorter, by ``backtrack``, H is never scaled, and is updated when
    y.s > 1e-20. Together with ``line_search_fn="armijo", c1=0.4, backtrack=0.4, max_ls=20,
    metric=None`` that is the published algorithm, except that a failed search does not step.

    A step that ends without moving (`Status`) leaves weights and buffers bitwise as they were; if
    it failed, H is back at its start. Where the loss or a gradient is not finite at weights whose
    loss or gradient nothing has looked at yet, the step goes back to the last point where both
    were finite (RESTORED). Random numbers are the same in every evaluation of a step, and go on
    afterwards as after one evaluation: torch's on the CPU and all CUDA devices, numpy's, those of
    the module ``random``, and those of generators that the closure reaches. After an accepted step
    the buffers are as the evaluation at the accepted weights leaves them.

    On a GPU, with "armijo" and without ``weight_decay``, ``grad_scaler`` and ``max_iter``, all
    d x d algebra runs there in one kernel as soon as H has learnt something, and the first trial,
    always ``lr``, is made before the host has read any number of the step: it waits once a trial.
    The first trial is then made even where the gradient turns out to be zero or not finite, and a
    gradient that is not finite at an accepted point is found by the next step, which goes back
    (RESTORED).

    The state that `state_dict` saves includes a flat copy of the weights, n numbers.

    References
    ----------
    Li, Tan, Huang, Tao, Liu, Huang, "Low Dimensional Trajectory Hypothesis is True: DNNs Can Be
    Trained in Tiny Subspaces", TPAMI 2022 (arXiv:2103.11154), algorithm 2. Nocedal & Wright,
    "Numerical Optimization", 2nd edition, 2006, sections 3.1, 3.5 and 6.1.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import PBFGS, Subspace
    >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    >>> subspace = Subspace(torch.eye(2, 3), x.detach().clone())  # the first two coordinates
    >>> optimizer = PBFGS([x], subspace)
    >>> for _ in range(2):
    ...     loss = optimizer.step(lambda: x.square().sum())
    >>> x.tolist(), optimizer.theta.tolist()
    ([0.0, 0.0, 3.0], [-1.0, -2.0])
    >>> print(optimizer.history[0])
    step 1: loss 14, 2 trials, step length 2.24, accepted
    """

    flat_state = ("point", "residual", "moved_origin")
    _iterate: Iterate
    _devices_ahead = ("cuda",)  # where numbers take long to reach the host

    @names_options
    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        lr: float | Tensor = 1.0,
        *,
        line_search_fn: Literal["armijo", "strong_wolfe"] | None = "armijo",
        c1: float = 1e-4,
        backtrack: float = 0.5,
        max_ls: int = 20,
        max_iter: int = 1,
        tolerance_grad: float = 0.0,
        curvature: Literal["same_batch", "consecutive"] = "same_batch",
        damping: Literal["powell"] | None = "powell",
        metric: Metric = "auto",
        weight_decay: float = 0.0,
        maximize: bool = False,
        residual_lr: float = 0.0,
        residual_momentum: float = 0.9,
        buffers: nn.Module | Iterable[Tensor] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: Any = None,
        theta0: Tensor | Literal["current"] | None = None,
    ) -> None:
        params = as_list(params)
        ranks = ranks_for("PBFGS", process_group, params)
        with failing_together(ranks):
            defaults = check_pbfgs_options(
                lr=lr,
                line_search_fn=line_search_fn,
                c1=c1,
                backtrack=backtrack,
                max_ls=max_ls,
                max_iter=max_iter,
                tolerance_grad=tolerance_grad,
                curvature=curvature,
                damping=damping,
                weight_decay=weight_decay,
                maximize=maximize,
                residual_lr=residual_lr,
                residual_momentum=residual_momentum,
            ) | {"metric": metric}
            replayed, self._scale = checked_buffers(buffers), ScaleKeeper(grad_scaler)
            super().__init__(params, subspace, defaults, theta0, ranks)
        self._replay = Replay(replayed)
        self._evaluator.alone = True
        self._evaluator.scaler = self._scale.scaler
        self._inverse_hessian = InverseHessian(self._initial())
        self._pairs = CurvaturePairs()
        self._restore_point = RestorePoint()
        self._learnt_early: Curvature = "none"  # since the last record
        self._other_losses, self._agreement = OtherLosses(), Agreement()
        self._forget_decrease()

    @torch._disable_dynamo  # in a loop that is compiled too: a step runs as it stands
    @torch.no_grad()
    def step(self, closure: Callable[[], LossT]) -> LossT:  # type: ignore[override]
        """Take one step.

        Parameters
        ----------
        closure : callable
            Evaluates the loss of one batch at the current weights; called several times, for the
            same batch. Either it zeroes the gradients, calls backward and returns the loss (as for
            torch's LBFGS), or it only returns a loss with a graph: then the optimizer calls
            backward where a gradient is needed, gradients need not be zeroed, and the trials of
            the search run under ``torch.no_grad()``, except where the gradient of an accepted one
            is wanted next (same-batch curvature), or where a closure that takes derivatives inside
            its loss has failed so. For a batch in parts see `virtual_batch`.

        Returns
        -------
        Tensor or float
            The loss before the step, detached.

        Raises
        ------
        TypeError
            The closure is none, or does not return a scalar.
        ValueError
            The loss has no graph and the closure left no gradients, or those of another loss,
            clipped ones, or ones added to what was there before the step; it is not finite in the
            very first step; something else wrote to the weights since the last step (see `resync`).
        Exception
            Whatever the closure raises. Weights and buffers are then as before the step.

        See Also
        --------
        virtual_batch : a closure of a batch that is evaluated in parts.
        """
        check_closure("PBFGS", closure)
        self._check_untouched()
        self._scale.begin()
        self._replay.begin(closure)
        try:
            first = self._evaluator.first(closure)
            self._replay.mark()
            loss = self._iterations(closure, first)
        except BaseException:
            self._put_back()
            self._guard.remember()
            raise
        self._replay.finish()
        self._scale.end(self._status)
        self._remember()
        if self._ranks is not None:
            mean = torch.full_like(first, loss) if isinstance(first, Tensor) else loss
            return cast(LossT, mean)
        return cast(LossT, first.detach() if isinstance(first, Tensor) else first)

    def _iterations(self, closure: Closure, first: Loss) -> float:
        """Take the iterations of one step, and return the loss before the first of them."""
        before, count = math.nan, self.param_groups[0]["max_iter"]
        for k in range(count):
            more = k + 1 < count
            iteration = self._iteration(closure, first, inner=k > 0, more=more)
            if not iteration.status.moved:
                iteration.status = self._stay(iteration.status)
            self._record(**vars(iteration))
            before = before if k else iteration.loss
            if not more or math.isnan(iteration.loss_after):
                break
            self._replay.keep()
            first = iteration.loss_after
        return before

    def _iteration(self, closure: Closure, first: Loss, *, inner: bool, more: bool) -> Iteration:
        """Find a direction, search along it and move, with the gradients at the weights in place.

        ``first`` is the closure's loss at the weights; ``inner`` says that it is that of the last
        accepted trial of this step, ``more`` that another iteration may follow.

        Where numbers take long to reach the host the step runs ahead of it: its first trial is made
        before any of them is read, so that the host waits once a trial.
        """
        group, hessian = self.param_groups[0], self._inverse_hessian
        same_batch = group["curvature"] == "same_batch"
        wanted = more or same_batch  # the gradient at the accepted point
        ahead, iteration = self._runs_ahead() and not hessian.fresh, Iteration()
        if not ahead and self._ends_at_once(iteration, first, inner):
            return iteration
        # Project: pass 1 over the basis.
        gradient, objective = self._problem.gradients(), self._objective()
        c, pair, loss = self._pairs.coordinates(
            self._problem, first, gradient, self._iterate.point, objective,
            same_batch=same_batch, inner=inner,
        )  # fmt: skip
        # Update H, then the direction p = -H c.
        fresh = hessian.fresh and pair is None
        direction = hessian.update(c, pair, self._rule(), ahead=ahead)
        if not ahead and self._ends(iteration, number(loss), direction, pair):
            return iteration
        if self._goes_to_mean(iteration, closure, objective, wanted):
            return iteration
        # Pass 2: u = P p, along which all trials are.
        residual = self._aim(direction.p, c, gradient, objective)
        gradient.clear()  # the next evaluation may use its memory
        trials = Trials(closure, self._problem, self._replay, self._iterate, objective)
        if ahead and self._ends_after_a_trial(
            iteration, trials, loss, direction, pair, graph=wanted and not fresh
        ):
            return iteration
        # Search.
        start = objective.sign * iteration.loss
        decrease = None if ahead else self._decrease(iteration.loss)
        begins = self._start()
        result = search(
            trials, group, start, direction.slope, wanted=wanted, fresh=hessian.fresh,
            published=self._rule().published, decrease=decrease, reach=begins and begins.reach,
            resolution=self._evaluator.resolution(iteration.loss),
        )  # fmt: skip
        # To look at the gradient would take a wait more, or a sum: the next step has it anyway.
        look = not ahead and self._ranks is None
        iteration.status, after, slope = self._settle(trials, result, wanted, look)
        iteration.trials += result.evaluations
        # Accept.
        if iteration.status.moved:
            self._advance(result.alpha, direction.p, residual)
            seen = residual is None and math.isfinite(after)
            self._restore_point.see(self._theta, loss=seen, gradient=seen and wanted and look)
            self._pairs.put(result.alpha, direction.p, c)
            iteration.alpha = result.alpha
            iteration.step_length = result.alpha * direction.length
            iteration.loss_after = trials.raw_loss
            if wanted and look and not objective.decay:
                slopes = direction.slope + objective.sign * slope
                told = self._agreement.see(after - start, 0.5 * result.alpha * slopes, start)
                self._say(told)
            self._last_loss, self._last_decrease = trials.raw_loss, start - after
        return iteration

    def _ends_at_once(self, iteration: Iteration, first: Loss, inner: bool) -> bool:
        """Return whether loss and gradients end the iteration before anything is computed."""
        if self._ranks is not None and not inner:
            return False  # the ranks' mean loss comes with their projected gradients
        iteration.loss = number(first)
        self._check_first_loss(iteration.loss)
        if self._ranks is None and not self._evaluator.has_gradient():
            iteration.status = Status.NO_GRADIENT
        elif not math.isfinite(iteration.loss):
            iteration.status = Status.NON_FINITE_LOSS
        return iteration.status is not Status.INITIAL

    def _ends_after_a_trial(
        self,
        iteration: Iteration,
        trials: Trials,
        loss: Loss,
        direction: Direction,
        pair: Pair | None,
        graph: bool,
    ) -> bool:
        """Make the first trial, read all numbers in one piece, and return whether they end it."""
        hessian, numbers = self._inverse_hessian, direction.unread
        assert numbers is not None
        if isinstance(loss, Tensor):  # the trial may write its loss into the same tensor
            loss = loss.detach().clone()
        try:
            after = trials.run_ahead(float(self.param_groups[0]["lr"]), graph)
        except BaseException:
            hessian.read(direction, numbers.tolist())  # H has learnt, whatever becomes of the step
            raise
        change = numbers.new_zeros(1) if pair is None else pair.y.sum().reshape(1)
        value, trials.raw_loss, *values, total = read_together(
            [loss, after], torch.cat([numbers, change])
        )
        hessian.read(direction, values)
        ends = self._ends(iteration, value, direction, pair, math.isfinite(total))
        if ends:
            self._put_back()
        return ends

    def _ends(
        self,
        iteration: Iteration,
        loss: float,
        direction: Direction,
        pair: Pair | None,
        finite: bool | None = None,
    ) -> bool:
        """Return whether the numbers of the iteration, which the host now has, end it.

        ``finite`` says whether the pair's y is, where that has been read.
        """
        iteration.loss = loss
        self._check_first_loss(loss)
        group = self.param_groups[0]
        if pair is not None and group["curvature"] == "same_batch":
            # Alone, the gradient at the end of the last step was looked at there.
            if finite is None:
                finite = self._ranks is not None and bool(pair.y.isfinite().all())
            if finite:
                self._restore_point.see_gradient(self._theta)
        iteration.curvature = self._learnt_early if pair is None else direction.curvature
        self._learnt_early = "none"
        iteration.gradient_norm = direction.gradient_norm
        if not math.isfinite(loss):
            iteration.status = Status.NON_FINITE_LOSS
            return True
        status = policy.at_start(direction.gradient_norm, group["tolerance_grad"])
        if status is None:
            self._restore_point.see(self._theta, loss=True, gradient=True)
            if direction.from_initial:
                self._reset()
            iteration.condition = self._inverse_hessian.condition
            status = None if direction.downhill else Status.LINE_SEARCH_FAILED
        iteration.status = status or Status.INITIAL
        return status is not None

    def _settle(
        self, trials: Trials, result: SearchResult, wanted: bool, look: bool
    ) -> tuple[Status, float, float]:
        """Leave the model as the accepted trial does; return how that ended, objective and slope.

        Without ``look`` a gradient there that is not finite is left to the next step to find.
        """
        if not result.status.moved:
            return result.status, math.nan, 0.0
        if not wanted and result.evaluations == 0:  # no search, and nothing to learn here
            self._iterate.trial(result.alpha)
            return result.status, math.nan, 0.0
        after, slope = trials.settle(result.alpha, gradient=wanted), 0.0
        if abs(after - result.loss) > _OTHER * max(abs(after), abs(result.loss)):
            self._say(self._other_losses.see(result.loss, after))
        if wanted:
            gradients, point = self._problem.gradients(), self._iterate.point
            kept = self._pairs.keep(gradients, point, self._scale.value)
            # NaN and infinity reach the slope whatever they are multiplied with.
            slope = float(torch.dot(kept, self._iterate.direction)) if look else 0.0
        return policy.after_search(after, slope) or result.status, after, slope

    def _stay(self, status: Status) -> Status:
        """End an iteration that did not move."""
        if self._scale.overflowed(status):
            self._put_back()
            self._pairs.drop()
        elif policy.forgets(status):
            theta = self._restore_point.instead(status)
            if theta is not None:
                status = Status.RESTORED
                self._theta.copy_(theta)
                self._iterate.retreat(self._to_basis(self._theta))
                self._restore_point.see(self._theta, loss=True, gradient=True)
            self._put_back()
            self._reset()
            self._iterate.forget_residual()
        return status

    @property
    def _vector_device(self) -> torch.device:
        """Where theta and all other d-vectors are: with the weights if a step can run ahead."""
        return self._params[0].device if self._is_far() else super()._vector_device

    def _is_far(self) -> bool:
        """Return whether the host waits long for numbers of the weights' device."""
        return self._params[0].device.type in self._devices_ahead

    def _runs_ahead(self) -> bool:
        """Return whether the first trial can be made before the host knows any number."""
        group = self.param_groups[0]
        return (
            self._is_far()
            and group["line_search_fn"] == "armijo"
            and not self._decay()
            and group["max_iter"] == 1
            and group["lr"] != 0.0
            and self._scale.scaler is None
            and self._evaluator.has_gradient()
        )

    def _rule(self) -> Rule:
        group = self.param_groups[0]
        published = group["curvature"] == "consecutive" and group["damping"] is None
        return Rule(damped=group["damping"] == "powell", published=published)

    def _initial(self) -> Tensor:
        """Return the H to start from."""
        return torch.diag(self._units().square())

    def _reset(self) -> None:
        """Forget all curvature."""
        self._inverse_hessian.initial = self._initial()
        self._inverse_hessian.reset()
        self._pairs.drop()
        self._forget_decrease()

    def _decrease(self, loss: float) -> float | None:
        """Return what the last step has lowered the objective by, if it was the same function.

        It was if it ended at this loss, but for rounding; another batch gives another number.
        """
        same = math.isclose(loss, self._last_loss, rel_tol=_SAME)
        return self._last_decrease if same and self._last_decrease > 0.0 else None

    def _start(self) -> Start | None:
        """Return what the trajectory says of where to go first, until a run has begun."""
        begins = self._steps <= 1  # a step to the mean may come before the first search
        measured = self._spread is not None and self.param_groups[0]["metric"] is not None
        return Start(self._units(), self._subspace.mean) if begins and measured else None

    def _goes_to_mean(
        self, iteration: Iteration, closure: Closure, objective: Objective, wanted: bool
    ) -> bool:
        """Go to the mean of the snapshots as a run begins, if the loss is lower there."""
        group, start = self.param_groups[0], None if self._steps else self._start()
        searches = group["line_search_fn"] is not None and float(group["lr"]) != 0.0
        way = None if start is None or not searches else start.way(self._theta)
        if way is None or self._rule().published or group["residual_lr"] != 0.0:
            return False
        self._iterate.aim(self._to_basis(way))
        trials = Trials(closure, self._problem, self._replay, self._iterate, objective)
        after, iteration.trials, look = trials.loss(1.0, graph=wanted), 1, self._ranks is None
        if not after < objective.sign * iteration.loss:
            return False
        found = SearchResult(Status.ACCEPTED, 1.0, after, math.nan, 1, 1.0)
        status, after, _ = self._settle(trials, found, wanted, look)
        if not status.moved:
            return False
        self._advance(1.0, way, None)
        self._restore_point.see(self._theta, loss=math.isfinite(after), gradient=wanted and look)
        iteration.status, iteration.loss_after, iteration.alpha = status, trials.raw_loss, 1.0
        iteration.step_length = float(torch.linalg.vector_norm(way))
        return True

    def _forget_decrease(self) -> None:
        self._last_loss = self._last_decrease = math.nan

    def _objective(self) -> Objective:
        return replace(super()._objective(), scale=self._scale.value)

    def _aim(
        self, p: Tensor, c: Tensor, gradient: list[Tensor], objective: Objective
    ) -> Tensor | None:
        """Set u = P p, and return the momentum of g - P P^T g as an accepted step leaves it."""
        group, iterate = self.param_groups[0], self._iterate
        if group["residual_lr"] == 0.0:
            iterate.aim(self._to_basis(p))
            return None
        mean = self._problem.mean_gradient(gradient, iterate.point.dtype)
        whole = objective.gradient(mean, iterate.point)
        momentum = group["residual_momentum"]
        return iterate.aim_outside(self._to_basis(p), self._to_basis(c), whole, momentum)

    def _advance(self, alpha: float, p: Tensor, residual: Tensor | None) -> None:
        """Move theta and the flat point along with the accepted weights."""
        self._theta.add_(p, alpha=alpha)
        self._iterate.advance(alpha, self._to_basis(self._theta))
        if residual is not None:
            lr, objective = self.param_groups[0]["residual_lr"], self._objective()
            self._iterate.leave_subspace(residual, lr)
            self._pairs.leave_subspace(residual, lr, objective)

    def _put_back(self) -> None:
        """Put back weights and buffers as before the step, bit for bit."""
        self._iterate.put_back()
        self._replay.restore_buffers()

    # What the base class asks for.

    def resync(self) -> None:
        """Accept weights that something else wrote, and go on from there.

        Without it a step refuses such weights. With ``residual_lr=0`` they are moved to the
        nearest point of the subspace (with a warning in the logger ``dldr_ext`` if that is further
        than rounding); otherwise they stay, and the origin moves. H keeps what it has learnt.
        """
        if self.param_groups[0]["residual_lr"] == 0.0:
            super().resync()
        else:
            self._check_parameters()
            self._set_theta(self._first_theta("current"))
            weights = flatten(self._params, self._iterate.point.dtype)
            self._iterate.stay_outside(self._to_basis(self._theta), weights)
            self._remember()
        self._pairs.drop()
        self._restore_point.forget()
        self._forget_decrease()

    def _expected_weights(self) -> Tensor:
        return self._iterate.written()

    def _transfer(self, m: Tensor) -> None:
        self._inverse_hessian.transfer(m, self._initial())
        # What gradients before the change were in the new directions is not known.
        self._pairs, self._restore_point = CurvaturePairs(), RestorePoint()
        self._forget_decrease()

    def _start_at(self, point: Tensor) -> None:
        self._iterate = Iterate(self._subspace, self._params, point)

    def _learn_early(self) -> None:
        if self.param_groups[0]["curvature"] == "same_batch":
            pair = self._pairs.early(self._problem, self._iterate.point, self._objective())
            if pair is not None:
                self._learnt_early = self._inverse_hessian.learn(pair, self._rule())

    def _method_state(self) -> dict[str, Any]:
        hessian = self._inverse_hessian
        return {
            **self._iterate.state(),
            **self._pairs.state(),
            "inverse_hessian": hessian.matrix.clone(),
            "fresh": hessian.fresh,
            "last_loss": self._last_loss,
            "last_decrease": self._last_decrease,
            **self._restore_point.state(),
            **self._scale.state(),
        }

    def _checked_method_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        numbers = {
            "since_anchor": int,
            "last_shift": float,
            "loss_seen": bool,
            "gradient_seen": bool,
            "finite_steps": int,
            "fresh": bool,
            "last_loss": float,
            "last_decrease": float,
        }
        short = ("previous_step", "previous_coordinates", "previous_predicted", "good")
        optional = dict.fromkeys(short, theta)
        optional |= dict.fromkeys(self.flat_state[1:], self._iterate.point)
        checked = {key: kind(state[key]) for key, kind in numbers.items()}
        for key, like in optional.items():
            checked[key] = None if state[key] is None else saved_tensor(self, state, key, like)
        point = checked["point"] = saved_tensor(self, state, "point", self._iterate.point)
        matrix = self._inverse_hessian.matrix
        checked["inverse_hessian"] = saved_tensor(self, state, "inverse_hessian", matrix)
        origin = checked["moved_origin"]
        check_point(self, point, self._subspace.origin if origin is None else origin, theta)
        return checked

    def _adopt(self, state: dict[str, Any]) -> None:
        self._iterate.load(state)
        hessian = self._inverse_hessian = InverseHessian(self._initial())
        hessian.matrix, hessian.fresh = state["inverse_hessian"], state["fresh"]
        self._last_loss, self._last_decrease = state["last_loss"], state["last_decrease"]
        for memory in (self._pairs, self._restore_point, self._scale):
            memory.load(state)
