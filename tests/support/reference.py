"""float64 plain-torch reference of every op, and the rule that says how near an op must come.

Tolerance rule (as flash-attention's tests do it): the error against the float64 reference may be
at most twice what PyTorch's own computation in the working precision makes on the same stored
numbers, plus a few roundings of the result for the cases where torch happens to be exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCALE_BLOCK = 256


def decode(rows: Tensor, scale: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Stored rows as plain numbers."""
    wide = rows.to(dtype)
    if scale is not None:
        wide = wide * scale.to(dtype).repeat_interleave(SCALE_BLOCK, dim=1)[:, : rows.shape[1]]
    return wide


def flat(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    pieces = [t.detach().reshape(-1).to(dtype) for t in tensors]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=dtype)


def project(basis, tensors, scale=None, dtype=torch.float64):
    rows, vector = decode(basis, scale, dtype), flat(tensors, dtype)
    # torch sums pairwise, more exactly than its matrix product: this is the float64 reference
    return (rows * vector).sum(1) if dtype == torch.float64 else rows @ vector


def reconstruct(origin, basis, theta, scale=None, dtype=torch.float64):
    moved = theta.to(dtype) @ decode(basis, scale, dtype)
    return moved if origin is None else origin.to(dtype) + moved


def gram(snapshots, scale=None, dtype=torch.float64):
    rows = decode(snapshots, scale, dtype)
    return rows @ rows.T


def form_basis(snapshots, coefficients, scale=None, dtype=torch.float64):
    return coefficients.to(dtype) @ decode(snapshots, scale, dtype)


def by_dtype(tensors: Sequence[Tensor], vector: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (all elements of one dtype of the list, the same elements of the flat vector)."""
    pieces = vector.split([t.numel() for t in tensors])
    pairs = []
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        own = torch.cat([tensors[i].reshape(-1) for i in chosen])
        pairs.append((own, torch.cat([pieces[i] for i in chosen])))
    return pairs


def terms(basis, tensors, scale=None) -> float:
    """Root sum of squares of the products that `project` adds: what rounding is relative to."""
    squares = (decode(basis, scale) ** 2) @ (flat(tensors) ** 2)
    return squares.sqrt().nan_to_num().max().item()


def moved(basis, theta, scale=None) -> float:
    """The same for the sums of `reconstruct`."""
    rows = decode(basis, scale)
    return ((theta.double() ** 2) @ rows**2).sqrt().nan_to_num().max().item() if rows.numel() else 0


def assert_close(
    actual: Tensor, exact: Tensor, peer: Tensor, what: str = "", size: float = 0.0
) -> None:
    """The tolerance rule.

    Parameters
    ----------
    actual : Tensor
        What the op gave.
    exact : Tensor, float64
        The reference.
    peer : Tensor
        What plain torch gives in the working precision, rounded to the op's output dtype.
    size : float
        What a rounding is relative to, if that is more than the largest exact number (`terms`).
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaNs in other places"
    finite = exact.isfinite()
    wrong = ~finite & ~exact.isnan() & (actual.double() != exact)
    assert not wrong.any(), f"{what}: infinities differ"
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max().item()
    allowed = 2 * (peer.double() - exact)[finite].abs().max().item()
    size = max(size, exact[finite].abs().max().item())
    # the float64 reference itself rounds as much as a float64 op
    roundings = 64 if actual.dtype == torch.float64 else 4
    allowed += roundings * torch.finfo(actual.dtype).eps * size
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (size {size:.3e})"
