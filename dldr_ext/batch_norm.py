"""Batch norm's running statistics: those of the weights where a model stands.

Running statistics are a moving average over the weights that training came by. A step in a subspace
is a large one, after which they belong to other weights: what a model says in ``eval()`` is then
nonsense, although its weights are good.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as Norm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from .collectives.process_group import Ranks, failing_together, resolve_group
from .tensors.buffers import SavedBuffers

__all__ = ["reestimated"]
_log = logging.getLogger("dldr_ext")


@contextmanager
def reestimated(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Evaluate a model with statistics of the weights where it stands.

    The model is in ``eval()`` inside, and its batch-norm layers have the mean over ``batches`` of
    their statistics, as ``torch.optim.swa_utils.update_bn`` takes it but without dropout. Then
    buffers, momenta and the modes of all modules are again what they were, also after an exception:
    training goes on as if nothing had been evaluated.

    Parameters
    ----------
    model : nn.Module
        Without running statistics it goes into ``eval()``, and no batch is read. A layer that is in
        ``eval()`` within a model that is in ``train()`` is taken for frozen and keeps its
        statistics, as do layers that the batches do not reach.
    batches : iterable
        Of training data, as training sees it (augmented), some thousand examples: tensors, tuples
        and lists that begin with the model's input, or mappings of its arguments. They are moved to
        the model's device, and read once with no gradient.

    Raises
    ------
    TypeError
        The batches are a tensor (``[inputs]`` is one batch), or none; the model is scripted.
    ValueError
        There is no batch, as in a generator that was used up; a lazy layer has not run yet.

    Notes
    -----
    Instance norm with ``track_running_stats`` and synchronized batch norm count as batch norm.
    Compiled models run uncompiled on the batches, so that nothing is compiled anew. Of a model in
    ``DistributedDataParallel`` each rank reads batches of its own, as many as it likes, and all
    ranks get the mean of what they found; every rank must make the call.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext.batch_norm import reestimated
    >>> model = torch.nn.BatchNorm1d(2)
    >>> with reestimated(model, [torch.tensor([[1.0, 5.0], [3.0, 5.0]])]):
    ...     print(model.training, model.running_mean.tolist())
    False [2.0, 5.0]
    >>> model.training, model.running_mean.tolist()
    (True, [0.0, 0.0])
    """
    with ExitStack() as after:
        after.callback(_restore_modes, [(module, module.training) for module in model.modules()])
        for norm in live_norms(model):
            after.callback(SavedBuffers(norm).put_back)
        reestimate_(model, batches)
        model.eval()
        yield


def reestimate_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics for good: `reestimated` without a way back, but for the modes."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        got = "a tensor: [inputs] is one batch" if isinstance(batches, Tensor) else repr(batches)
        raise TypeError(f"reestimated: batches: expected an iterable of batches, got {got}")
    norms = live_norms(model)
    if not norms:
        return
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = model.module if isinstance(model, parallel) else model
    ranks = _ranks_of(model, norms)
    with failing_together(ranks), ExitStack() as after:
        after.callback(_restore_modes, [(module, module.training) for module in model.modules()])
        averages = [after.enter_context(_Average.of(norm)) for norm in norms]
        inner.eval()
        for norm in norms:
            norm.train()
        _run(inner, batches)
        if ranks is not None:
            _average_over(ranks, [one.norm for one in averages if one.calls])


def live_norms(model: nn.Module) -> list[Norm]:
    """Return the modules whose running statistics training writes.

    Raises
    ------
    TypeError
        One was scripted.
    ValueError
        One is lazy and has not run yet.
    """
    found = []
    for name, norm in model.named_modules():
        scripted = isinstance(norm, torch.jit.ScriptModule)
        if scripted and any(key == "running_mean" for key, _ in norm.named_buffers(recurse=False)):
            raise TypeError(
                "reestimated: model: expected batch norm whose momentum can be set, got "
                f"{name} of torch.jit.script: evaluate the model before it is scripted"
            )
        if not (isinstance(norm, Norm) and norm.track_running_stats):
            continue
        mean, frozen = norm.running_mean, model.training and not norm.training
        if mean is not None and is_lazy(mean):
            raise ValueError(f"reestimated: {name}: not initialised yet: run the model once")
        if mean is not None and not frozen:
            found.append(norm)
    return found


