"""What torch.distributed.checkpoint saves: flat vectors by their columns, all else as bytes.

The columns that a rank has are chunks of tensors of n columns, so that DCP itself gives any number
of ranks, cut in whatever way, the columns that they have.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ..collectives.partition import Run, block_runs, cut, runs_of
from ..files.column_checkpoint import Columns
from ..subspace.base import PER_DIRECTION
from ..subspace.dense import Subspace
from ..tensors.formats import blocks
from ..tensors.parameters import is_dtensor
from .local import LocalSubspace
from .sharded import ShardedSubspace


@runtime_checkable
class FlatState(Protocol):
    """What is asked of an optimizer: some entries of its state are flat vectors of the weights.

    Attributes
    ----------
    flat_state : tuple of str
        The keys of these entries in ``state_dict()["subspace"]``.
    subspace : AffineSubspace
        Whose origin is such a vector.
    """

    flat_state: tuple[str, ...]

    @property
    def leaves(self) -> list[Any]:
        """The parameters, in the subspace's order."""

    @property
    def subspace(self) -> Any:
        """The subspace that the weights move in."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, copied."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""


class _Optimizer:
    """A Stateful: flat vectors by columns, and the rest of the state dict as bytes."""

    def __init__(self, optimizer: FlatState) -> None:
        self._optimizer = optimizer
        leaves = optimizer.leaves
        self._total = sum(p.numel() for p in leaves)
        sharded = any(map(is_dtensor, leaves))
        self._runs = runs_of(leaves) if sharded else [(0, self._total)]

    def state_dict(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()
        entries, flat = state["subspace"], self._optimizer.flat_state
        origin = self._optimizer.subspace.origin
        vectors = {key: entries.pop(key) for key in flat}
        present = [key for key, vector in vectors.items() if vector is not None]
        buffer = io.BytesIO()
        torch.save({**state, "flat": present, "total": self._total}, buffer)
        columns = {
            key: Columns(
                torch.zeros_like(origin) if vector is None else vector,
                self._runs,
                self._total,
                known=vector is not None,
            )
            for key, vector in vectors.items()
        }
        return {"state": buffer.getvalue(), **columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = type(self._optimizer).__name__
        state = torch.load(io.BytesIO(state_dict["state"]), weights_only=True)
        present, total = state.pop("flat"), state.pop("total")
        if total != self._total:
            raise ValueError(
                f"{name}: checkpoint: expected the state of {self._total} weights, got {total}"
            )
        for key in self._optimizer.flat_state:
            state["subspace"][key] = state_dict[key].local if key in present else None
        self._optimizer.load_state_dict(state)


class _Subspace:
    """A Stateful that is only saved: `ShardedSubspace.load` and the like make another one."""

    def __init__(
        self, subspace: Any, runs: Sequence[Run], total: int, shapes: list[Any] | None
    ) -> None:
        self._subspace, self._runs, self._total, self._shapes = subspace, runs, total, shapes

    def state_dict(self) -> dict[str, Any]:
        subspace, runs, total = self._subspace, self._runs, self._total
        local = subspace if isinstance(subspace, Subspace) else subspace.local
        metadata: dict[str, Any] = {
            "shapes": self._shapes,
            "names": subspace.names,
            "choice": subspace.choice,
        }
        for key in PER_DIRECTION:
            value = getattr(subspace, key)
            metadata[key] = None if value is None else value.tolist()
        basis = subspace._placeholder if local is None else local.basis
        origin = subspace.origin
        origin_runs = [(0, total)] if isinstance(subspace, ShardedSubspace) else runs
        state = {
            "known": json.dumps(metadata),
            "basis": Columns(basis, runs, total),
            "origin": Columns(origin, origin_runs, total),
        }
        scale = None if local is None else local.scale
        if scale is not None:
            state["scale"] = Columns(scale, block_runs(runs), blocks(total))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise TypeError(
            f"{type(self._subspace).__name__}: its load() makes one of the folder; none is loaded "
            "into another"
        )


def stateful(what: Any) -> Any:
    """Wrap an optimizer or a subspace so that `torch.distributed.checkpoint` saves it.

    ``dcp.save({"optimizer": stateful(optimizer), "subspace": stateful(subspace)},
    checkpoint_id=folder)`` on all ranks; any number of ranks loads: the subspace with
    `ShardedSubspace.load`, `LocalSubspace.load` or `Subspace.load` of the folder, then
    ``dcp.load({"optimizer": stateful(optimizer)}, checkpoint_id=folder)``.

    Parameters
    ----------
    what : PBFGS, PSGD, Subspace, ShardedSubspace or LocalSubspace

    Raises
    ------
    TypeError, ValueError
        Something else; a `LocalSubspace` that was made of a basis of nobody knows which columns, or
        with one of 8 bits (its blocks are those of one cut: save it before `quantize`).
    """
    if isinstance(what, FlatState):
        return _Optimizer(what)
    if isinstance(what, LocalSubspace):
        if what.layout is None:
            raise ValueError(
                "LocalSubspace: expected one of a trajectory, of(), random() or load(), got one "
                "whose columns among all are not known"
            )
        if what.local is not None and what.local.scale is not None:
            raise ValueError("LocalSubspace: expected a basis that is not quantised, got 8 bits")
        return _Subspace(what, what.layout.runs, what.layout.numel, what.layout.shapes)
    if isinstance(what, ShardedSubspace):
        begin, end = cut(what.numel, what.ranks.rank, what.ranks.size)
        runs = [(begin, end)] if begin < end else []
        return _Subspace(what, runs, what.numel, what.shapes)
    if isinstance(what, Subspace):
        return _Subspace(what, [(0, what.numel)], what.numel, what.shapes)
    raise TypeError(
        f"stateful: expected an optimizer or a subspace of one basis, got {type(what).__name__}"
    )
