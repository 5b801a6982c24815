"""Closures: how they are called, checked and counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Closure", "Evaluator", "Loss", "number"]

Loss = Tensor | float
Closure = Callable[[], Loss]


def number(loss: Loss) -> float:
    """The value of a loss, which may have a graph."""
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


class Evaluator:
    """Calls closures of both styles.

    The usual style calls backward itself; the forward-only style returns a loss with a graph, and
    gradients are still None after it. Which one a closure has is found out in `first`.

    Attributes
    ----------
    calls : int
        Evaluations so far.
    gradient_calls : int
        Those that went through a backward pass.
    forward_only : bool
        Style of the closure given to the last `first`.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self.calls = 0
        self.gradient_calls = 0
        self.forward_only = False

    def first(self, closure: Closure) -> Loss:
        """Loss and gradients."""
        loss = self._call(closure, graph=True)
        self.forward_only = not self.has_gradient()
        if self.forward_only:
            self.backward(loss)
        else:
            self.gradient_calls += 1
        return loss

    def again(self, closure: Closure, graph: bool) -> Loss:
        """The loss; for the usual style the gradients too, for the other a graph if asked for."""
        loss = self._call(closure, graph or not self.forward_only)
        if not self.forward_only:
            self.gradient_calls += 1
        return loss

    def backward(self, loss: Loss) -> None:
        """Gradients of a loss that came with a graph, in the forward-only style."""
        if self.forward_only and isinstance(loss, Tensor) and loss.requires_grad:
            self.gradient_calls += 1
            with torch.enable_grad():
                loss.backward()

    def has_gradient(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(p.grad is not None for p in self._params)

    def _call(self, closure: Closure, graph: bool) -> Loss:
        if graph:  # gradients of one evaluation alone, even if the closure does not zero them
            for p in self._params:
                p.grad = None
        self.calls += 1
        with torch.set_grad_enabled(graph):
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
