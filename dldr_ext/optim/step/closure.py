"""Closures: how they are called, checked and counted."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ...tensors.parameters import forget_computed
from .write_guard import GradientWatch

_log = logging.getLogger("dldr_ext")
Loss = Tensor | float
Closure = Callable[[], Loss]
# A step returns what the closure does, a tensor or a number.
LossT = TypeVar("LossT", bound=Tensor | float)


def check_closure(owner: str, closure: object) -> None:
    """Refuse a step that is to search without a closure."""
    if not callable(closure):
        raise TypeError(
            f"{owner}: step: closure: expected a callable, got {closure!r}; in place of "
            "transformers' Trainer use dldr_ext.integrations.transformers.SubspaceTrainer, of "
            "torch's get_state_dict and get_optimizer_state_dict dldr_ext.dcp.stateful(optimizer)"
        )


def number(loss: Loss) -> float:
    """Return the value of a loss, which may have a graph."""
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def returned(local: Loss | None, mean: Loss | None) -> Loss | None:
    """Return what a step does: the loss, detached; of several ranks the mean, in its dtype."""
    if not isinstance(local, Tensor):
        return mean if mean is None else number(mean)
    assert isinstance(mean, Tensor)
    return local.detach() if mean is local else mean.to(device=local.device, dtype=local.dtype)


class Evaluator:
    """The calls of closures of both styles.

    The usual style calls backward itself; the forward-only style returns a loss with a graph, and
    leaves no gradient of its own. Which one a closure has is found out in `first`. A virtual batch
    calls backward where grad mode is on.

    Attributes
    ----------
    owner : str
        What to call the optimizer in messages.
    calls : int
        Evaluations so far.
    gradient_calls : int
        Those that went through a backward pass.
    forward_only : bool
        Style of the closure given to the last `first`.
    cheap_without_gradient : bool
        That closure can be asked for the loss alone.
    alone : bool
        The gradients are to be those of one evaluation, as a search needs them. Otherwise they are
        what the closure leaves, added to earlier ones unless it zeroes them, as torch has it.
    scaler : torch.amp.GradScaler or None
        Scales the losses that this class calls backward on.
    inside : callable
        Makes the context that closures are called in.
    leaving_weights : callable
        Makes another one, which refuses an evaluation that writes the weights.
    """

    def __init__(self, owner: str, params: list[Tensor]) -> None:
        self.owner, self._params = owner, params
        self._gradients = GradientWatch(params)
        self.alone = False
        self.scaler: torch.amp.GradScaler | None = None
        self.inside: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.leaving_weights: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.calls = 0
        self.gradient_calls = 0
        self.forward_only = False
        self.cheap_without_gradient = False
        self._dtype = torch.float64  # of the last loss
        self._needs_grad_mode = self._said_dropped = self._checked = False

    def first(self, closure: Closure) -> Loss:
        """Evaluate the loss, of which a copy is returned, and the gradients.

        Raises
        ------
        ValueError
            The closure left no gradient, and its loss has no graph; gradients that came before it
            cannot be taken in.
        """
        if self.alone or self.forward_only or isinstance(closure, VirtualBatch):
            self._gradients.forget_left()
        if self.alone and isinstance(closure, VirtualBatch):  # it zeroes nothing
            self._refuse_foreign()
            self._drop_gradients()
        with self._gradients.watching(), self._measuring():
            loss = self._call(closure, grad_mode=True)
        self.forward_only = not self._gradients.new()
        self.cheap_without_gradient = self.forward_only or isinstance(closure, VirtualBatch)
        if not self.forward_only:
            if self.alone:
                self._refuse_carried("the loss that it returns")
                self._refuse_changed(self._gradients.factor)
            self._check_belongs(loss)
            self.gradient_calls += 1
        elif isinstance(loss, Tensor) and loss.requires_grad:
            self._refuse_foreign()
            self._drop_gradients()
            self._first_backward(loss)
        else:
            raise ValueError(
                "closure: expected a loss with a graph, or gradients from its own backward, got a "
                "loss without either: it was detached, computed under torch.no_grad, or depends on "
                "none of the parameters"
            )
        self.remember_gradients()
        # The closure may write the next one into the same memory.
        return loss.detach().clone() if isinstance(loss, Tensor) else loss

    def again(self, closure: Closure, graph: bool, rewind: Callable[[], None]) -> Loss:
        """Evaluate the loss; with a graph (forward-only style) or the gradients if asked for.

        The usual style gives gradients whether asked or not. ``rewind`` puts back what an
        evaluation changes besides.
        """
        graph = graph or not self.cheap_without_gradient
        if not graph:
            return self._without_gradient(closure, rewind)
        self._refuse_carried("each evaluation of a step")
        self._drop_gradients()
        factor = self._gradients.factor
        try:
            with self._measuring():
                loss = self._call(closure, grad_mode=True)
        finally:
            self.remember_gradients()
        self._refuse_changed(factor)
        self.gradient_calls += not self.forward_only
        return loss

    def backward(self, loss: Loss) -> None:
        """Make the gradients of a loss that came with a graph, in the forward-only style."""
        if self.forward_only and isinstance(loss, Tensor) and loss.requires_grad:
            self.gradient_calls += 1
            self._scaled_backward(loss)
            self.remember_gradients()

    def _first_backward(self, loss: Tensor) -> None:
        """Make the gradients, of which there must be one."""
        twice: Exception | None = None
        try:
            self.backward(loss)
        except RuntimeError as error:  # the closure called it itself, for other parameters
            if "backward through the graph a second time" not in str(error):
                raise
            twice = error
        if not self.has_gradient():
            raise ValueError(
                f"{self.owner}: closure: expected a loss of the parameters that the optimizer has, "
                "got one that depends on none of them: the model may have been copied, or its "
                "parameters replaced, since the optimizer was made; make a new one for "
                "model.parameters() as they are now"
            ) from twice

    def has_gradient(self) -> bool:
        """Return whether any parameter has a gradient."""
        return any(p.grad is not None for p in self._params)

    def resolution(self, loss: float) -> float:
        """Return by how much a loss must fall for the closure to show it.

        By half the spacing of its dtype's numbers there, a quarter of eps at least. Nothing is
        known of a float, nor of a mean over ranks.
        """
        return 0.25 * torch.finfo(self._dtype).eps * abs(loss)

    def remember_gradients(self) -> None:
        """Take the gradients as they are for old ones, which are in nobody's way."""
        self._gradients.remember()

    def _without_gradient(self, closure: Closure, rewind: Callable[[], None]) -> Loss:
        """Evaluate the loss alone: without grad mode, unless the closure takes derivatives."""
        if not self._needs_grad_mode:
            try:
                return self._call(closure, grad_mode=False)
            except Exception as error:
                if not _is_about_gradients(error):
                    raise
            rewind()
        loss = self._call(closure, grad_mode=True, backward=_nothing)
        if not self._needs_grad_mode:
            self._needs_grad_mode = True
            _log.warning(
                "%s: the closure takes derivatives inside its loss and fails under torch.no_grad, "
                "which trials are made under; from now on they are made with grad mode on",
                self.owner,
            )
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _scaled_backward(self, loss: Tensor) -> None:
        # Not under the caller's autocast, nor under the closure's: what the forward pass has cast
        # its graph casts back.
        with torch.enable_grad(), _without_autocast(), self._gradients.own_backward():
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _drop_gradients(self) -> None:
        for p in self._params:
            p.grad = None

    def _measuring(self) -> AbstractContextManager[None]:
        measured = self.alone and not _may_be_averaged()
        return self._gradients.measuring() if measured else nullcontext()

    def _refuse_changed(self, before: float | None) -> None:
        """Refuse gradients changed after backward by other than one factor, ``before``."""
        now = self._gradients.factor
        if now is None or before is None:
            return
        if not abs(now - before) <= self._gradients.rounding * abs(before):
            raise ValueError(
                f"{self.owner}: closure: expected gradients of the loss that it returns, got some "
                "that the closure has changed after backward, not by one factor in all evaluations "
                "(clipping?): a search compares losses with gradients, and bounds the step itself. "
                "Leave clipping to PSGD and InSubspace, or put what is meant into the loss"
            )

    def _check_belongs(self, loss: Loss) -> None:
        """Look once, in the first step, at whether the gradients are those of the loss."""
        if self._checked or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        self._checked = True
        if self._gradients.carried is not None or torch.is_anomaly_enabled() or _may_be_averaged():
            return
        with torch.enable_grad(), _without_autocast():
            if self._gradients.belong_to(loss):
                return
        text = (
            "the closure calls backward, but not on the loss that it returns, and leaves other "
            "gradients than that loss has; in a closure that only returns a loss take derivatives "
            "by torch.autograd.grad, which leaves none"
        )
        if self.alone:
            raise ValueError(f"{self.owner}: closure: {text}")
        _log.warning("%s: %s; they are used as they are", self.owner, text)

    def _refuse_carried(self, whose: str) -> None:
        i = self._gradients.carried
        if i is not None:
            raise ValueError(
                f"{self.owner}: closure: expected gradients of {whose} alone, got them added to "
                f"what params[{i}].grad held before (micro-batches that went through backward "
                "before the step?): the closure is evaluated at several points, each time with its "
                "own loss. Put all micro-batches into one closure with dldr_ext.virtual_batch, or "
                "zero the gradients in the closure or before the step"
            )

    def _refuse_foreign(self) -> None:
        """Refuse gradients that a closure which calls no backward would lose."""
        if self.alone and self._said_dropped:
            return
        i = self._gradients.foreign()
        if i is None:
            return
        way_out = (
            "take them in by a closure that calls backward itself or by dldr_ext.virtual_batch; "
            "drop them by zero_grad() before the step"
        )
        if not self.alone:
            raise ValueError(
                f"{self.owner}: closure: expected no gradients from before the step beside a "
                f"closure that calls no backward, got some in params[{i}].grad: {way_out}"
            )
        self._said_dropped = True
        _log.warning(
            "%s: gradients that came before the step (params[%d].grad) are dropped: the closure "
            "calls no backward, so that its loss alone is what a step sees; %s",
            self.owner, i, way_out,
        )  # fmt: skip

    def _call(
        self,
        closure: Closure,
        grad_mode: bool,
        backward: Callable[[Tensor], Any] | None = None,
    ) -> Loss:
        self.calls += 1
        forget_computed()
        loss: Loss
        with torch.set_grad_enabled(grad_mode), self.inside(), self.leaving_weights():
            if isinstance(closure, VirtualBatch):
                loss = closure(backward or self._scaled_backward)
            else:
                loss = closure()
        if isinstance(loss, bool) or not isinstance(loss, (Tensor, float, int)):
            raise TypeError(
                "closure: expected it to return the loss, a real scalar, got "
                f"{'None' if loss is None else type(loss).__name__}"
            )
        if isinstance(loss, Tensor) and (loss.numel() != 1 or loss.is_complex()):
            raise TypeError(
                "closure: expected it to return the loss, a real scalar, got a tensor of shape "
                f"{tuple(loss.shape)} and dtype {loss.dtype}"
            )
        self._dtype = torch.float64
        if isinstance(loss, Tensor) and loss.is_floating_point() and not _may_be_averaged():
            self._dtype = loss.dtype
        return loss


