"""Closures: how they are called, checked and counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._virtual_batch import VirtualBatch

__all__ = ["Closure", "Evaluator", "Loss", "number", "returned"]

Loss = Tensor | float
Closure = Callable[[], Loss]


def number(loss: Loss) -> float:
    """The value of a loss, which may have a graph."""
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def returned(own: Loss | None, mean: Loss | None) -> Loss | None:
    """What a step returns: the loss, detached; of several ranks their mean, in its dtype."""
    if not isinstance(own, Tensor):
        return mean if mean is None else number(mean)
    assert isinstance(mean, Tensor)
    return own.detach() if mean is own else mean.to(device=own.device, dtype=own.dtype)


class Evaluator:
    """Calls closures of both styles.

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
        """Loss and gradients.

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
        """The loss; a graph (forward-only style) or the gradients (the others) if asked for.

        The usual style gives gradients whether asked or not.
        """
        graph = graph or not self.cheap_without_gradient
        loss = self._call(closure, graph)
        if graph and not self.forward_only:
            self.gradient_calls += 1
        return loss

    def backward(self, loss: Loss) -> None:
        """Gradients of a loss that came with a graph, in the forward-only style."""
        if self.forward_only and isinstance(loss, Tensor) and loss.requires_grad:
            self.gradient_calls += 1
            with torch.enable_grad():
                self._scaled_backward(loss)

    def has_gradient(self) -> bool:
        """Whether any parameter has a gradient."""
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
