"""The base of all optimizers in a subspace: parameters, theta, closures, saving."""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..collectives.consistency import Facts, described, digest, samples
from ..collectives.process_group import Ranks, failing_together
from ..subspace.base import AffineSubspace
from ..tensors.parameters import check_matches, check_names, dtype_name, local_shard, numel
from ..tensors.watch import Watch
from .algebra.transfer import overlap
from .groups import Decay, check_same_options, taken
from .metric import check_metric
from .state_dict import check_reader, give_out, take_in, wrong
from .status import Status, StepRecord
from .step.closure import Evaluator
from .step.objective import Objective, Problem
from .step.plateau import Plateau
from .step.write_guard import WriteGuard

_log = logging.getLogger("dldr_ext")
# Weights further than this from origin + P theta, relative to their norm, count as moved.
_MOVED = 1e-5
# Entries of `history`.
_HISTORY = 1000
# Steps after which ranks compare theta and options: what each would do alone might differ.
_COMPARE_EVERY = 32


class SubspaceOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose only unknowns are the d coordinates theta of a subspace.

    Keeps theta in float64 (it is d numbers) and the rules that its subclasses share.
    """

    flat_state: tuple[str, ...] = ()  # entries of the state that have n numbers

    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        defaults: dict[str, Any],
        theta0: Tensor | Literal["current"] | None,
        ranks: Ranks | None = None,
    ) -> None:
        name = type(self).__name__
        self._check_mode()
        _check_is_subspace(name, subspace)
        given = taken(name, params, subspace)
        # Leaves hold the gradients. What is written is the same but for DTensors: their shards.
        self._leaves, self._names, self._group_of = given.leaves, given.names, given.which
        self._decay_is_given = given.decay_is_given
        self._params = [local_shard(p) for p in self._leaves]
        self._ranks = ranks
        self._check_subspace(subspace)
        own = {"weight_decay": 0.0} if given.decay_is_given else {}
        super().__init__(given.groups, own | defaults)
        self._status = Status.INITIAL
        self._evaluator = Evaluator(name, self._leaves)
        self._enter(subspace, check_metric(name, defaults["metric"], subspace))
        self._history: deque[StepRecord] = deque(maxlen=_HISTORY)
        self._steps = 0
        self._plateau = Plateau()
        names = self._names or subspace.names
        self._watch = Watch(given.given, self._leaves, names, "optimizer", f"{name}: ")
        self._guard = WriteGuard(name, self._params, self._watch.named, self._expected_weights)
        if ranks is None:
            self._evaluator.leaving_weights = self._guard.left_alone
        else:
            ranks.find_gathering(self._leaves)
            self._guard.forget_gathered = ranks.forget_gathered
            self._evaluator.inside = ranks.evaluation
        self._incoming: dict[str, Any] | None = None  # a state that is being loaded
        if ranks is not None:
            ranks.check_consistent(self._facts(theta0))
        self._theta = self._first_theta(theta0)
        self._place(None if theta0 is None else "origin + P theta0", logging.INFO)

    @property
    def subspace(self) -> AffineSubspace:
        """The subspace that the weights move in."""
        return self._subspace

    @property
    def spans_ranks(self) -> bool:
        """Whether several processes take each step together: it has a process group."""
        return self._ranks is not None

    @property
    def theta(self) -> Tensor:
        """Coordinates (d,) of the weights, w = origin + P theta: a copy, in the ops' precision."""
        return self._to_basis(self._theta.detach(), copy=True)

    @property
    def leaves(self) -> list[Tensor]:
        """The parameters that train, in the subspace's order, whatever their groups."""
        return list(self._leaves)

    @property
    def status(self) -> Status:
        """The `Status` that the last step ended with."""
        return self._status

    @property
    def history(self) -> deque[StepRecord]:
        """Records of the last 1000 steps, the newest at the end; not part of `state_dict`."""
        return self._history

    @property
    def closure_calls(self) -> int:
        """The calls of closures so far, trials included: the passes over the data, in batches."""
        return self._evaluator.calls

    @property
    def gradient_calls(self) -> int:
        """The part of `closure_calls` that went through a backward pass."""
        return self._evaluator.gradient_calls

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse another group: the subspace was made for one list of parameters.

        Raises
        ------
        ValueError
            Always, after construction.
        """
        if hasattr(self, "_theta"):
            raise ValueError(
                f"{type(self).__name__}: add_param_group: a subspace belongs to one list of "
                "parameters; make a new subspace and a new optimizer for another list"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as copies; see `load_state_dict`.

        Beside torch's ``state`` (empty) and ``param_groups`` (all options) there is the key
        ``subspace``, which holds tensors, numbers and strings only. Not included, because they
        are not the optimizer's: the model, its buffers, torch's random state, the subspace.

        With a process group every rank must call it; one of them may write it to a file.

        Returns
        -------
        dict
            For ``torch.save``; ``torch.load(..., weights_only=True)`` reads it.

        Raises
        ------
        ValueError
            ``get_state_dict`` of torch.distributed.checkpoint or ``FSDP.optim_state_dict`` is what
            asks for it: they would drop the key ``subspace``.
        """
        check_reader(self, sys._getframe(1).f_globals.get("__name__"))
        handle = self.register_state_dict_post_hook(give_out, prepend=True)
        try:  # hooks see the whole
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict`, bit for bit, and put the model where it was saved.

        Parameters
        ----------
        state_dict : dict
            Of an optimizer of the same kind, in the same subspace.

        Raises
        ------
        ValueError
            The state of another optimizer, of another dimension or number of parameters, or of
            another subspace. Nothing has changed then.
        """
        if not isinstance(state_dict, dict):  # torch would fail on it
            raise ValueError(wrong(self, state_dict))
        # After hooks of the user's, which may change it; what torch checks comes next.
        handle = self.register_load_state_dict_pre_hook(take_in)
        try:
            with failing_together(self._ranks):
                self._check_parameters()
                super().load_state_dict(state_dict)
                self._compare("load_state_dict")
        finally:
            handle.remove()
            self._incoming = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._incoming is not None:  # the last that torch does before hooks of the user's
            new, self._incoming = self._incoming, None
            self._set_theta(new["theta"])
            self._status = new["status"]
            self._steps = new["steps"]
            self._plateau = Plateau(resumed=self._steps > 0)
            self._evaluator.calls = new["closure_calls"]
            self._evaluator.gradient_calls = new["gradient_calls"]
            self._adopt(new["method"])
            self._remember()

    def resync(self) -> None:
        """Accept weights that something else wrote, and go on from their projection.

        Without it a step refuses such weights. They are moved to the nearest point of the subspace
        (with a warning in the logger ``dldr_ext`` if that is further than rounding); what has been
        learnt stays.
        """
        self._check_parameters()
        self._set_theta(self._first_theta("current"))
        self._compare("resync")
        self._place("their projection on the subspace")

    @torch.no_grad()
    def change_subspace(self, subspace: AffineSubspace) -> None:
        """Go on in another subspace of the same parameters: DLDR with its basis refreshed.

        theta becomes the projection of the model's weights, whoever wrote them, and what was
        learnt is transferred by M = P'^T P: the inverse Hessian as M H M^T, with a typical
        eigenvalue where the old subspace knew nothing (`PBFGS`), momentum as M m (`PSGD`); the
        optimizer in `InSubspace` starts anew. Options, counts and history stay.

        Weights off the new subspace are moved onto it, which is logged as a warning;
        ``subspace.with_origin(params)`` is the same one through the current weights.

        Parameters
        ----------
        subspace : Subspace or GroupedSubspace
            Of any dimension.

        Raises
        ------
        TypeError, ValueError
            As for the constructor's. Nothing has changed then.

        See Also
        --------
        Subspace.with_origin : the same directions through other weights.
        """
        with failing_together(self._ranks):
            self._check_parameters()
            self._check_subspace(subspace)
            metric = self.param_groups[0]["metric"]
            spread = check_metric(type(self).__name__, metric, subspace)
            if self._ranks is not None:
                self._ranks.check_consistent(_facts_of(subspace), "change_subspace")
        self._learn_early()
        theta = subspace.nearest(self._params)
        m = overlap(subspace, self._subspace)
        self._enter(subspace, spread)
        self._theta = theta.to(device=self._vector_device, dtype=torch.float64)
        self._compare("change_subspace")
        self._transfer(m)
        self._place("their projection on the new subspace")

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only the groups; a copy without theta would be none. Hooks stay behind, as
        # torch has it, since they may hold anything, and so do methods that were wrapped, which
        # are those of this one: a schedule puts its own `step` here.
        methods = {k for k in self.__dict__ if callable(getattr(type(self), k, None))}
        return {
            k: v for k, v in self.__dict__.items() if not k.endswith("_hooks") and k not in methods
        }

    # What subclasses add.

    def _learn_early(self) -> None:
        """Learn what the next step would learn first anyway, to the bit."""

    def _method_state(self) -> dict[str, Any]:
        """Return further entries of the state dict."""
        return {}

    def _checked_method_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        """Return the same entries as loaded, checked and copied; change nothing."""
        return {}

    def _adopt(self, state: dict[str, Any]) -> None:
        """Take over checked entries and write the weights."""
        raise NotImplementedError

    def _transfer(self, m: Tensor) -> None:
        """Take what was learnt into a new subspace, M = P'^T P, (d', d) float64 on the CPU."""
        raise NotImplementedError

    def _start_at(self, point: Tensor) -> None:
        """Take over the flat point origin + P theta that the model now stands at."""

    def _expected_weights(self) -> Tensor:
        """Return the flat weights as the optimizer has written them last."""
        return self._subspace.reconstruct(self._to_basis(self._theta.detach()))

    # What subclasses use.

    @property
    def _vector_device(self) -> torch.device:
        """Where theta and other d-vectors are."""
        return torch.device("cpu")

    def _enter(self, subspace: AffineSubspace, spread: Tensor | None) -> None:
        self._subspace, self._spread = subspace, spread
        # Parameters without names have those of the first subspace that has some.
        self._names = subspace.names if self._names is None else self._names
        self._problem = Problem(
            self._evaluator, self._leaves, subspace, self._ranks, self._vector_device
        )

    def _units(self) -> Tensor:
        """Return the length (d,) that a step of 1 has along each direction: the metric."""
        known = None if self.param_groups[0]["metric"] is None else self._spread
        if known is None:
            return torch.ones(self._subspace.dim, dtype=torch.float64, device=self._vector_device)
        return known.to(self._vector_device)

    def _decay(self) -> Decay:
        """Return the weight decay of each parameter, as the groups now have it."""
        return Decay.of(self.param_groups, self._group_of, self._params)

    def _objective(self) -> Objective:
        sign = -1.0 if self.param_groups[0].get("maximize") else 1.0
        return Objective(sign, self._decay())

    def _set_theta(self, theta: Tensor) -> None:
        with torch.no_grad():
            self._theta.copy_(theta)

    def _record(self, loss: float, status: Status, **further: Any) -> None:
        """Note how an iteration ended; ``further`` entries are those of `StepRecord`."""
        self._steps += 1
        self._status = status
        self._history.append(StepRecord(self._steps, loss, status, **further))
        self._say(self._plateau.see(loss, self.param_groups[0].get("maximize", False)))

    def _say(self, what: str | None) -> None:
        """Write a remark into the log, if there is one."""
        if what is not None:
            _log.warning("%s: %s", type(self).__name__, what)

    def _check_first_loss(self, loss: float) -> None:
        """Refuse a loss that is not finite in the first step, which has no restore point yet."""
        if self._steps == 0 and not math.isfinite(loss):
            raise ValueError(
                f"{type(self).__name__}: closure: expected a finite loss in the first step, got "
                f"{loss}"
            )

    def _check_untouched(self) -> None:
        """Refuse weights that are others, or that something else wrote, since the last step."""
        self._check_mode()
        if self._ranks is not None:
            # In place: others hold the list. A module may have moved its shards.
            self._params[:] = [local_shard(p) for p in self._leaves]
            if self._steps and self._steps % _COMPARE_EVERY == 0:
                self._compare(f"step {self._steps}")
        self._check_parameters()
        check_same_options(type(self).__name__, self.param_groups)
        self._guard.check()

    def _check_parameters(self) -> None:
        """Refuse parameters that are no longer those of the model."""
        self._watch.check(owners_may_go=True)  # the gradients tell

    def _check_mode(self) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: expected a call outside of torch.inference_mode, where no "
                "gradient can be made and no tensor changed later, got one inside; step under "
                "torch.inference_mode(False), with batches that were not made inside either"
            )

    def _remember(self) -> None:
        """Take weights and gradients as they are for those that the optimizer has left."""
        self._guard.remember()
        self._evaluator.remember_gradients()

    def _to_basis(self, vector: Tensor, copy: bool = False) -> Tensor:
        """Return a d-vector as the ops take it: on the basis's device, in the ops' precision."""
        subspace = self._subspace
        return vector.to(device=subspace.device, dtype=subspace.coordinate_dtype, copy=copy)

    def _compare(self, what: str) -> None:
        """Refuse to go on where ranks have come apart."""
        if self._ranks is not None:
            facts: Facts = {"options": _options(self.param_groups), "steps": self._steps}
            self._ranks.check_consistent(facts | {"theta": digest(self._theta)}, what)

    def _facts(self, theta0: Tensor | str | None) -> Facts:
        """Return what must be the same on every rank; reads basis and origin once."""
        start = theta0 if isinstance(theta0, str) or theta0 is None else "a tensor"
        facts: Facts = {
            "optimizer": type(self).__name__,
            "torch": torch.__version__,
            "cpu_capability": torch.ops.dldr_ext._cpu_capability(),
            "params": described(self._leaves),
            "options": _options(self.param_groups),
            "groups": self._group_of,
            **_facts_of(self._subspace),
            "theta0": start,
        }
        theta = theta0 if isinstance(theta0, Tensor) else None
        if not self._subspace.spans_ranks:
            facts["samples"] = samples(self._params)
            theta = self._first_theta(theta0)
        return facts | {"theta": digest(theta)}

    def _check_subspace(self, subspace: AffineSubspace) -> None:
        name, params = type(self).__name__, self._params
        _check_is_subspace(name, subspace)
        if subspace.spans_ranks and self._ranks is None:
            raise ValueError(
                f"{name}: process_group: expected that of the {type(subspace).__name__}, got None"
            )
        if subspace.shapes is not None:
            check_matches(params, subspace.shapes, subspace.names, what="subspace")
        check_names(self._names, subspace.names, "subspace", f"{name}: params")
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

    def _first_theta(self, theta0: Tensor | str | None) -> Tensor:
        name, dim = type(self).__name__, self._subspace.dim
        if theta0 is None:
            return torch.zeros(dim, dtype=torch.float64, device=self._vector_device)
        if isinstance(theta0, str) and theta0 == "current":
            theta = self._subspace.nearest(self._params)
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
        return theta.to(device=self._vector_device, dtype=torch.float64, copy=True)

    def _place(self, where: str | None, level: int = logging.WARNING) -> None:
        """Put the model at origin + P theta, and say so if it was elsewhere."""
        with torch.no_grad():
            point = self._subspace.reconstruct(self._to_basis(self._theta))
            before = torch.cat([p.detach().reshape(-1).to(point.dtype) for p in self._params])
            distance = float(torch.linalg.vector_norm(point - before))
            norm = float(torch.linalg.vector_norm(before))
            if point.numel():  # of several ranks one may have no weights
                ops.trial_(self._params, point, point, 0.0)
            self._start_at(point)
            self._remember()
        first = self._ranks is None or self._ranks.rank == 0
        if first and not distance <= _MOVED * norm:
            _log.log(
                level,
                "%s: the weights were moved to %s, a distance of %.3g (their norm was %.3g)%s",
                type(self).__name__,
                where or "the origin of the subspace",
                distance,
                norm,
                "" if where else '; pass theta0="current" to start from the weights\' projection',
            )


def _facts_of(subspace: AffineSubspace) -> Facts:
    facts: Facts = {
        "subspace": type(subspace).__name__,
        "dim": subspace.dim,
        "names": subspace.names,
        "coordinate_dtype": dtype_name(subspace.coordinate_dtype),
    }
    if not subspace.spans_ranks:
        facts |= {"basis": subspace.digest(), "origin": digest(subspace.origin)}
    return facts


def _options(groups: list[dict[str, Any]]) -> list[str]:
    return [
        f"{key} = {value.tolist() if isinstance(value, Tensor) else value!r}"
        for group in groups
        for key, value in group.items()
        if key != "params"
    ]


def _check_is_subspace(name: str, subspace: Any) -> None:
    if not isinstance(subspace, AffineSubspace):
        raise TypeError(
            f"{name}: subspace: expected a dldr_ext.Subspace or GroupedSubspace, got "
            f"{type(subspace).__name__}"
        )
