"""Recording as an observer: snapshots of the weights that an optimizer's steps leave."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..tensors.parameters import type_name
from .checks import NOT_RECORDED

OnFull = Literal["thin", "stop", "error"]
_ON_FULL = ("thin", "stop", "error")


class Recording(Protocol):
    """What a recorder asks of a trajectory."""

    params: list[Tensor]
    names: list[str] | None
    capacity: int

    def __len__(self) -> int: ...

    def record(self) -> int:
        """Store the weights as they are now."""

    def thin(self) -> None:
        """Keep every second snapshot."""


class Recorder:
    """Records a trajectory as an optimizer steps, until `remove`: see `Trajectory.attach`.

    Parameters
    ----------
    trajectory, optimizer, every, on_full
        As in `Trajectory.attach`.
    """

    def __init__(self, trajectory: Recording, optimizer: Any, every: int, on_full: OnFull) -> None:
        self._trajectory, self._optimizer = trajectory, _unwrapped(optimizer)
        self._every, self._on_full = operator.index(every), on_full
        self._check()
        self._steps = 0  # since the last recording, at most
        self._unmoved: Tensor | None = None  # of these, the steps that changed nothing
        self._recording, self._warned = True, False
        self._remove: Callable[[], None] | None = None

    @property
    def every(self) -> int:
        """The steps from one snapshot to the next: doubled whenever the trajectory was thinned."""
        return self._every

    def attach(self) -> None:
        """Begin to record."""
        # Compiled steps call it as it stands. (An optimizer has imported torch._dynamo already.)
        hook = torch.compiler.disable(self._after_step)
        self._remove = self._optimizer.register_step_post_hook(hook).remove
        _attached.setdefault(self._optimizer, weakref.WeakSet()).add(self)

    def remove(self) -> None:
        """End the recording; the trajectory stays as it is."""
        if self._remove is not None:
            self._remove()
        _attached.get(self._optimizer, weakref.WeakSet[Recorder]()).discard(self)

    def state_dict(self) -> dict[str, int]:
        """Return the stride and the steps since the last snapshot, to go on after `attach`."""
        return {"every": self._every, "steps": self._steps - self._count_unmoved()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict`."""
        self._every, self._steps, self._unmoved = state["every"], state["steps"], None

    def _check(self) -> None:
        optimizer, trajectory = self._optimizer, self._trajectory
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"attach: optimizer: expected a torch optimizer, got {type_name(optimizer)}"
            )
        if not getattr(type(optimizer).step, "hooked", False):  # by the constructor of torch's
            raise ValueError(
                "attach: optimizer: expected one whose steps run hooks, got "
                f"{type(optimizer).__name__}, which wraps another optimizer without torch's "
                "constructor: call trajectory.record() after its steps, or attach the one inside "
                "if nothing writes the weights after that"
            )
        if self._every < 1:
            raise ValueError(f"attach: every: expected at least 1 step, got {self._every}")
        if self._on_full not in _ON_FULL:
            raise ValueError(
                f"attach: on_full: expected one of {list(_ON_FULL)}, got {self._on_full!r}"
            )
        if self._on_full == "thin" and trajectory.capacity < 2:
            raise ValueError(
                "attach: on_full='thin': expected a capacity of at least 2 snapshots, got "
                f"{trajectory.capacity}"
            )
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if not {id(p) for p in trained} & {id(p) for p in trajectory.params}:
            first = trajectory.names[0] if trajectory.names else tuple(trajectory.params[0].shape)
            got = f"{type(optimizer).__name__} over {len(trained)} others"
            raise ValueError(
                "attach: optimizer: expected one that trains parameters of the trajectory "
                f"({first}, ...), got {got}; attach the one that trains these, or record the "
                "parameters that it trains"
            )
        if any(other._trajectory is trajectory for other in _attached.get(optimizer, ())):
            raise ValueError(
                "attach: optimizer: expected one that this trajectory is not attached to, got "
                f"{type(optimizer).__name__} twice; remove() of the first handle detaches it"
            )

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._recording:
            return
        self._steps += 1
        # Set while a GradScaler calls a fused optimizer, which does nothing then if it is not 0.
        # The steps of these are added on the device, and waited for once a snapshot may be due.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            unmoved = (found_inf != 0).long()
            self._unmoved = unmoved if self._unmoved is None else self._unmoved + unmoved
        if self._steps >= self._every:
            self._steps, self._unmoved = self._steps - self._count_unmoved(), None
        if self._steps >= self._every:
            try:
                self._record()
            except Exception as error:
                if self._on_full == "error":
                    raise
                self._report(error)

    def _record(self) -> None:
        trajectory = self._trajectory
        if len(trajectory) == trajectory.capacity:
            if self._on_full == "stop":
                self._recording = False
                return
            if self._on_full == "thin":
                last_was_kept = trajectory.capacity % 2 == 1
                try:
                    trajectory.thin()
                finally:  # a Ctrl-C comes once it is done, or before it began
                    self._every *= 1 if len(trajectory) == trajectory.capacity else 2
                if last_was_kept:  # half of the stride is still to go
                    return
        self._steps = 0
        trajectory.record()

    def _report(self, error: Exception) -> None:
        """Warn of a snapshot that could not be recorded: training goes on."""
        if not str(error).endswith(NOT_RECORDED):
            self._recording = False
            what = "recording ends here, training goes on"
        elif self._warned:
            return
        else:
            self._warned = True
            what = "such snapshots are left out"
        warnings.warn(f"trajectory: {error}; {what}", UserWarning, stacklevel=5)

    def _count_unmoved(self) -> int:
        return 0 if self._unmoved is None else int(self._unmoved)


_attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[Recorder]] = (
    weakref.WeakKeyDictionary()
)


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer whose step does the work, without what accelerate or Lightning add.

    That a wrapper has the same groups tells it from an optimizer that has one inside for other
    numbers. Wrappers that are optimizers themselves may go on after that step, as Lookahead does.
    """
    names: tuple[str, ...] = "optimizer", "_optimizer"
    if hasattr(optimizer, "second_step"):  # SAM: a loop may call its two halves, but no step
        names = ("base_optimizer",)
    elif isinstance(optimizer, torch.optim.Optimizer) and not _is_of_accelerate(optimizer):
        names = ()
    for name in names:
        inner = getattr(optimizer, name, None)
        groups = getattr(inner, "param_groups", None)
        if inner is not optimizer and groups and groups is optimizer.param_groups:
            return _unwrapped(inner)
    return optimizer


def _is_of_accelerate(optimizer: Any) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "accelerate"
