"""The mechanics of PBFGS: one iteration, and what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..collectives.process_group import Ranks
from ..subspace.base import AffineSubspace
from ..tensors.parameters import flatten
from .algebra import bfgs
from .algebra.line_search import SearchResult
from .algebra.update_rules import BFGS
from .base import SubspaceOptimizer
from .state_dict import check_point, saved_tensor
from .status import Curvature, Status
from .step import policy
from .step.closure import Closure, Loss, number
from .step.curvature_pairs import Pairs
from .step.grad_scale import ScaleKeeper
from .step.iterate import Walk
from .step.line_trials import Start, Trials, read_together, search
from .step.objective import Objective
from .step.replay import Replay, buffer_list
from .step.restore_point import GoodPoint


class _Project:
    """Projects lists of tensors, and takes a loss along the first time: see `_measured`."""

    def __init__(self, measured: Callable[..., tuple[Tensor, Loss | None]], loss: Loss | None):
        self._measured, self._own = measured, loss
        self.loss: Loss | None = None

    def __call__(self, *lists: list[Tensor], same: int = 0) -> Tensor:
        c, self.loss = self._measured(self._own, *lists, same=same)
        return c


class QuasiNewton(SubspaceOptimizer):
    """Binds together what is kept between steps; each part has a module of its own.

    The flat point and the direction (`Walk`), curvature (`BFGS`), the last step (`Pairs`), the way
    back (`GoodPoint`), random state and buffers (`Replay`), the scale of gradients (`ScaleKeeper`).
    """

    flat_state = ("point", "residual", "moved_origin")
    _walk: Walk
    _devices_ahead = ("cuda",)  # where numbers take long to reach the host

    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        defaults: dict[str, Any],
        theta0: Tensor | Literal["current"] | None,
        buffers: nn.Module | Iterable[Tensor] | None,
        grad_scaler: torch.amp.GradScaler | None,
        ranks: Ranks | None,
    ) -> None:
        replayed, scale = buffer_list(buffers), ScaleKeeper(grad_scaler)
        super().__init__(params, subspace, defaults, theta0, ranks)
        self._replay = Replay(self._params[0].device, replayed)
        self._scale = scale
        self._evaluator.scaler = scale.scaler
        self._rule = BFGS(self._first_guess())
        self._pairs = Pairs()
        self._good = GoodPoint()
        self._learnt: Curvature = "none"  # since the last record

    @property
    def _vector_device(self) -> torch.device:
        """Where theta and all other d-vectors are: with the weights if a step can run ahead."""
        return self._params[0].device if self._is_far() else super()._vector_device

    def _is_far(self) -> bool:
        """Whether the host waits long for numbers of the weights' device."""
        return self._params[0].device.type in self._devices_ahead

    def _runs_ahead(self) -> bool:
        """Whether the first trial can be made before the host knows any number of the step."""
        group = self.param_groups[0]
        return (
            self._is_far()
            and group["line_search_fn"] == "armijo"
            and group["weight_decay"] == 0.0
            and group["max_iter"] == 1
            and group["lr"] != 0.0
            and self._scale.scaler is None
            and self._evaluator.has_gradient()
        )

    def _first_evaluation(self, closure: Closure) -> Loss:
        """Loss and gradients at the weights."""
        loss = self._evaluator.first(closure)
        self._replay.mark()
        return loss

    def _iterate(
        self, closure: Closure, first: Loss, inner: bool, more: bool, known: dict[str, Any]
    ) -> tuple[Status, float]:
        """Direction, search and move, with the gradients at the weights in place.

        ``inner`` says that they are those of this closure's last accepted trial, and ``first`` is
        that trial's loss, ``more`` that another iteration may follow. Returns the loss at the
        weights too, and puts what it finds for the record into ``known``.
        """
        group, objective, alone = self.param_groups[0], self._objective(), self._ranks is None
        loss = number(first)
        if alone or inner:
            if not inner:
                self._check_first_loss(loss)
            if alone and not self._evaluator.has_gradient():
                return Status.NO_GRADIENT, loss
            if not math.isfinite(loss):
                return Status.NON_FINITE_LOSS, loss
        gradient = self._gradients()
        project = _Project(self._measured, None if alone or inner else first)
        c, pair = self._pairs.coordinates(
            project, gradient, self._walk.point, objective, group["curvature"], inner
        )
        if project.loss is not None:  # the mean of the ranks' losses came with their gradients'
            loss = number(project.loss)
            self._check_first_loss(loss)
            if not math.isfinite(loss):
                return Status.NON_FINITE_LOSS, loss
        if pair is not None:
            self._learn(*pair)
            late = not alone and group["curvature"] == "same_batch"
            if late and bool(pair[1].isfinite().all()):
                self._good.see_gradient(self._theta)
        status = self._go(closure, loss, c, gradient, objective, more, known)
        return status, loss

    def _go(
        self,
        closure: Closure,
        loss: float,
        c: Tensor,
        gradient: list[Tensor],
        objective: Objective,
        more: bool,
        known: dict[str, Any],
    ) -> Status:
        """The rest of `_iterate`, from the coordinates of the gradient on."""
        group = self.param_groups[0]
        known["curvature"], self._learnt = self._learnt, "none"
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
        gradient.clear()  # the next evaluation may use its memory
        trials = self._trials(closure, objective)
        line = Start(objective.sign * loss, slope, length)
        return self._move(trials, line, p, c, residual, more, known)

    def _iterate_ahead(self, closure: Closure, first: Loss, known: dict[str, Any]) -> float:
        """`_iterate` up to the first trial, before the host has read any number of the step.

        All of them then come in one piece, so that a step waits for the GPU once a trial. Returns
        the loss at the weights; puts the status, and what else it finds, into ``known``.
        """
        group, objective = self.param_groups[0], self._objective()
        gradient = self._gradients()
        project = _Project(self._measured, first)
        c, pair = self._pairs.coordinates(
            project, gradient, self._walk.point, objective, group["curvature"], inner=False
        )
        first = first if project.loss is None else project.loss
        rule, wanted = self._rule, group["curvature"] == "same_batch"
        damped, published = group["damping"] == "powell", self._published_rule()
        p, info = rule.run_ahead(c, pair, damped=damped, published=published)
        residual = self._aim(p, c, gradient, objective)
        del gradient
        trials = self._trials(closure, objective)
        still_fresh = rule.fresh and pair is None
        if isinstance(first, Tensor):  # the trial may write its loss into the same tensor
            first = first.detach().clone()
        try:
            after = trials.run_ahead(float(group["lr"]), graph=wanted and not still_fresh)
        except BaseException:
            _, _, learnt, reset, _, condition, _ = info.tolist()
            rule.heed(learnt, reset, condition)  # B has learnt, whatever becomes of the step
            raise
        change = info.new_zeros(1) if pair is None else pair[1].sum().reshape(1)
        loss, trials.raw_loss, *found = read_together([first, after], torch.cat([info, change]))
        slope, size, learnt, reset, downhill, condition, length, change_sum = found
        heeded = rule.heed(learnt, reset, condition)
        known["curvature"] = self._learnt if pair is None else heeded
        self._learnt = "none"
        known["gradient_norm"], known["condition"] = size, rule.condition
        self._check_first_loss(loss)
        if wanted and pair is not None and math.isfinite(change_sum):
            self._good.see_gradient(self._theta)  # of the last closure, which nothing looked at yet
        if not math.isfinite(loss):
            status: Status | None = Status.NON_FINITE_LOSS
        else:
            status = policy.at_start(size, group["tolerance_grad"])
        if status is None:
            self._good.see(self._theta, loss=True, gradient=True)
            status = None if downhill else Status.LINE_SEARCH_FAILED
        if status is None:
            line = Start(objective.sign * loss, slope, length)
            known["status"] = self._move(trials, line, p, c, residual, False, known)
        else:
            self._put_back()
            known["status"] = status
        return loss

    def _move(
        self,
        trials: Trials,
        line: Start,
        p: Tensor,
        c: Tensor,
        residual: Tensor | None,
        more: bool,
        known: dict[str, Any],
    ) -> Status:
        """Searches along the direction and goes there; ``more`` as in `_iterate`."""
        group = self.param_groups[0]
        wanted = more or group["curvature"] == "same_batch"
        # Looking at a gradient of several ranks would take a sum more: the next step has it anyway.
        ahead = trials.ahead or self._ranks is not None
        result = search(trials, group, line, wanted, self._rule.fresh)
        known["trials"] = result.evaluations
        status, after = result.status, math.nan
        if status.moved:
            status, after = self._settle(trials, result, wanted, look=not ahead)
        if not status.moved:
            return status
        self._advance(result.alpha, p, residual)
        seen = residual is None and math.isfinite(after)
        self._good.see(self._theta, loss=seen, gradient=seen and wanted and not ahead)
        self._pairs.put(result.alpha, p, c)
        known["alpha"], known["step_length"] = result.alpha, result.alpha * line.length
        known["loss_after"] = trials.raw_loss
        return status

    def _settle(
        self, trials: Trials, result: SearchResult, wanted: bool, look: bool
    ) -> tuple[Status, float]:
        """Leaves the model as the accepted trial does; how that ended, and the objective there.

        Without ``look`` a gradient there that is not finite is left to the next step to find.
        """
        if not wanted and result.evaluations == 0:  # no search, and nothing to learn here
            self._walk.trial(result.alpha)
            return result.status, math.nan
        after, slope = trials.settle(result.alpha, gradient=wanted), 0.0
        if wanted:
            kept = self._keep_gradient()
            # NaN and infinity reach the slope whatever they are multiplied with.
            slope = float(torch.dot(kept, self._walk.direction)) if look else 0.0
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
                self._good.see(self._theta, loss=True, gradient=True)
            self._put_back()
            self._reset()
            self._walk.forget_residual()
        return status

    def _keep_gradient(self) -> Tensor:
        return self._pairs.keep(self._gradients(), self._walk.point, self._scale.value)

    def _trials(self, closure: Closure, objective: Objective) -> Trials:
        return Trials(
            closure, self._evaluator, self._replay, self._walk, objective,
            self._mean, self._gradients, self._along,
        )  # fmt: skip

    def _along(self, gradient: list[Tensor]) -> float:
        """A gradient's product with the direction; of several ranks the mean's."""
        direction = self._walk.direction
        if direction.numel():
            raw = ops.project(direction.unsqueeze(0), gradient).to(torch.float64)
        else:  # a rank may have no weights
            raw = torch.zeros(1, dtype=torch.float64, device=direction.device)
        if self._ranks is not None:
            raw *= self._subspace.weight(self._ranks.size)
            self._ranks.sum_(raw, "the slope")
        return float(raw)

    def _learn(self, s: Tensor, y: Tensor, hs: Tensor) -> None:
        group, rule = self.param_groups[0], self._rule
        how = {"damped": group["damping"] == "powell", "published": self._published_rule()}
        if self._is_far():
            # As a step that runs ahead does it, to the bit. The direction is not used: any vector
            # will do that a positive definite B turns into one downhill.
            _, info = rule.run_ahead(torch.ones_like(s), (s, y, hs), **how)
            _, _, learnt, reset, _, condition, _ = info.tolist()
            self._learnt = rule.heed(learnt, reset, condition)
        else:
            self._learnt = rule.learn(s, y, hs, **how)

    def _published_rule(self) -> bool:
        wanted = {"curvature": "consecutive", "damping": None}
        return all(self.param_groups[0][key] == value for key, value in wanted.items())

    def _first_guess(self) -> Tensor:
        known = None if self._published_rule() else self._subspace.singular_values
        return bfgs.first_guess(self._subspace.dim, known).to(self._vector_device)

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
        if self._ranks is not None and not self._subspace.spans_ranks:  # n numbers, this once
            flat = torch.cat([g.reshape(-1).to(self._walk.point.dtype) for g in gradient])
            gradient = [self._ranks.sum_(flat, "gradients").div_(self._ranks.size)]
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

    def change_subspace(self, subspace: AffineSubspace) -> None:
        self._check_subspace("PBFGS", subspace)
        self._learn_early()
        super().change_subspace(subspace)

    change_subspace.__doc__ = SubspaceOptimizer.change_subspace.__doc__

    def _expected_weights(self) -> Tensor:
        return self._walk.point

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

    def _start_at(self, point: Tensor) -> None:
        self._walk = Walk(self._subspace, self._params, point)

    def _before_saving(self) -> None:
        self._learn_early()

    def _own_state(self) -> dict[str, Any]:
        return {
            **self._walk.state(),
            **self._pairs.state(),
            **self._rule.state(),
            **self._good.state(),
            **self._scale.state(),
        }

    def _checked_own_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        numbers = {
            "since_anchor": int,
            "last_shift": float,
            "loss_seen": bool,
            "gradient_seen": bool,
            "finite_steps": int,
        }
        short = ("previous_step", "previous_coordinates", "previous_believed", "good")
        optional = dict.fromkeys(short, theta)
        optional |= dict.fromkeys(self.flat_state[1:], self._walk.point)
        own = {key: kind(state[key]) for key, kind in numbers.items()}
        for key, like in optional.items():
            own[key] = None if state[key] is None else saved_tensor(self, state, key, like)
        own["point"] = saved_tensor(self, state, "point", self._walk.point)
        try:
            own["rule"] = self._rule.checked(state, len(theta))
        except ValueError as error:
            raise ValueError(f"PBFGS: state_dict: {error}") from None
        origin = own["moved_origin"]
        origin = self._subspace.origin if origin is None else origin
        check_point(self, own["point"], origin, theta)
        return own

    def _adopt(self, own: dict[str, Any]) -> None:
        self._walk.load(own)
        self._rule = BFGS(self._first_guess())
        self._rule.load(own["rule"])
        for part in (self._pairs, self._good, self._scale):
            part.load(own)
