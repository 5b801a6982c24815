"""Ranks that work together: a process group, and collectives whose failure says why."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..tensors.parameters import is_dtensor, type_name
from ..tensors.watch import live_modules
from .consistency import Facts, difference

_log = logging.getLogger("dldr_ext")
# Seconds in which ranks that saw a collective fail report so, that the others can be named.
_REPORT_SECONDS = 3.0
# Numbers of all ranks that are in memory at a time while they are added in order.
_GATHERED = 1 << 20


class Ranks:
    """A process group as the optimizers and subspaces use it.

    Parameters
    ----------
    owner : str
        What to call the user of the group in messages.
    group : torch.distributed.ProcessGroup
    device : torch.device
        Of the parameters; what goes over the wire is there.
    module : nn.Module, optional
        Wrapped in `DistributedDataParallel`, or given to `fully_shard`.

    Attributes
    ----------
    checked : bool
        Whether the ranks have compared facts since `failing_together` began.
    """

    def __init__(
        self, owner: str, group: Any, device: torch.device, module: nn.Module | None = None
    ) -> None:
        self.owner, self.group, self.device = owner, group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        try:
            self._backend: str = group._get_backend(device).name()
        except RuntimeError:  # none for this kind of device
            raise ValueError(
                f"{owner}: process_group: expected a group that carries tensors of the device "
                f"{device}, got one of backend {dist.get_backend(group)}"
            ) from None
        self._module = module
        self._gathering: list[Any] = []
        self.checked = False

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a group is a connection

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self.owner}: expected one without a process group, which cannot be pickled; save "
            "its state_dict()"
        )

    def evaluation(self) -> AbstractContextManager[Any]:
        """Return the context to call closures in: d numbers are reduced afterwards, not n."""
        self.forget_gathered()
        if isinstance(self._module, nn.parallel.DistributedDataParallel):
            return self._module.no_sync()
        return nullcontext()

    def find_gathering(self, params: Sequence[Tensor]) -> None:
        """Find the modules that gather DTensors in a forward pass, and may keep them whole."""
        wanted = {id(p) for p in params if is_dtensor(p)}
        modules: Iterable[Any] = ()
        if wanted:
            modules = live_modules() if self._module is None else self._module.modules()
        self._gathering = [
            module
            for module in modules
            if hasattr(module, "reshard") and any(id(p) in wanted for p in module.parameters())
        ]

    def forget_gathered(self) -> None:
        """Drop whole weights that modules keep after a forward pass (FSDP2): those before."""
        for module in self._gathering:
            module.reshard()

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        """Sum a tensor over the ranks, in place; bitwise the same on all of them."""
        with self._explained(f"the sum of {what}"):
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        largest = torch.tensor([number], dtype=torch.int64, device=self.device)
        with self._explained("the largest of numbers"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def gathered(self, tensor: Tensor, what: str) -> list[Tensor]:
        """Return the tensors of all ranks, which are of one shape, by rank."""
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._explained(f"the exchange of {what}"):
            dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return pieces

    def ordered_sum(self, tensor: Tensor, what: str) -> Tensor:
        """Return the sum over the ranks, added in their order: the same bits in every run."""
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        step = max(1, _GATHERED // self.size)
        parts = zip(tensor.reshape(-1).split(step), result.view(-1).split(step), strict=True)
        for piece, out in parts:
            first, *of_later_ranks = self.gathered(piece, what)
            for other in of_later_ranks:
                first += other
            out.copy_(first)
        return result

    def broadcast_(self, tensor: Tensor, what: str) -> Tensor:
        """Broadcast from rank 0, in place."""
        with self._explained(f"the exchange of {what}"):
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def scatter_mean(self, full: Tensor, what: str) -> Tensor:
        """Return the rank-th of ``size`` equal pieces of the mean over the ranks.

        A rank sends (size - 1) / size of ``full``, in its dtype, and may find it overwritten. The
        mean is float32 at least where gloo carries it; elsewhere 16 bits are summed in 16 bits, as
        DDP does.
        """
        with self._explained(f"the sum of {what}"):
            if self._backend == "gloo":  # whose reduce-scatter is an all-reduce, twice the bytes
                pieces = torch.empty_like(full)
                dist.all_to_all_single(pieces, full, group=self.group)
                wide = torch.promote_types(full.dtype, torch.float32)
                return pieces.view(self.size, -1).sum(0, dtype=wide).div_(self.size)
            piece = full.new_empty(len(full) // self.size)
            _reduce_scatter(piece, full.div_(self.size), group=self.group)
        return piece

    def gather(self, piece: Tensor, what: str) -> Tensor:
        """Return the equal pieces of all ranks, one after the other."""
        full = piece.new_empty(len(piece) * self.size)
        with self._explained(f"the pieces of {what}"):
            _all_gather(full, piece, group=self.group)
        return full

    def check_consistent(self, facts: Facts, what: str = "construction") -> None:
        """Check that the facts of all ranks are the same.

        Raises
        ------
        ValueError
            On every rank: the first fact that differs from rank 0's, with both ranks.
        """
        self.checked = True
        problem = difference(self.exchange(facts, what))
        if problem is not None:
            raise ValueError(f"{self.owner}: process_group: {problem}")

    def exchange(self, facts: Facts, what: str) -> list[Facts]:
        """Return the facts of every rank, in the order of the ranks."""
        text = json.dumps(facts).encode()
        length = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        with self._explained(f"the facts of each rank, for {what}"):
            dist.all_reduce(length, op=dist.ReduceOp.MAX, group=self.group)
            padded = torch.full((int(length),), ord(" "), dtype=torch.uint8, device=self.device)
            padded[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
            pieces = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(pieces, padded, group=self.group)
        return [json.loads(bytes(piece.tolist())) for piece in pieces]

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.owner}: {what} over {self.size} ranks failed on rank {self.rank}: "
                f"{self._unresponsive()} ({error})"
            ) from error

    def _unresponsive(self) -> str:
        """Return which ranks never reported the failure to the store, as dead ones do not."""
        silent = [rank for rank in range(self.size) if rank != self.rank]
        try:
            store = self.group.get_group_store()
            store.set(f"dldr_ext/stopped/{self.rank}", "")
            end = time.monotonic() + _REPORT_SECONDS
            while silent and time.monotonic() < end:
                time.sleep(0.02)
                silent = [r for r in silent if not store.check([f"dldr_ext/stopped/{r}"])]
        except (AttributeError, RuntimeError):  # a torch without it; the rank that kept it is gone
            return "the group's store does not answer, so that the rank at fault is not known"
        if not silent:
            return "every rank stopped"
        names = ("rank " if len(silent) == 1 else "ranks ") + ", ".join(map(str, silent))
        return (
            f"no sign of {names}, which died, hangs, or is not at this point of the program "
            "(every rank must make the same calls)"
        )


@contextmanager
def failing_together(ranks: Ranks | None) -> Iterator[None]:
    """Raise an error before the next consistency check on every rank, not on this one alone."""
    if ranks is None:
        yield
        return
    ranks.checked = False
    try:
        yield
    except Exception as error:
        if not ranks.checked:
            ranks.exchange({"error": f"{type(error).__name__}: {error}"}, "an error")
        raise


def resolve_group(owner: str, process_group: Any) -> tuple[Any, nn.Module | None]:
    """Return the group that the argument ``process_group`` means, and the module if it was one.

    Raises
    ------
    TypeError, ValueError
        Not a group; torch.distributed is not initialised; this rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{owner}: process_group: expected an initialised group, got "
            f"{_shown(process_group)} before torch.distributed.init_process_group"
        )
    module = process_group if isinstance(process_group, nn.Module) else None
    group: Any = process_group
    if isinstance(process_group, str) and process_group == "world":
        group = dist.group.WORLD
    elif isinstance(process_group, nn.parallel.DistributedDataParallel):
        group = process_group.process_group
    elif isinstance(process_group, nn.Module):
        meshes = [p.device_mesh for p in process_group.parameters() if is_dtensor(p)]
        if not meshes and hasattr(process_group, "reshard"):
            raise ValueError(
                f"{owner}: process_group: expected a module with DTensor parameters, got one in "
                "fully_shard that has gathered them in an evaluation: call reshard() of the "
                "module, and take its parameters then"
            )
        if not meshes:
            raise ValueError(
                f"{owner}: process_group: expected a module in DistributedDataParallel or one with "
                f"DTensor parameters (fully_shard), got a plain {type_name(process_group)}; pass "
                "its process group or 'world'"
            )
        group = meshes[0]
    if isinstance(group, dist.DeviceMesh):
        group = _group_of_mesh(group)
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{owner}: process_group: expected a group with this rank in it, got one without rank "
            f"{dist.get_rank()}"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{owner}: process_group: expected a torch.distributed.ProcessGroup, a DeviceMesh, "
            f"'world', a module in DistributedDataParallel or fully_shard, or None, got "
            f"{_shown(process_group)}"
        )
    return group, module


