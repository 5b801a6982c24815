"""PyTorch Lightning: recording, batch norm around validation, and checks before a fit begins.

For ``lightning`` and for ``pytorch_lightning``: the one that the program has imported already, else
the first that is installed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from typing_extensions import override

from ..batch_norm import live_norms, reestimated
from ..optim.base import SubspaceOptimizer
from ..trajectory.recorder import OnFull, Recorder
from ..trajectory.trajectory import Trajectory

_imported = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
_installed = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
# Objects of the one package are none of the other's.
pl: Any = import_module(_imported[0] if _imported else _installed)

__all__ = ["BatchNormCallback", "Float16", "SubspaceChecks", "TrajectoryCallback"]

_STATE = "dldr_ext.trajectories"  # in a checkpoint: one state for each TrajectoryCallback


class SubspaceChecks(pl.Callback):
    """Refuses what an optimizer in a subspace cannot work with, before a fit begins.

    The other callbacks of this module do the same. Of optimizers that search (`PBFGS`, `InSubspace`
    of ``torch.optim.LBFGS``): accumulated and clipped gradients, a learning rate that ends at 0 as
    far as the schedule says so, float16 without `Float16`, several processes without a
    ``process_group``. Of all: parameters that are not those of the module.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the trainer and its optimizers.

        Raises
        ------
        ValueError
            Naming the argument and the way out.
        """
        if sum(one is self for one in trainer.callbacks) > 1:
            raise ValueError(
                f"{type(self).__name__}: expected it once among the callbacks of the trainer, got "
                "it twice"
            )
        of_module = {id(p) for p in pl_module.parameters()}
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, SubspaceOptimizer):
                continue
            name = type(optimizer).__name__
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            if not all(id(p) in of_module for p in trained):
                raise ValueError(
                    f"{name}: params: expected parameters of the module that is fitted, "
                    f"{type(pl_module).__name__}, got others: make it in configure_optimizers of "
                    "self.parameters()"
                )
            if _searches(optimizer):
                _check_search(trainer, optimizer, name)


class TrajectoryCallback(SubspaceChecks):
    """Records a trajectory during a fit: `Trajectory.attach` to the optimizer that trains it.

    The stride is in the trainer's checkpoints, the snapshots are not: a fit that is resumed goes on
    with the trajectory that it is given, as of ``Trajectory.load(folder, module.parameters())``.

    Parameters
    ----------
    trajectory : Trajectory, optional
        Of parameters of the module, on the device that it is trained on. None: one is made when the
        fit begins, of all that the module trains and on its device, and the weights at that time
        are its first snapshot.
    every, on_full
        As in `Trajectory.attach`.
    **options
        Of the `Trajectory` that is made: ``capacity``, ``dtype``, ``storage``, ...

    Attributes
    ----------
    trajectory : Trajectory or None
    recorder : Recorder or None
        While a fit goes on; its ``every`` is the stride now.

    Raises
    ------
    ValueError
        As the fit begins: no optimizer, or several, of parameters of the trajectory; or what
        `SubspaceChecks` and `Trajectory.attach` refuse.
    """

    def __init__(
        self,
        trajectory: Trajectory | None = None,
        every: int = 1,
        on_full: OnFull = "thin",
        **options: Any,
    ) -> None:
        if trajectory is not None and not isinstance(trajectory, Trajectory):
            raise TypeError(
                "TrajectoryCallback: trajectory: expected a Trajectory or None, got "
                f"{type(trajectory).__name__}"
            )
        if trajectory is not None and options:
            raise TypeError(
                f"TrajectoryCallback: expected no options of a trajectory beside one, got "
                f"{sorted(options)}"
            )
        self.trajectory, self._every, self._on_full = trajectory, every, on_full
        self._options = options
        self._state: dict[str, int] | None = None
        self.recorder: Recorder | None = None

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._end()
        if self.trajectory is None:
            alone = self._options.get("process_group") is None
            if trainer.world_size > 1 and alone and self._options.get("storage") == "disk":
                raise ValueError(
                    "TrajectoryCallback: process_group: expected that of the "
                    f"{trainer.world_size} processes, which cannot all record to one folder, got "
                    "None: process_group='world'"
                )
            self.trajectory = Trajectory(pl_module.named_parameters(), **self._options)
            self.trajectory.record()
        optimizer = _optimizer_of(self.trajectory, trainer, pl_module)
        self.recorder = self.trajectory.attach(optimizer, self._every, self._on_full)
        self._resume()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """End the recording."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the recording."""
        self._end()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the stride, and the steps since the last snapshot."""
        state = None if self.recorder is None else self.recorder.state_dict()
        checkpoint.setdefault(_STATE, {})[self._place(trainer)] = state

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self._state = checkpoint.get(_STATE, {}).get(self._place(trainer))
        self._resume()  # a strategy that shards the module loads once the fit has begun

    def _resume(self) -> None:
        if self.recorder is not None and self._state is not None:
            self.recorder.load_state_dict(self._state)
            self._state = None

    def _end(self) -> None:
        if self.recorder is not None:
            self.recorder.remove()
            self._state = self.recorder.state_dict()  # for another fit
            self.recorder = None

    def _place(self, trainer: Any) -> int:
        """Return which one it is of the trainer's callbacks of this kind."""
        alike = [one for one in trainer.callbacks if isinstance(one, TrajectoryCallback)]
        return next(i for i, one in enumerate(alike) if one is self)


