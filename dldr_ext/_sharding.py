"""Whether a basis is kept whole on every rank or cut over them."""

from __future__ import annotations

import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from ._claims import Claims
from ._params import dtype_name, type_name
from ._ranks import Ranks, members
from .bench import free_memory
from .subspace import Subspace

if TYPE_CHECKING:
    from .distributed import ShardedSubspace

__all__ = ["checked_whole", "shard_if_needed"]

# Flat vectors beside the basis: origin, point, direction, a kept gradient, the gradients.
_VECTORS = 5


def shard_if_needed(
    subspace: Subspace,
    process_group: Any,
    *,
    device: torch.device | str | None = None,
    memory: float | None = None,
) -> Subspace | ShardedSubspace:
    """The subspace for this rank's optimizer: whole if that fits on every rank, else cut.

    A whole basis needs d n numbers on each rank, and d numbers on the wire for a gradient; one that
    is cut, d n / size numbers, and n on the wire. All ranks decide alike.

    Parameters
    ----------
    subspace : Subspace
        The whole one, on every rank; in the host's memory, say, where ``device`` is a GPU.
    process_group : ProcessGroup, DeviceMesh, module or "world"
    device : torch.device or str, optional
        Where the weights are; None: where the subspace is.
    memory : float, optional
        Bytes that basis, origin and the optimizer's flat vectors may take on this rank. None: what
        is free on the device, shared among the ranks on it.

    Returns
    -------
    Subspace or ShardedSubspace

    Raises
    ------
    TypeError, ValueError
        On every rank: an argument on one of them is not as expected, or subspaces differ.
    """
    from .distributed import ShardedSubspace

    name = "shard_if_needed"
    group, _ = members(name, process_group)
    wanted = getattr(subspace, "device", "cpu") if device is None else device
    here = torch.empty(0, device=wanted).device  # with its index
    ranks = Ranks(name, group, here)
    with ranks.agreeing():
        subspace = checked_whole(name, subspace)
        room = _checked_memory(name, memory)
        kind = dtype_name(subspace.dtype)
        ranks.agree({"dim": subspace.dim, "numel": subspace.numel, "dtype": kind}, name)
    own: Claims = {"need": _needed(subspace, here), "room": room, "device": None}
    if room is None:
        own |= {"room": free_memory(here), "device": _name_of(here)}
    told = ranks.exchange(own, name)
    users = Counter(one["device"] for one in told) | {None: 1}
    if all(one["need"] * users[one["device"]] <= one["room"] for one in told):
        return subspace.to(device=here)
    return ShardedSubspace(subspace, process_group, device=here)


def checked_whole(owner: str, subspace: Any) -> Subspace:
    """A `Subspace`, or an error."""
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"{owner}: subspace: expected a Subspace (others cannot be cut by columns), got "
            f"{type_name(subspace)}"
        )
    return subspace


def _checked_memory(owner: str, memory: Any) -> float | None:
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory >= 0:
        raise ValueError(f"{owner}: memory: expected a number of bytes or None, got {memory!r}")
    return memory


def _needed(subspace: Subspace, device: torch.device) -> int:
    """Bytes of a whole basis and the vectors of an optimizer, but for a basis on that GPU already.

    One in the host's memory counts: it may be mapped from a file.
    """
    vectors = _VECTORS * subspace.origin.nbytes
    if subspace.device == device and device.type != "cpu":
        return vectors
    scale = 0 if subspace.scale is None else subspace.scale.nbytes
    return subspace.basis.nbytes + scale + vectors


def _name_of(device: torch.device) -> str:
    """The same for ranks that share the memory of a device."""
    if device.type != "cuda":
        return socket.gethostname()
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
