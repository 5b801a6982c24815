"""transformers: training in a subspace, and recording, in its Trainer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.optimization import get_scheduler

from ..batch_norm import live_norms, reestimated
from ..optim.base import SubspaceOptimizer
from ..optim.options import check_count
from ..optim.pbfgs import PBFGS
from ..optim.step.closure import virtual_batch
from ..subspace.base import AffineSubspace
from ..trajectory.trajectory import Trajectory

# Arguments of Trainer that only mean something to the optimizer that it would make itself.
_OF_THE_OPTIMIZER = (
    "optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
# Those that cut the parameters, of which a subspace needs every one whole.
_OF_SHARDS = ("deepspeed", "fsdp", "parallelism_config")


class TrajectoryCallback(TrainerCallback):
    """Records a snapshot after every ``every``-th step of the optimizer: `Trajectory.attach`.

    Parameters
    ----------
    trajectory : Trajectory
        Of the model that is trained, or of a part of it. One that gets full is thinned.
    every : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; when training begins, if the
        trajectory is that of another model or is recorded twice.

    See Also
    --------
    SubspaceTrainer : trains in the subspace of the trajectory.
    """

    def __init__(self, trajectory: Trajectory, every: int = 1) -> None:
        if not isinstance(trajectory, Trajectory):
            raise TypeError(
                "TrajectoryCallback: trajectory: expected a dldr_ext.Trajectory, got "
                f"{type(trajectory).__name__}"
            )
        self.trajectory = trajectory
        self.every = check_count("TrajectoryCallback", "every", every)
        self._run: Any = None  # the TrainerState of the run that is being recorded
        self._handle: Any = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Attach the trajectory to the optimizer."""
        if self._run is state:
            raise ValueError(
                "TrajectoryCallback: callbacks: expected it once among those of the Trainer, got "
                "it twice"
            )
        self._detach()  # from a run that has failed
        self._handle = self.trajectory.attach(optimizer, every=self.every)
        self._run = state

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the recording."""
        self._detach()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._run = None


class SubspaceTrainer(Trainer):
    """A ``transformers.Trainer`` that trains the coordinates of a subspace.

    Constructing it makes the optimizer, which puts the model at the origin of the subspace.
    Evaluation, saving and resuming are Trainer's; a resumed run goes on bit for bit.

    With an optimizer that searches (`PBFGS`, `InSubspace` of ``torch.optim.LBFGS``) the
    micro-batches of an update are one virtual batch: every trial sees all of them, with the loss
    normalised as Trainer does and the same dropout masks. The loss that is logged is that before
    the step. Gradients are not clipped. A model with batch norm is evaluated with statistics of the
    weights where it stands, from the batches of the last update.

    `PSGD` and `InSubspace` of any other optimizer take Trainer's gradients, clipped as it does.

    Parameters
    ----------
    *args, **kwargs
        Trainer's. Of ``optimizers`` the first may be an optimizer in a subspace instead of the
        three arguments below.
    subspace : Subspace or GroupedSubspace
        Of the trainable parameters of the model, on the device that Trainer puts it on.
    subspace_optimizer : type
        `PBFGS`, `PSGD` or `InSubspace`.
    subspace_options : mapping, optional
        Of the optimizer, such as ``lr``; for `InSubspace` also ``optimizer``. For `PBFGS` the
        default of ``buffers`` is the model and, of several processes, that of ``process_group``
        "world".

    Attributes
    ----------
    subspace_optimizer : PBFGS, PSGD or InSubspace
        The optimizer, whose ``theta``, ``status`` and ``history`` say how it goes;
        ``trainer.optimizer`` is accelerate's wrapper around it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Of the ``TrainingArguments`` those
        that have no meaning here are refused: options of the optimizer (``learning_rate``,
        ``weight_decay``, ``optim``, ...), DeepSpeed, FSDP; with a search also a ``max_grad_norm``
        of one's own, ``fp16`` and ``auto_find_batch_size``.

    See Also
    --------
    TrajectoryCallback : records the trajectory that the subspace is made from.

    Notes
    -----
    The default schedule of Trainer, which ends at a rate of 0, is left out: the rate is constant
    after any warm-up. A ``lr_scheduler_type`` of one's own is taken.
    """

    optimizer: Any  # for type checkers where transformers is not installed
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        subspace: AffineSubspace | None = None,
        subspace_optimizer: type[SubspaceOptimizer] = PBFGS,
        subspace_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(subspace_optimizer, type) or not issubclass(
            subspace_optimizer, SubspaceOptimizer
        ):
            raise TypeError(
                "SubspaceTrainer: subspace_optimizer: expected PBFGS, PSGD or InSubspace, got "
                f"{subspace_optimizer!r}"
            )
        super().__init__(*args, **kwargs)
        self._subspace, self._make = subspace, subspace_optimizer
        self._options = dict(subspace_options or {})
        self._micro_batches: list[Any] = []
        self._last_update: list[Any] = []  # its micro-batches, of a model with batch norm
        self._stepping: Any = None  # the optimizer whose step Trainer may call
        self._check_optimizer()
        kinds = (subspace_optimizer, self._options.get("optimizer"))
        # Both that search have this option.
        self._searches = (
            any(isinstance(k, type) and issubclass(k, (PBFGS, torch.optim.LBFGS)) for k in kinds)
            if self.optimizer is None
            else "line_search_fn" in self.optimizer.defaults
        )
        self._check_arguments()
        if self.place_model_on_device:  # otherwise it is moved later
            self.create_optimizer()

    @property
    def subspace_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, if there is none, and let Trainer call its step."""
        self._micro_batches = []
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            subspace: Any = self._subspace
            defaults: dict[str, Any] = {}
            if issubclass(self._make, PBFGS):
                defaults["buffers"] = trained
                if self.args.world_size > 1:
                    defaults["process_group"] = "world"
            options = defaults | self._options
            self.optimizer = self._make(trained.named_parameters(), subspace, **options)
        if self._searches:
            self._let_trainer_step(self.subspace_optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule that was asked for, or a constant one."""
        optimizer = self.optimizer if optimizer is None else optimizer
        unasked = self.args.lr_scheduler_type == _defaults(self.args)["lr_scheduler_type"]
        if self.lr_scheduler is None and unasked:
            self.lr_scheduler = get_scheduler(
                "constant_with_warmup",
                optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            )
            self._created_lr_scheduler = True  # for Trainer, which makes another one for each run
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Take the step with the last micro-batch of an update, if it is one that searches.

        Trainer adds up what comes back: it is the loss of all with the last, and 0 before.
        """
        counts = () if num_items_in_batch is None else (num_items_in_batch,)
        if not self._searches:
            return super().training_step(model, inputs, *counts)
        self._micro_batches.append((inputs, counts))
        if self.accelerator.sync_gradients:
            return self._step(model)
        return torch.zeros((), device=self.args.device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with batch-norm statistics of the weights, from the batches of the last step."""
        update = self._last_update
        with reestimated(self.model_wrapped, update) if update else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def _step(self, model: nn.Module) -> Tensor:
        """Take the step on all micro-batches of the update, and return the loss before it."""
        batches, self._micro_batches = self._micro_batches, []
        self._last_update = [inputs for inputs, _ in batches] if live_norms(model) else []
        loss_fn = partial(self._loss, model, len(batches))
        closure = virtual_batch(loss_fn, batches, weights=[1.0] * len(batches))
        with self.accelerator.no_sync(model):  # the optimizer adds up d numbers of each process
            loss: Tensor = self.subspace_optimizer.step(closure)
        return loss.to(self.args.device)

    def _loss(self, model: nn.Module, count: int, batch: tuple[Any, tuple[Any, ...]]) -> Tensor:
        """Return what Trainer would call backward on, times the number of micro-batches."""
        inputs, counts = batch
        losses: list[Tensor] = []
        self.accelerator.backward = lambda loss, **_: losses.append(loss)
        try:
            super().training_step(model, inputs, *counts)
        finally:
            del self.accelerator.backward
        # accelerate would divide by its own number of them, which newer transformers keep at 1.
        return losses[0] * (count / self.accelerator.gradient_accumulation_steps)

    def _let_trainer_step(self, optimizer: Any) -> None:
        """Make the step that Trainer takes without a closure one that `training_step` has taken."""
        if optimizer is self._stepping:
            return
        self._stepping, step = optimizer, optimizer.step

        def step_for_trainer(_: Any, closure: Any = None) -> Any:
            if closure is not None:
                return step(closure)
            # Some releases say only now that an epoch of fewer micro-batches is an update.
            return self._step(self.model_wrapped) if self._micro_batches else None

        optimizer.step = MethodType(step_for_trainer, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        for name in ("optimizer.pt", "scheduler.pt"):
            if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, name)):
                raise ValueError(
                    f"SubspaceTrainer: resume_from_checkpoint: expected {name} in {checkpoint}, "
                    "beside the weights, got none (save_only_model=True?); to start from the "
                    "weights alone, load them into the model and pass "
                    'subspace_options={"theta0": "current"}'
                )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that is none in a subspace, or two of them, or none."""
        given, owner, model = self.optimizer, "SubspaceTrainer", cast(nn.Module, self.model)
        if getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise ValueError(
                f"{owner}: optimizer_cls_and_kwargs: expected None, got another optimizer than "
                "subspace_optimizer"
            )
        if given is None:
            if not isinstance(self._subspace, AffineSubspace):
                raise TypeError(
                    f"{owner}: subspace: expected a dldr_ext.Subspace or GroupedSubspace, got "
                    f"{type(self._subspace).__name__}"
                )
        elif not isinstance(given, SubspaceOptimizer):
            raise TypeError(
                f"{owner}: optimizers[0]: expected None, or PBFGS, PSGD or InSubspace, got "
                f"{type(given).__name__}"
            )
        elif self._subspace is not None or self._options:
            raise ValueError(
                f"{owner}: subspace, subspace_options: expected none beside optimizers[0], which "
                "has its own"
            )
        else:
            own = set(map(id, model.parameters()))
            if not all(id(p) in own for group in given.param_groups for p in group["params"]):
                raise ValueError(
                    f"{owner}: optimizers[0]: expected one over the parameters of the model, got "
                    "one over others"
                )

    def _check_arguments(self) -> None:
        """Refuse what Trainer would not hand to the optimizer, or what a search cannot do."""
        args, defaults = self.args, _defaults(self.args)
        for name in _OF_THE_OPTIMIZER:
            value, default = getattr(args, name, None), defaults.get(name)
            if value != default:
                raise _refused(
                    name, f"its default, {default}", value,
                    "options of the optimizer are given in subspace_options",
                )  # fmt: skip
        for name in _OF_SHARDS:
            if getattr(args, name, None):
                raise _refused(
                    name, "none", getattr(args, name), "a step needs every parameter whole"
                )
        if not self._searches:
            return
        if args.max_grad_norm not in (0, None, defaults["max_grad_norm"]):
            raise _refused(
                "max_grad_norm", "0, or its default", args.max_grad_norm,
                "a search compares losses with gradients, and bounds the step itself; PSGD and "
                "InSubspace take clipped gradients",
            )  # fmt: skip
        if args.fp16:
            raise _refused(
                "fp16", False, True,
                "accelerate scales one gradient a step, and a search takes several; use bf16, or "
                "PSGD or InSubspace",
            )  # fmt: skip
        if args.auto_find_batch_size:
            raise _refused(
                "auto_find_batch_size", False, True,
                "a step has begun when memory runs out; a smaller per_device_train_batch_size with "
                "gradient_accumulation_steps gives the same step in parts",
            )  # fmt: skip


def _defaults(args: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(args)}


def _refused(name: str, expected: Any, got: Any, why: str) -> ValueError:
    return ValueError(f"SubspaceTrainer: args.{name}: expected {expected}, got {got}: {why}")