class BatchNormCallback(SubspaceChecks):
    """Validates with batch-norm statistics of the weights where the module stands.

    `batch_norm.reestimated` around each validation, so that what early stopping and the choice of
    checkpoints go by is true. Statistics are as before afterwards, and so they are in checkpoints:
    re-estimate them once the best one is loaded. Training goes on as if it had not been there.

    Parameters
    ----------
    batches : iterable or callable that returns one, optional
        Of training data. None: of the trainer's data loader of the training.
    limit : int
        Most batches to take.
    model : str
        The name of the submodule that takes the first part of each batch, as in ``"model"`` or
        ``"net.encoder"``; "" is the module itself, which then needs a ``forward``.
    """

    def __init__(
        self,
        batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        limit: int = 50,
        model: str = "",
    ) -> None:
        if limit < 1:
            raise ValueError(f"BatchNormCallback: limit: expected at least 1 batch, got {limit}")
        self._batches, self._limit, self._name = batches, limit, model
        self._frozen: list[nn.Module] | None = None  # norms that do not train; None: no step yet
        self._context = ExitStack()

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._frozen = None
        try:
            network = pl_module.get_submodule(self._name)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"BatchNormCallback: model: expected the name of a submodule of "
                f"{type(pl_module).__name__}, one of {names} or below, got {self._name!r}"
            ) from None
        if type(network).forward in (pl.LightningModule.forward, nn.Module.forward):
            raise ValueError(
                f"BatchNormCallback: model: expected a module with a forward that takes the first "
                f"part of a batch, got {type(network).__name__} without one: pass the name of the "
                "submodule that has it, model='...'"
            )
        others = [one for one in trainer.callbacks if isinstance(one, BatchNormCallback)]
        names = [one._name for one in others if one._norms(pl_module) & self._norms(pl_module)]
        if len(names) > 1:
            raise ValueError(
                "BatchNormCallback: expected one for each layer of batch norm, got several for "
                f"some, of the submodules {names}: keep one of them"
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note which layers do not train, before validation puts all of them in ``eval()``."""
        if self._frozen is None:
            self._frozen = [module for module in pl_module.modules() if not module.training]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Re-estimate the statistics."""
        if self._frozen is None:  # before the first step they are those of the weights
            return
        network = pl_module.get_submodule(self._name)
        pl_module.train()
        for module in self._frozen:
            module.training = False
        # As in training: no inference mode, whose tensors training could not use.
        with torch.inference_mode(False), torch.no_grad(), pl.utilities.seed.isolate_rng():
            with trainer.precision_plugin.forward_context():
                batches = self._taken(trainer, pl_module)
                self._context.enter_context(reestimated(network, batches))
            for norm in live_norms(network):
                for statistic in (norm.running_mean, norm.running_var):
                    assert statistic is not None
                    statistic.copy_(trainer.strategy.reduce(statistic, reduce_op="mean"))
        pl_module.eval()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the statistics back."""
        self._leave()
        pl_module.eval()  # Lightning puts modes back itself, from what they were before

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the statistics back."""
        self._leave()

    def _norms(self, pl_module: Any) -> set[nn.Module]:
        return set(live_norms(pl_module.get_submodule(self._name)))

    def _leave(self) -> None:
        with torch.inference_mode(False):
            self._context.close()

    def _taken(self, trainer: Any, pl_module: Any) -> Iterator[Any]:
        """Yield batches as a training step gets them."""
        given = self._batches
        batches = given() if callable(given) else given
        if batches is None:
            batches = trainer.train_dataloader
            if isinstance(batches, DataLoader) and batches.persistent_workers:
                batches = copy.copy(batches)  # the epoch that is under way keeps its workers
                batches._iterator = None
        for batch in islice(batches, self._limit):
            batch = pl_module.on_before_batch_transfer(batch, 0)
            batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            yield pl_module.on_after_batch_transfer(batch, 0)


class Float16(pl.plugins.MixedPrecision):
    """Precision "16-mixed" for optimizers that search: ``Trainer(plugins=[Float16()])``.

    They take several gradients a step, and divide by the scale themselves:
    ``PBFGS(..., grad_scaler=self.trainer.precision_plugin.scaler)`` in ``configure_optimizers``.

    Parameters
    ----------
    device : str
    scaler : torch.amp.GradScaler, optional
    """

    def __init__(self, device: str = "cuda", scaler: torch.amp.GradScaler | None = None) -> None:
        super().__init__("16-mixed", device, scaler or torch.amp.GradScaler(device))

    def optimizer_step(
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Let an optimizer that searches call the closure; for others as Lightning does."""
        kinds = pl.plugins
        kind = kinds.Precision if _searches(optimizer) else kinds.MixedPrecision
        return kind.optimizer_step(self, optimizer, model=model, closure=closure, **kwargs)


def _searches(optimizer: Any) -> bool:
    return isinstance(optimizer, SubspaceOptimizer) and "line_search_fn" in optimizer.defaults


def _check_search(trainer: Any, optimizer: SubspaceOptimizer, name: str) -> None:
    """Refuse what a search cannot do."""
    others = "PSGD, and InSubspace of another optimizer, take it"
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"{name}: expected Trainer(accumulate_grad_batches=1), since every trial is of the "
            f"whole batch, got {trainer.accumulate_grad_batches}: make the batches larger; {others}"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"{name}: expected Trainer(gradient_clip_val=None), since a search compares losses "
            f"with gradients and bounds the step itself, got {trainer.gradient_clip_val}; {others}"
        )
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer and _ends_at_zero(trainer, config):
            raise ValueError(
                f"{name}: lr: expected a schedule that does not end at 0, since a search begins "
                f"with a step of lr, got {type(config.scheduler).__name__}: leave it out, or let "
                "it end above 0"
            )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and not isinstance(trainer.precision_plugin, Float16):
        raise ValueError(
            f"{name}: expected Trainer(precision='bf16-mixed'), or plugins=[Float16()] (of "
            "dldr_ext.integrations.lightning), got float16, where Lightning's own scaler takes one "
            "gradient a step"
        )
    if trainer.world_size > 1 and not optimizer.spans_ranks:
        raise ValueError(
            f"{name}: process_group: expected that of the {trainer.world_size} processes, which "
            "would each take other steps, got None: process_group='world'"
        )


def _ends_at_zero(trainer: Any, config: Any) -> bool:
    """Whether a schedule is known to end at 0 by the end of the fit."""
    by_epoch = config.interval == "epoch"
    steps = trainer.max_epochs if by_epoch else trainer.estimated_stepping_batches
    if steps is None or steps < 0 or steps == float("inf"):
        return False
    scheduler, steps = config.scheduler, int(steps) // config.frequency
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        steps -= scheduler._milestones[-1]
        scheduler = scheduler._schedulers[-1]
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        return any(rate(steps) == 0 for rate in scheduler.lr_lambdas)
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return scheduler.eta_min == 0 and scheduler.T_max <= steps
    if isinstance(scheduler, lr_scheduler.LinearLR):
        return scheduler.end_factor == 0 and scheduler.total_iters <= steps
    return isinstance(scheduler, lr_scheduler.PolynomialLR) and scheduler.total_iters <= steps


def _optimizer_of(trajectory: Trajectory, trainer: Any, pl_module: Any) -> torch.optim.Optimizer:
    """Return the one optimizer that trains parameters of a trajectory."""
    recorded = {id(p) for p in trajectory.params}
    module = type(pl_module).__name__
    if not recorded & {id(p) for p in pl_module.parameters()}:
        raise ValueError(
            "TrajectoryCallback: trajectory: expected one of parameters of the module that is "
            f"fitted, {module}, got one of others: TrajectoryCallback() makes one, or "
            "Trajectory(module.named_parameters()) does"
        )
    matching = [one for one in trainer.optimizers if recorded & _parameters(one)]
    if len(matching) != 1:
        names = [type(one).__name__ for one in trainer.optimizers]
        raise ValueError(
            f"TrajectoryCallback: expected one optimizer of {module} that trains parameters of the "
            f"trajectory, got {len(matching)} (of {names}): give each trajectory the parameters of "
            "one optimizer, and a callback of its own"
        )
    found: torch.optim.Optimizer = matching[0]
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    tensors: Iterable[Tensor] = (p for group in optimizer.param_groups for p in group["params"])
    return set(map(id, tensors))