def ranks_for(owner: str, process_group: Any, params: Any) -> Ranks | None:
    """Return the ranks that an optimizer steps with; None: it steps alone."""
    sharded = _first(params)
    if process_group is None:
        if is_dtensor(sharded):
            raise ValueError(
                f"{owner}: process_group: expected the module that the DTensor parameters belong "
                "to (fully_shard), or its group, got None"
            )
        _note_lonely(owner)
        return None
    group, module = resolve_group(owner, process_group)
    device = torch.device("cpu") if sharded is None else sharded.device
    return Ranks(owner, group, device, module)


def as_list(params: Any) -> Any:
    """Return an iterator as a list: it is looked at twice."""
    return (
        list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor) else params
    )


def _first(params: Any) -> Tensor | None:
    """Return a tensor of parameters in any of the forms that `named_parameters` takes."""
    if isinstance(params, Tensor):
        return params
    if isinstance(params, dict):
        return _first(params.get("params", ()))
    if isinstance(params, (list, tuple)):
        return next((t for t in map(_first, params) if t is not None), None)
    return None


def _note_lonely(owner: str) -> None:
    """Warn where None was taken for one process though there are several."""
    launched, ready = int(os.environ.get("WORLD_SIZE", "1")), False
    if dist.is_available() and dist.is_initialized():
        launched, ready = dist.get_world_size(), True
    if launched > 1:
        _log.warning(
            "%s: process_group: None, so that this process steps alone, though %d run together%s; "
            'pass process_group="world" for one optimizer over all of them',
            owner,
            launched,
            "" if ready else " and torch.distributed is not initialised",
        )


def _group_of_mesh(mesh: Any) -> Any:
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.group.WORLD if mesh.size() == dist.get_world_size() else mesh._flatten().get_group()


def _shown(process_group: Any) -> str:
    return repr(process_group) if isinstance(process_group, str) else type_name(process_group)


def _named(*names: str) -> Any:
    """Return a function of torch.distributed under its new or its old name."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


if dist.is_available():
    _reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
    _all_gather = _named("all_gather_single", "all_gather_into_tensor")
