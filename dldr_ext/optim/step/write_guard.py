"""Detection of weights and gradients that something else wrote."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ...tensors.parameters import forget_computed, local_shard

# Parameters that `GradientWatch.measuring` looks at, and how large they are at most.
_SAMPLE, _SMALL = 8, 16384
# Two gradients of one loss are as parallel as this, if they have many elements.
_PARALLEL, _LONG = 0.9999, 32
_REWRITING = (
    "set max_norm=None, or compute what the model uses from the weight, without writing it "
    "(torch.nn.utils.parametrize)"
)


class WriteGuard:
    """A guard that notices writes to the parameters between two steps.

    It looks at autograd's version counters, addresses and strides, which costs nothing. Writes that
    none of them shows, ``p.data.add_()`` for one, go unnoticed.

    Parameters
    ----------
    owner : str
        What to call the optimizer in messages.
    params : sequence of Tensor
    named : callable
        Gives what to add to the index of a parameter in messages: its name.
    expected : callable
        Makes the flat weights as they should be; called only after a write, which may have written
        the same values, as loading a checkpoint does.

    Attributes
    ----------
    forget_gathered : callable or None
        Drops what modules have gathered of the weights before.
    """

    def __init__(
        self,
        owner: str,
        params: Sequence[Tensor],
        named: Callable[[int], str],
        expected: Callable[[], Tensor],
    ) -> None:
        self._owner, self._params, self._named, self._expected = owner, params, named, expected
        self.forget_gathered: Callable[[], None] | None = None
        self._seen: list[int] = []
        self._strides: list[tuple[int, ...]] = []

    def remember(self) -> None:
        """Take the weights as they are for those that should be there."""
        forget_computed()
        if self.forget_gathered is not None:
            self.forget_gathered()
        self._seen = self._now()
        if not self._same_strides():
            self._strides = list(map(Tensor.stride, self._params))

    def check(self) -> None:
        """Refuse weights that are no longer those of the last `remember`.

        Raises
        ------
        ValueError
            Naming the first parameter that differs.
        """
        now = self._now()
        if now == self._seen and self._same_strides():
            return
        i = self._first_other()
        if i is not None:
            raise ValueError(
                f"{self._owner}: params[{i}]: expected the weights that the last step left, got "
                f"others{self._named(i)}: something else wrote to them, and the optimizer would "
                f"undo that; call {self._owner}.resync() to go on from there. If it was the model "
                "itself, in its forward pass (nn.Embedding(max_norm=), weights clamped there): "
                f"{_REWRITING}"
            )
        self._seen, self._strides = now, list(map(Tensor.stride, self._params))

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Refuse an evaluation that writes the weights.

        Raises
        ------
        ValueError
            Naming the first parameter that is another one afterwards.
        """
        before = [p._version for p in self._params]
        yield
        if [p._version for p in self._params] != before:
            i = self._first_other()
            if i is not None:
                raise ValueError(
                    f"{self._owner}: closure: expected an evaluation that leaves the weights as "
                    f"they are, got one that writes params[{i}]{self._named(i)}, as "
                    "nn.Embedding(max_norm=) does in its forward pass, or a model that clamps its "
                    f"weights: theta would no longer describe them; {_REWRITING}"
                )

    def _first_other(self) -> int | None:
        """Return the first parameter that is not as expected."""
        flat, start = self._expected(), 0
        for i, p in enumerate(self._params):
            values = flat[start : start + p.numel()]
            start += p.numel()
            if not torch.equal(p.detach().reshape(-1).to(values.device), values.to(p.dtype)):
                return i
        return None

    def _same_strides(self) -> bool:
        # These tuples are gone at once: see below.
        return list(map(Tensor.stride, self._params)) == self._strides

    def _now(self) -> list[int]:
        # No tuples: the garbage collector would look at all of them, in each step.
        return [p._version for p in self._params] + [p.data_ptr() for p in self._params]