class StatisticsWatch:
    """Says once that a model is evaluated between steps with statistics of other weights.

    Looks at one layer that keeps statistics: in ``eval()``, they are of other weights as long as
    nothing has written them since the last step. What runs compiled is not seen.

    Parameters
    ----------
    owner : str
        What to call the optimizer in the message.
    model : nn.Module
    """

    def __init__(self, owner: str, model: nn.Module) -> None:
        norms = [norm for norm in model.modules() if isinstance(norm, Norm) and _keeps(norm)]
        self._norm = min(norms, key=lambda norm: not norm.training, default=None)
        self._notice: _Notice | None = None
        if self._norm is not None:
            for hook in list(self._norm._forward_pre_hooks.values()):
                if isinstance(hook, _Notice):  # of an optimizer before
                    hook.remove(self._norm)
            self._notice = _Notice(owner)
            self._norm.register_forward_pre_hook(self._notice)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_notice": None}  # a copy of the model has none

    def step_begins(self) -> None:
        """Leave what the step evaluates alone."""
        if self._notice is not None:
            self._notice.version = None

    def step_ended(self) -> None:
        """Look at evaluations from now on, if training does not use the running statistics."""
        if self._notice is not None and self._norm is not None and self._norm.training:
            self._notice.version = _version(self._norm)


class _Notice:
    """The hook: it knows neither optimizer nor model, which it would keep alive.

    Attributes
    ----------
    version : int or None
        Of the running mean when the last step ended; None within a step.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.version: int | None = None

    def __call__(self, norm: Any, args: Any) -> None:
        if self.version is None or norm.training or torch.compiler.is_compiling():
            return
        if _version(norm) == self.version:
            self.remove(norm)
            _log.warning(
                "%s: the model is evaluated in eval() with running statistics of batch norm that "
                "are not those of its weights: what it says can be far off; evaluate it in `with "
                "dldr_ext.batch_norm.reestimated(model, batches):`, or re-estimate them first "
                "(torch.optim.swa_utils.update_bn)",
                self._owner,
            )

    def remove(self, norm: nn.Module) -> None:
        """Look no more."""
        for key in [key for key, hook in norm._forward_pre_hooks.items() if hook is self]:
            del norm._forward_pre_hooks[key]

    def __reduce__(self) -> Any:
        # Copies and pickles of a model have a function that does nothing, and need no dldr_ext.
        return getattr, (nullcontext(), "__exit__")


def _keeps(norm: Norm) -> bool:
    return norm.track_running_stats and norm.running_mean is not None


def _version(norm: Norm) -> int | None:
    mean = norm.running_mean
    return None if mean is None or mean.is_inference() else mean._version


class _Average:
    """A layer's cumulative average: the k-th batch that reaches it counts 1/k.

    Momentum None means the same to batch norm, but nothing to instance norm, and costs a transfer
    from the GPU in each pass.
    """

    def __init__(self, norm: Norm) -> None:
        self.norm, self.calls = norm, 0

    @classmethod
    @contextmanager
    def of(cls, norm: Norm) -> Iterator[_Average]:
        """Average while the context is open."""
        average, momentum = cls(norm), norm.momentum
        handle = norm.register_forward_pre_hook(average._before)
        try:
            yield average
        finally:
            handle.remove()
            norm.momentum = momentum

    def _before(self, norm: Any, args: Any) -> None:
        if not self.calls:
            norm.reset_running_stats()
        self.calls += 1
        norm.momentum = 1.0 / self.calls


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    tensors = (tensor for part in (model.parameters(), model.buffers()) for tensor in part)
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    empty = True
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            empty = False
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            if isinstance(inputs, Mapping):
                model(**tree_map(moved, dict(inputs)))
            else:
                model(tree_map(moved, inputs))
    if empty:
        raise ValueError(
            "reestimated: batches: expected at least one batch, got none (a generator that was "
            "used up?)"
        )


def _ranks_of(model: nn.Module, norms: list[Norm]) -> Ranks | None:
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return None
    mean = norms[0].running_mean
    assert mean is not None
    return Ranks("reestimated", resolve_group("reestimated", model)[0], mean.device)


def _average_over(ranks: Ranks, norms: list[Norm]) -> None:
    """Give every rank the mean of the ranks' statistics."""
    statistics = [getattr(norm, key) for norm in norms for key in ("running_mean", "running_var")]
    ranks.check_consistent({"statistics": [len(tensor) for tensor in statistics]}, "statistics")
    flat = torch.cat([tensor.to(torch.float64) for tensor in statistics])
    ranks.sum_(flat, "statistics").div_(ranks.size)
    for tensor, mean in zip(statistics, flat.split([len(t) for t in statistics]), strict=True):
        tensor.copy_(mean)


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
