"""Batches that do not fit in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["VirtualBatch", "virtual_batch"]


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
        """The mean loss; gradients are added to those of the parameters if grad mode is on."""
        total: Tensor | None = None
        for batch, weight in zip(self._batches, self._weights, strict=True):
            loss = self._loss_fn(batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(
                    "virtual_batch: loss_fn: expected it to return the mean loss of a micro-batch, "
                    f"a real scalar, got {got}"
                )
            part = loss * weight
            if torch.is_grad_enabled() and part.requires_grad:
                backward(part)  # frees the graph: no two micro-batches are held at once
            # In float32 at least: a sum of many parts in half precision would be rough.
            detached = part.detach().to(torch.promote_types(part.dtype, torch.float32))
            total = detached if total is None else total + detached
        assert total is not None
        return total


def virtual_batch(
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
) -> VirtualBatch:
    """A closure of a batch that is evaluated in parts, with one objective for all of a step.

    Gradient, curvature and every trial see the mean loss over the same micro-batches. With
    gradients, each part goes through backward at once, so that the memory is that of one part;
    trials of a search that need no gradient only run forward.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(batch)`` returns the mean loss of one micro-batch. It does not call backward.
    batches : iterable
        The micro-batches; gone through once for each evaluation, and once at the start where no
        weights are given. A list, or anything that can be
        iterated over again, such as a ``DataLoader``; the entries of a plain iterator (say
        ``itertools.islice(loader, 8)``) are kept.
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
    """Rows of the first tensor in a micro-batch; 1 if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for entry in batch:
            if isinstance(entry, (Tensor, dict, list, tuple)):
                return _rows(entry)
    return 1
