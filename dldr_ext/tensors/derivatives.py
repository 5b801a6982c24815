"""Which tensors carry a derivative: a gradient, a tangent (dual numbers), or a torch.func level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needed(*tensors: Any) -> bool:
    """Return whether what is computed from the tensors may be differentiated or batched."""
    if torch.is_grad_enabled() and any(
        [isinstance(t, Tensor) and t.requires_grad for t in tensors]
    ):
        return True
    return _transformed()


def refuse(where: str, **tensors: Any) -> None:
    """Raise ValueError for an argument whose derivative would be lost in silence.

    Parameters
    ----------
    where : str
        What begins the message: a function without derivatives.
    **tensors : Tensor
        By the names of the arguments; whatever is no tensor passes.
    """
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise ValueError(
                    f"{where}: {name}: expected a tensor that needs no gradient, since {where} has "
                    "no derivative, got one that does: detach() it, or call under torch.no_grad()"
                )
    refuse_transforms(where, **tensors)


def refuse_transforms(where: str, **tensors: Any) -> None:
    """Raise ValueError for tangents and tensors of torch.func; gradients are left to the caller.

    For functions that read or write values, of leaves that require a gradient too, as
    `torch.Tensor.data` does.

    Parameters
    ----------
    where : str
    **tensors : Tensor or list of Tensor
    """
    if not _transformed():
        return
    for name, value in tensors.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and _carries(tensor):
                raise ValueError(
                    f"{where}: {name}: expected a plain tensor, since {where} has no derivative, "
                    "got a dual number or a tensor of a transform of torch.func: call it outside"
                )


def undefined(where: str, value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return a value of the tensors that raises once its gradient is asked for."""
    if not needed(*tensors):
        return value
    result: Any = _Undefined.apply(where, value, *tensors)
    return result


class _Undefined(torch.autograd.Function):
    @staticmethod
    def forward(where: str, value: Tensor, *tensors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.where = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(f"{ctx.where} has no derivative: pass tensors that need no gradient")


def in_transform() -> bool:
    """Return whether a transform of torch.func is active: grad, jvp, vmap and the like."""
    return torch._C._are_functorch_transforms_active()


def _transformed() -> bool:
    """Return whether torch.func or a dual level is active."""
    if not in_transform() and forward_ad._current_level < 0:
        return False
    return not torch.compiler.is_compiling()  # a level that is traced reaches the ops


def _carries(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None
