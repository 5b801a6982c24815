"""Derivatives and batching of `project` and `reconstruct`, at every level of torch's dispatcher.

Both ops are linear in all but the basis and its scale, which are constants: c = P^T g, w = w0 +
P theta. Each is its own tangent map, and the other's transpose; so derivatives of any order are
the same two ops.

`torch.library.register_autograd` drops tangents in silence and does not run under torch.func.
Instead the kernels of the key ``Autograd`` apply a `torch.autograd.Function`, which knows forward
mode, and where torch.func is active the op is taken over before its layers are worked through
(``FuncTorchDynamicLayerFrontMode``), as an `autograd.Function` that a user calls would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

_ops = torch.ops.dldr_ext
_project, _reconstruct = _ops.project.default, _ops.reconstruct.default


def _below_autograd(op: Callable[..., Tensor], *args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _check_constant(op: str, needed: Sequence[Any]) -> None:
    """Check that no derivative is asked for with respect to the basis or its scale."""
    for name, value in zip(("basis", "scale"), needed, strict=True):
        if value is not None and value is not False:
            # As the ops say it, which turn it into a ValueError (errors.py).
            raise RuntimeError(
                f"ValueError: {op}: {name}: expected a tensor that needs no gradient, got one"
            )


def _each(op: Callable[..., Tensor]) -> Any:
    """Return the batching rule: one call for each example, with the bits of that example alone."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        examples = (
            [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([op(*example) for example in examples]), 0

    return staticmethod(vmap)


class Project(torch.autograd.Function):
    """c = P^T g, of (basis, scale, *tensors)."""

    @staticmethod
    def forward(basis: Tensor, scale: Tensor | None, *tensors: Tensor) -> Tensor:
        """Run the kernel."""
        return _below_autograd(_project, basis, tensors, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the constants, and what the tensors are like."""
        basis, scale, *tensors = inputs
        ctx.save_for_backward(basis, scale)
        ctx.save_for_forward(basis, scale)
        ctx.set_materialize_grads(False)  # no zeros of the size of the basis
        ctx.like = [(t.shape, t.dtype) for t in tensors]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return dg = P dc."""
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        _check_constant("project", ctx.needs_input_grad[:2])
        basis, scale = ctx.saved_tensors
        flat = _reconstruct(None, basis, grad, scale)
        pieces = flat.split([shape.numel() for shape, _ in ctx.like])
        tensors = (
            piece.view(shape).to(dtype)
            for piece, (shape, dtype) in zip(pieces, ctx.like, strict=True)
        )
        return None, None, *tensors

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Return P^T times the tangents."""
        _check_constant("project", tangents[:2])
        basis, scale = ctx.saved_tensors
        zero = torch.zeros((), dtype=torch.float32, device=basis.device)
        filled = [
            zero.expand(shape) if tangent is None else tangent
            for tangent, (shape, _) in zip(tangents[2:], ctx.like, strict=True)
        ]
        return _project(basis, filled, scale)

    vmap = _each(lambda basis, scale, *tensors: _project(basis, tensors, scale))


class Reconstruct(torch.autograd.Function):
    """w = origin + P theta, of (basis, scale, origin, theta)."""

    @staticmethod
    def forward(
        basis: Tensor, scale: Tensor | None, origin: Tensor | None, theta: Tensor
    ) -> Tensor:
        """Run the kernel."""
        return _below_autograd(_reconstruct, origin, basis, theta, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the constants."""
        basis, scale, _, theta = inputs
        ctx.save_for_backward(basis, scale)
        ctx.save_for_forward(basis, scale)
        ctx.set_materialize_grads(False)  # no zeros of the size of the basis
        ctx.theta_dtype = theta.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return d theta = P^T dw and d origin = dw."""
        if grad is None:
            return None, None, None, None
        *constants, origin_needed, theta_needed = ctx.needs_input_grad
        _check_constant("reconstruct", constants)
        basis, scale = ctx.saved_tensors
        theta = _project(basis, [grad], scale).to(ctx.theta_dtype) if theta_needed else None
        return None, None, grad if origin_needed else None, theta

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Return the tangent of the origin plus P times that of theta."""
        *constants, origin, theta = tangents
        _check_constant("reconstruct", constants)
        if theta is None:
            assert origin is not None
            return origin.clone()
        basis, scale = ctx.saved_tensors
        return _reconstruct(origin, basis, theta, scale)

    vmap = _each(lambda basis, scale, origin, theta: _reconstruct(origin, basis, theta, scale))


# The ops as torch's keys call them.


def _project_function(basis: Tensor, tensors: Sequence[Tensor], scale: Tensor | None = None) -> Any:
    return Project.apply(basis, scale, *tensors)


def _reconstruct_function(
    origin: Tensor | None, basis: Tensor, theta: Tensor, scale: Tensor | None = None
) -> Any:
    return Reconstruct.apply(basis, scale, origin, theta)


def _project_autograd(basis: Tensor, tensors: Sequence[Tensor], scale: Tensor | None = None) -> Any:
    if _differentiated(basis, scale, *tensors):
        _check_constant("project", _requires_grad(basis, scale))
        return Project.apply(basis, scale, *tensors)
    return _below_autograd(_project, basis, tensors, scale)


def _reconstruct_autograd(
    origin: Tensor | None, basis: Tensor, theta: Tensor, scale: Tensor | None = None
) -> Any:
    if _differentiated(basis, scale, origin, theta):
        _check_constant("reconstruct", _requires_grad(basis, scale))
        return Reconstruct.apply(basis, scale, origin, theta)
    return _below_autograd(_reconstruct, origin, basis, theta, scale)


def _differentiated(basis: Tensor, *tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0 or type(basis) is not Tensor:
        return True  # torch.compile traces levels without a word to forward_ad, on subclasses
    return torch.is_grad_enabled() and any(_requires_grad(basis, *tensors))


def _requires_grad(*tensors: Tensor | None) -> list[bool]:
    return [tensor is not None and tensor.requires_grad for tensor in tensors]


def _batched(op: Any) -> Callable[..., Tensor]:
    """Return the kernel for torch's older vmap, of ``is_grads_batched`` and ``vectorize``."""

    def kernel(*args: Any) -> Tensor:
        level = torch._C._vmapmode_increment_nesting() - 1
        # The op runs a level below, on examples that lie side by side in a first dimension.
        torch._C._vmapmode_decrement_nesting()
        torch._C._vmapmode_decrement_nesting()
        try:
            leaves, spec = tree_flatten(args)
            stacked = [
                torch._remove_batch_dim(leaf, level, 1, 0) if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
            ]
            size = max(len(leaf) for leaf in stacked if isinstance(leaf, Tensor))
            results = [
                op(*tree_unflatten([_example(leaf, i) for leaf in stacked], spec))
                for i in range(size)
            ]
            result = torch.stack(results)
        finally:
            torch._C._vmapmode_increment_nesting()
        return torch._add_batch_dim(result, 0, level)

    return kernel


def _example(leaf: Any, i: int) -> Any:
    return leaf[min(i, len(leaf) - 1)] if isinstance(leaf, Tensor) else leaf


_library = torch.library.Library("dldr_ext", "FRAGMENT")  # kept, or the kernels go with it
_library.impl("project", _project_autograd, "Autograd")
_library.impl("reconstruct", _reconstruct_autograd, "Autograd")
_library.impl("project", _project_function, "FuncTorchDynamicLayerFrontMode")
_library.impl("reconstruct", _reconstruct_function, "FuncTorchDynamicLayerFrontMode")
_library.impl("project", _batched(_project), "Batched")
_library.impl("reconstruct", _batched(_reconstruct), "Batched")
