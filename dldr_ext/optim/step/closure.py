"""Closures: how they are called, checked and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Loss = Tensor | float
Closure = Callable[[], Loss]
# A step returns what the closure does, a tensor or a number.
LossT = TypeVar("LossT", bound=Tensor | float)


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
    gradients are still None after it. Which one a closure has is found out in `first`. A virtual
    batch calls backward where grad mode is on.

    Attributes
    ----------
    calls : int
        Evaluations so far.
    gradient_calls : int
        Those that went through a backward pass.
    forward_only : bool
        Style of the closure given to the last `first`.
    cheap_without_gradient : bool
        That closure can be asked for the loss alone.
    scaler : torch.amp.GradScaler or None
        Scales the losses that this class calls backward on.
    inside : callable
        Makes the context that closures are called in.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self.scaler: torch.amp.GradScaler | None = None
        self.inside: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.calls = 0
        self.gradient_calls = 0
        self.forward_only = False
        self.cheap_without_gradient = False

    def first(self, closure: Closure) -> Loss:
        """Evaluate the loss and the gradients.

        Raises
        ------
        ValueError
            The closure left no gradient, and its loss has no graph.
        """
        loss = self._call(closure, graph=True)
        self.forward_only = not self.has_gradient()
        self.cheap_without_gradient = self.forward_only or isinstance(closure, VirtualBatch)
        if not self.forward_only:
            self.gradient_calls += 1
        elif isinstance(loss, Tensor) and loss.requires_grad:
            self.backward(loss)
        else:
            raise ValueError(
                "closure: expected a loss with a graph, or gradients from its own backward, got a "
                "loss without either: it was detached, computed under torch.no_grad, or depends on "
                "none of the parameters"
            )
        return loss

    def again(self, closure: Closure, graph: bool) -> Loss:
        """Evaluate the loss; with a graph (forward-only style) or the gradients if asked for.

        The usual style gives gradients whether asked or not.
        """
        graph = graph or not self.cheap_without_gradient
        loss = self._call(closure, graph)
        if graph and not self.forward_only:
            self.gradient_calls += 1
        return loss

    def backward(self, loss: Loss) -> None:
        """Make the gradients of a loss that came with a graph, in the forward-only style."""
        if self.forward_only and isinstance(loss, Tensor) and loss.requires_grad:
            self.gradient_calls += 1
            with torch.enable_grad():
                self._scaled_backward(loss)

    def has_gradient(self) -> bool:
        """Return whether any parameter has a gradient."""
        return any(p.grad is not None for p in self._params)

    def _scaled_backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _call(self, closure: Closure, graph: bool) -> Loss:
        if graph:  # gradients of one evaluation alone, even if the closure does not zero them
            for p in self._params:
                p.grad = None
        self.calls += 1
        loss: Loss
        with torch.set_grad_enabled(graph), self.inside():
            if isinstance(closure, VirtualBatch):
                loss = closure(self._scaled_backward)
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
        return loss


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
