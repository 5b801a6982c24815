"""The whole space as a subspace: every weight is a coordinate, and no basis is stored."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.constants import MAX_DIM
from ..tensors.formats import wide_dtype
from ..tensors.parameters import flatten, named_parameters, numel, type_name
from .base import AffineSubspace
from .dense import Subspace


class IdentitySubspace(AffineSubspace):
    """The weights w0 + theta: all of at most 1024 weights, with P = I never stored.

    For small problems, such as physics-informed networks, on which the quasi-Newton method can
    have the whole space. A pass costs n numbers where one over a stored identity reads n^2. The
    optimizers and `parametrize` take it like a `Subspace`.

    Parameters
    ----------
    params : iterable of Tensor
        ``model.parameters()``, or ``model.named_parameters()`` to keep the names too. Their current
        values are the origin, in float32, or float64 if one of them has it.

    Raises
    ------
    TypeError, ValueError
        Parameters that are no such list, or of more than 1024 elements.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import PBFGS, IdentitySubspace
    >>> model, x = torch.nn.Linear(3, 1), torch.eye(3)
    >>> subspace = IdentitySubspace(model.named_parameters())
    >>> subspace
    IdentitySubspace(dim=4, dtype=float32, device=cpu)
    >>> optimizer = PBFGS(model.named_parameters(), subspace)
    >>> for _ in range(20):
    ...     _ = optimizer.step(lambda: (model(x) - 1).square().sum())
    >>> bool((model(x) - 1).abs().max() < 1e-3)
    True
    """

    def __init__(self, params: Iterable[Any]) -> None:
        listed, self.names = named_parameters(params)
        n = numel(listed)
        if not 1 <= n <= MAX_DIM:
            raise ValueError(
                f"params: expected 1 to {MAX_DIM} elements in all, got {n}; of more, take the "
                "directions of a Trajectory or Subspace.random"
            )
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in listed) else torch.float32
        self.origin = flatten(listed, dtype)
        self.shapes = [tuple(p.shape) for p in listed]
        self.explained_variance_ratio = self.singular_values = self.mean = self.choice = None

    @property
    def dim(self) -> int:
        """The number of weights: d = n."""
        return self.numel

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the origin, which a stored basis would have."""
        return self.origin.dtype

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"IdentitySubspace(dim={self.dim}, dtype={dtype}, device={self.device})"

    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return several lists of tensors, each flat: (len(lists), n)."""
        return torch.stack([self._project(tensors) for tensors in lists])

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return theta and g - c, both (n,)."""
        return theta.to(self.dtype, copy=True), self._project(tensors) - coordinates

    def to_dense(self) -> Subspace:
        """Return the same subspace with its basis stored: n^2 numbers.

        Returns
        -------
        Subspace
        """
        basis = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        return Subspace(basis, self.origin, shapes=self.shapes, names=self.names)

    def quantize(self, format: str) -> Subspace:
        """Return the same subspace with a stored basis in 8 bits, which zeros and ones fit."""
        return self.to_dense().quantize(format)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> IdentitySubspace:
        """Return the same subspace on another device, or with an origin for another dtype.

        Parameters
        ----------
        device : torch.device, optional
        dtype : torch.dtype, optional
            float64 makes the origin float64, any other float32.

        Returns
        -------
        IdentitySubspace
            ``self`` if nothing changes.
        """
        origin = self.origin.to(device, None if dtype is None else wide_dtype(dtype))
        return self if origin is self.origin else self._moved_to(origin)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as a safetensors file of a `Subspace`, which `Subspace.load` opens.

        Parameters
        ----------
        path : str or path-like
            An earlier file is replaced once all is written.
        """
        self.to_dense().save(path)

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors[{i}]: expected a tensor, got {type_name(tensor)}")
        return torch.cat([tensor.reshape(-1).to(self.dtype) for tensor in tensors])

    def _solve(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def _reconstruct(self, theta: Tensor) -> Tensor:
        return self.origin + self._checked_theta(theta).to(self.dtype)

    def _direction(self, index: int) -> Tensor:
        direction = torch.zeros_like(self.origin)
        direction[range(self.dim)[index]] = 1
        return direction

    def _moved_to(self, origin: Tensor) -> IdentitySubspace:
        result = copy.copy(self)
        result.origin = origin
        return result

    @torch.no_grad()
    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        theta = self._checked_theta(theta).to(self.dtype)
        point = theta if origin is None else origin + theta
        for tensor, part in zip(tensors, point.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))