class GradientWatch:
    """What became of the parameters' gradients: new ones, and those that were there before.

    A gradient is known by its object and autograd's version counter.

    Attributes
    ----------
    carried : int or None
        The first parameter for which a backward pass in the last `watching` added to a gradient
        other than zero from before it.
    factor : float or None
        What gradients were multiplied by after backward in the last `measuring`: 1 if nothing was
        done, NaN if it was something else, None if it is not known. Of some parameters.
    rounding : float
        Two factors that differ by no more, relative, are the same.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self.carried: int | None = None
        self.factor: float | None = None
        self._ran = False
        self._sample = _sample(params)
        self.rounding = max((8 * torch.finfo(p.dtype).eps for p in self._sample), default=0.0)
        self.remember()
        with _LOCK:
            _WATCHES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"_params": self._params}  # references to gradients cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{key[1:]: value for key, value in state.items()})  # type: ignore[misc]

    def remember(self) -> None:
        """Take the gradients as they are for those that the optimizer's own work has left."""
        self._left = _seen(self._params)

    def forget_left(self) -> None:
        """Drop the gradients that are as at the last `remember`."""
        for p, same in zip(self._params, self._same(self._left), strict=True):
            if same:
                p.grad = None

    def foreign(self) -> int | None:
        """Return the first parameter with a gradient, not zero, that came since `remember`."""
        same = self._same(self._left)
        return next((i for i, p in enumerate(self._params) if not same[i] and any_of(p.grad)), None)

    @contextmanager
    def own_backward(self) -> Iterator[None]:
        """Run backward for this optimizer: what it leaves with others' parameters is old to them.

        So two networks that are trained against each other need no zeroing.
        """
        with _LOCK:
            known = list(_WATCHES)
        others = [watch for watch in known if watch is not self and watch.foreign() is None]
        yield
        for watch in others:
            watch.remember()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what backward passes do to gradients that came since `remember`."""
        self.carried, self._ran = None, False
        self._before = _seen(self._params)
        held: dict[int, Tensor | bool] = {}
        nodes, handles = [], []
        for i, (p, same) in enumerate(zip(self._params, self._same(self._left), strict=True)):
            if p.grad is not None and not same and p.requires_grad:
                with torch.enable_grad():  # the node lives as long as something refers to it
                    nodes.append(get_gradient_edge(p).node)
                handles.append(nodes[-1].register_prehook(self._hook(i, p, held)))
        try:
            yield
        except BaseException:
            if not handles:  # what it has left is its own
                self.remember()
            raise
        finally:
            for handle in handles:
                handle.remove()
        self.carried = next((i for i in sorted(held) if held[i]), None)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Look at what becomes of gradients between backward and the end."""
        self.factor = None
        kept: dict[Tensor, tuple[Tensor, Tensor, int]] = {}

        def keep(p: Tensor) -> None:
            if p.grad is not None and p.grad.layout is torch.strided:
                kept[p] = p.grad.detach().clone(), p.grad, p.grad._version

        handles = [
            p.register_post_accumulate_grad_hook(keep) for p in self._sample if p.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        changed = [
            (was, p.grad)
            for p, (was, tensor, version) in kept.items()
            if p.grad is not None and (p.grad is not tensor or tensor._version != version)
        ]
        if kept:
            self.factor = _factor(changed, self.rounding) if changed else 1.0

    def belong_to(self, loss: Tensor) -> bool:
        """Return whether the gradients are, but for a factor, those of a loss.

        They are if it has been through backward, which cannot be done again then.
        """
        # Near the loss, for little work, and not so short as to be parallel by chance.
        listed = sorted(reversed(self._params), key=lambda p: p.numel() < _LONG)
        p = next((p for p in listed if any_of(p.grad)), None)
        if p is None or p.grad is None or p.grad.layout is not torch.strided:
            return True
        try:
            (own,) = torch.autograd.grad(loss, [p], retain_graph=True, allow_unused=True)
        except RuntimeError:
            return True
        if own is None:
            return False
        a, b = (local_shard(g.detach()).reshape(-1).double() for g in (own, p.grad))
        return bool(torch.dot(a, b).abs() >= _PARALLEL * a.norm() * b.norm())

    def new(self) -> bool:
        """Return whether what ran in the last `watching` has left gradients of its own."""
        if self._ran:
            return True
        references, versions = self._before
        pairs = zip(self._params, references, strict=True)
        if any(p.grad is not None and not _is(p.grad, before) for p, before in pairs):
            return True
        # Written in place, by no backward pass: computed some other way, or zeroed.
        gradients = ((p.grad, v) for p, v in zip(self._params, versions, strict=True))
        return any(g is not None and g._version != v and bool(any_of(g)) for g, v in gradients)

    def _hook(self, i: int, p: Tensor, held: dict[int, Tensor | bool]) -> Callable[[Any], None]:
        def before_accumulation(_: Any) -> None:
            self._ran = True
            # Zeroed in between, what came before is gone.
            held[i] = any_of(p.grad) & held.get(i, True)

        return before_accumulation

    def _same(self, known: _Seen) -> list[bool]:
        """Return which parameters have a gradient as they had it then."""
        gradients = [p.grad for p in self._params]
        return [
            g is not None and _is(g, before) and g._version == version
            for g, before, version in zip(gradients, *known, strict=True)
        ]


_WATCHES: weakref.WeakSet[GradientWatch] = weakref.WeakSet()
_LOCK = Lock()  # threads may each train a model of their own
# References and version counters: no pairs, which the garbage collector would all look at.
_Seen = tuple[list["weakref.ref[Tensor] | None"], list[int]]


def _seen(params: Sequence[Tensor]) -> _Seen:
    gradients = [p.grad for p in params]
    return (
        [None if g is None else weakref.ref(g) for g in gradients],
        [0 if g is None else g._version for g in gradients],
    )


def _is(gradient: Tensor, reference: weakref.ref[Tensor] | None) -> bool:
    return reference is not None and reference() is gradient


def any_of(gradient: Tensor | None) -> Tensor | bool:
    """Return whether a gradient has elements other than zero, on its device."""
    if gradient is None:
        return False
    gradient = gradient.detach()
    return local_shard(gradient).any() if gradient.layout is torch.strided else True


def _sample(params: Sequence[Tensor]) -> list[Tensor]:
    """Return some of the smaller parameters, from all of the list."""
    small = [p for p in params if p.numel() <= _SMALL]
    return small[:: -(-len(small) // _SAMPLE)] if small else []


def _factor(pairs: list[tuple[Tensor, Tensor]], rounding: float) -> float | None:
    """Return what tensors were multiplied by to give others; NaN: something else was done."""
    old, new = (
        torch.cat([local_shard(pair[i].detach()).reshape(-1).double() for pair in pairs])
        for i in (0, 1)
    )
    square, size = float(torch.dot(old, old)), float(torch.linalg.vector_norm(new))
    if not (0.0 < square < math.inf and math.isfinite(size)):
        return None
    factor = float(torch.dot(old, new)) / square
    rest = float(torch.linalg.vector_norm(new - factor * old))
    return factor if rest <= rounding * size else math.nan