def _may_be_averaged() -> bool:
    """Return whether gradients may be averaged over ranks after backward, and losses as well."""
    return dist.is_available() and dist.is_initialized()


def _is_about_gradients(error: Exception) -> bool:
    """Return whether an error is one that missing gradients make: by its text or its line."""
    lines = traceback.extract_tb(error.__traceback__)
    return "grad" in str(error) or (bool(lines) and "grad" in (lines[-1].line or ""))


def _nothing(_: Tensor) -> None:
    """Stand for a backward pass that is not wanted."""


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class VirtualBatch:
    """The mean loss over micro-batches, as a closure: see `virtual_batch`."""

    def __init__(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Iterable[Any],
        weights: Sequence[float],
    ) -> None:
        self._loss_fn, self._batches = loss_fn, batches
        self._weights = [weight / sum(weights) for weight in weights]

    def __call__(self, backward: Callable[[Tensor], Any] = Tensor.backward) -> Tensor:
        """Return the mean loss; gradients are added to the parameters' if grad mode is on."""
        total: Tensor | None = None
        for batch, weight in zip(self._batches, self._weights, strict=True):
            loss = self._loss_fn(batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(
                    "virtual_batch: loss_fn: expected it to return the mean loss of a micro-batch, "
                    f"a real scalar, got {got}"
                )
            term = loss * weight
            if torch.is_grad_enabled() and term.requires_grad:
                backward(term)  # frees the graph: no two micro-batches are held at once
            # In float32 at least: a sum of many parts in half precision would be rough.
            detached = term.detach().to(torch.promote_types(term.dtype, torch.float32))
            total = detached if total is None else total + detached
        assert total is not None
        return total


def virtual_batch(
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
) -> VirtualBatch:
    """Make a closure of a batch that is evaluated in parts, with one objective for all of a step.

    Gradient, curvature and every trial see the mean loss over the same micro-batches. With
    gradients, each part goes through backward at once, so that the memory is that of one part;
    trials of a search that need no gradient only run forward.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(batch)`` returns the mean loss of one micro-batch. It does not call backward.
    batches : iterable
        The micro-batches; gone through once for each evaluation, and once at the start where no
        weights are given. A list, or anything that can be iterated over again, such as a
        ``DataLoader``; the entries of a plain iterator (say ``itertools.islice(loader, 8)``) are
        kept.
    weights : sequence of float, optional
        Relative weight of each micro-batch, > 0. By default the number of rows of its first
        tensor: then the result is the mean over all samples, however they are cut.

    Returns
    -------
    VirtualBatch
        For ``optimizer.step``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    See Also
    --------
    PBFGS.step : what a closure is.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import PBFGS, Subspace, virtual_batch
    >>> model = torch.nn.Linear(3, 1)
    >>> inputs, targets = torch.ones(8, 3), torch.zeros(8, 1)
    >>> closure = virtual_batch(
    ...     lambda batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]),
    ...     list(zip(inputs.split(3), targets.split(3))),
    ... )
    >>> optimizer = PBFGS(model.parameters(), Subspace.random(model.parameters(), dim=2))
    >>> before = optimizer.step(closure)
    >>> bool(closure() < before)
    True
    """
    if not callable(loss_fn):
        raise TypeError(f"virtual_batch: loss_fn: expected a callable, got {loss_fn!r}")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            "virtual_batch: batches: expected an iterable of micro-batches, got "
            f"{type(batches).__name__}"
        )
    if isinstance(batches, Iterator):
        batches = list(batches)
    if weights is None:
        weights = [float(_rows(batch)) for batch in batches]
    if not weights:
        raise ValueError("virtual_batch: batches: expected at least one micro-batch, got none")
    if not all(0.0 < weight < float("inf") for weight in weights):
        raise ValueError(f"virtual_batch: weights: expected positive numbers, got {list(weights)}")
    return VirtualBatch(loss_fn, batches, weights)


def _rows(batch: Any) -> int:
    """Return the rows of the first tensor in a micro-batch; 1 if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for entry in batch:
            if isinstance(entry, (Tensor, dict, list, tuple)):
                return _rows(entry)
    return 1
