"""The state dict of an optimizer in a subspace: made, and checked before any of it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .status import Status

# A loaded point further than this from origin + P theta belongs to another subspace.
_FOREIGN = 1e-2


def check_reader(optimizer: torch.optim.Optimizer, module: str | None) -> None:
    """Refuse the modules of torch that keep nothing but the state of single parameters."""
    if str(module).startswith(("torch.distributed.checkpoint.", "torch.distributed.fsdp.")):
        raise ValueError(
            f"{type(optimizer).__name__}: state_dict: expected to be saved as a whole, got asked "
            f"by {module}, which keeps the state of single parameters and drops theta and all "
            "that was learnt: save dldr_ext.dcp.stateful(optimizer) beside the model's state dict"
        )


def give_out(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Add the optimizer's entries to what torch saves."""
    optimizer._learn_early()
    state_dict["subspace"] = {
        "theta": optimizer._theta.detach().clone(),
        "status": optimizer._status.name,
        "steps": optimizer._steps,
        "closure_calls": optimizer._evaluator.calls,
        "gradient_calls": optimizer._evaluator.gradient_calls,
        **optimizer._method_state(),
    }


def take_in(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Check a state; what is to be used of it then waits in the optimizer."""
    name = type(optimizer).__name__
    if not (isinstance(state_dict, dict) and isinstance(state_dict.get("subspace"), dict)):
        raise ValueError(wrong(optimizer, state_dict))
    state = state_dict["subspace"]
    counts = ("steps", "closure_calls", "gradient_calls")
    expected = {"theta", "status", *counts, *optimizer._method_state()}
    if set(state) != expected:
        raise ValueError(
            f"{name}: state_dict: expected the keys {sorted(expected)} in 'subspace', got "
            f"{sorted(map(str, state))}"
        )
    theta = saved_tensor(optimizer, state, "theta", optimizer._theta)
    try:
        status = Status[state["status"]]
    except KeyError:
        raise ValueError(
            f"{name}: state_dict: status: expected a Status, got {state['status']!r}"
        ) from None
    method = optimizer._checked_method_state(state, theta)
    optimizer._incoming = {"theta": theta, "status": status, "method": method}
    optimizer._incoming |= {count: int(state[count]) for count in counts}


def wrong(optimizer: torch.optim.Optimizer, got: Any) -> str:
    """Return the message about something that is no state dict of this optimizer."""
    name = type(optimizer).__name__
    shown = f"the keys {sorted(map(str, got))}" if isinstance(got, dict) else type(got).__name__
    return f"{name}: state_dict: expected what {name}.state_dict() returns, got {shown}"


def saved_tensor(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], key: str, like: Tensor
) -> Tensor:
    """Return a copy of a saved tensor, on the device and in the dtype of ``like``."""
    value = state[key]
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{type(optimizer).__name__}: state_dict: {key}: expected a tensor of shape "
            f"{tuple(like.shape)}, got {got}"
        )
    return value.to(device=like.device, dtype=like.dtype, copy=True)


def check_point(optimizer: Any, point: Tensor, origin: Tensor | None, theta: Tensor) -> None:
    """Refuse a saved point that is not origin + P theta in this subspace."""
    here = torch.empty_like(point)
    optimizer.subspace.combine_(here, optimizer._to_basis(theta), origin)
    distance = float(torch.linalg.vector_norm(here - point))
    if not distance <= _FOREIGN * float(torch.linalg.vector_norm(point)):
        raise ValueError(
            f"{type(optimizer).__name__}: state_dict: point: expected origin + P theta in this "
            f"optimizer's subspace, got a point at distance {distance:.3g} from it; the state "
            "was saved with another subspace"
        )
