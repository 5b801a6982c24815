"""Subspaces without a stored basis: snapshots, and the coefficients that combine them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..files import artifacts
from ..tensors.formats import scale_of, wide_dtype
from ..tensors.memory import readable_rows
from ..tensors.parameters import dtype_name
from .base import PER_DIRECTION
from .dense import KIND, VERSION, Subspace
from .exact import ReadableSubspace

# Rows of the basis that are formed at a time to be saved.
_ROWS_AT_A_TIME = 4


class ImplicitSubspace(ReadableSubspace):
    """The weights w0 + P theta with P^T = C X never formed: the snapshots X are read instead.

    P^T g = C (X g) and P theta = X^T (C^T theta): the d x T coefficients work on the small side. A
    pass reads T rows where one over a basis reads d, and no second array is kept. Made by
    ``trajectory.subspace(materialize=False)``; the optimizers and `parametrize` take it like a
    `Subspace`. Snapshots that are recorded later do not count.

    Products with X are rounded to float32 before C is applied, which small directions feel:
    coordinate i is off by some 1e-7 sigma_1 / sigma_i of what it would be with a formed basis.

    Parameters
    ----------
    snapshots : Tensor, shape (T, n)
        Kept, not copied.
    coefficients : Tensor, shape (d, T), float64
    origin : Tensor, shape (n,)
        w0, float32 (float64 with float64 snapshots).
    scale : Tensor, shape (T, ceil(n / 256)), optional
        For int8 and float8_e4m3fn snapshots.
    explained_variance_ratio, singular_values, mean, shapes, names, choice
        As in `Subspace`.

    See Also
    --------
    dldr_ext.Trajectory.subspace : Makes it, with ``materialize=False``.
    to_dense : The same with a stored basis.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import Trajectory
    >>> weights = torch.zeros(4)
    >>> trajectory = Trajectory([weights], capacity=3)
    >>> for step in range(3):
    ...     _ = trajectory.record()
    ...     weights[step] += 2.0 - step / 2
    >>> subspace = trajectory.subspace(dim=2, materialize=False)
    >>> subspace
    ImplicitSubspace(dim=2, numel=4, 3 snapshots in bfloat16, device=cpu)
    >>> subspace.project(weights).shape
    torch.Size([2])
    """

    def __init__(
        self,
        snapshots: Tensor,
        coefficients: Tensor,
        origin: Tensor,
        *,
        scale: Tensor | None = None,
        explained_variance_ratio: Tensor | None = None,
        singular_values: Tensor | None = None,
        mean: Tensor | None = None,
        shapes: list[tuple[int, ...]] | None = None,
        names: list[str] | None = None,
        choice: dict[str, Any] | None = None,
    ) -> None:
        self.snapshots, self.coefficients, self.scale = snapshots, coefficients, scale
        self.origin = origin
        self.explained_variance_ratio = explained_variance_ratio
        self.singular_values, self.mean = singular_values, mean
        self.shapes, self.names, self.choice = shapes, names, choice

    @property
    def dim(self) -> int:
        """d, the number of directions."""
        return len(self.coefficients)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored snapshots."""
        return self.snapshots.dtype

    def __repr__(self) -> str:
        return (
            f"ImplicitSubspace(dim={self.dim}, numel={self.numel}, {len(self.snapshots)} snapshots "
            f"in {dtype_name(self.dtype)}, device={self.device})"
        )

    def _reconstruct(self, theta: Tensor) -> Tensor:
        return ops.reconstruct(self.origin, self.snapshots, self._combine(theta), scale=self.scale)

    def _direction(self, index: int) -> Tensor:
        index = range(self.dim)[index]
        return self._rows(slice(index, index + 1), self.origin.dtype)[0]

    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the coordinates of several lists of tensors, (len(lists), d), in one pass."""
        if len(lists) == 1:
            return self._project(lists[0]).unsqueeze(0)
        return self._coordinates(ops.project_many(self.snapshots, lists, scale=self.scale))

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return P theta and g - P c, both (n,), in one pass: `ops.reconstruct_residual`."""
        return ops.reconstruct_residual(
            self.snapshots,
            self._combine(theta),
            self._combine(coordinates),
            tensors,
            scale=self.scale,
        )

    def to_dense(self, dtype: torch.dtype | None = None) -> Subspace:
        """Return the same subspace with its basis formed: d n numbers more.

        Parameters
        ----------
        dtype : torch.dtype, optional
            float32, bfloat16, float16 or float64. Default: that of the snapshots, float32 if they
            have 8 bits.

        Returns
        -------
        Subspace
        """
        basis = self._rows(slice(None), self._dense_dtype() if dtype is None else dtype)
        return Subspace(
            basis,
            self.origin.to(wide_dtype(basis.dtype)),
            **self._spectrum(),
            **self._facts(),
        )

    def quantize(self, format: str) -> Subspace:
        """Return the same subspace with a basis in 8 bits; on the way there it is `to_dense`."""
        return self.to_dense().quantize(format)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Subspace | ImplicitSubspace:
        """Return the same subspace on another device, snapshots and all.

        Parameters
        ----------
        device : torch.device, optional
        dtype : torch.dtype, optional
            Another one than that of the snapshots makes it `to_dense`.

        Returns
        -------
        ImplicitSubspace or Subspace
            ``self`` if nothing changes.
        """
        if dtype is not None and dtype != self.dtype:
            return self.to_dense(dtype).to(device)
        snapshots = self.snapshots if device is None else self.snapshots.to(device)
        if snapshots is self.snapshots:
            return self
        result = copy.copy(self)
        result.snapshots = readable_rows(snapshots)
        result.coefficients, result.origin = self.coefficients.to(device), self.origin.to(device)
        result.scale = None if self.scale is None else self.scale.to(device)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the basis, formed some rows at a time, as a safetensors file of a `Subspace`.

        Parameters
        ----------
        path : str or path-like
            `Subspace.load` opens the file. An earlier one is replaced once all is written.
        """
        shape = (self.dim, self.numel)
        tensors: dict[str, Tensor | artifacts.Stream] = {
            "basis": artifacts.Stream(self._dense_dtype(), shape, self._formed_rows()),
            "origin": self.origin,
            **{name: values for name, values in self._spectrum().items() if values is not None},
        }
        artifacts.save(path, KIND, VERSION, tensors, self._facts())

    def _moved_to(self, origin: Tensor) -> ImplicitSubspace:
        result = copy.copy(self)
        result.origin, result.mean = origin, None
        return result

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        return self._coordinates(ops.project(self.snapshots, tensors, scale=self.scale))

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        ops.reconstruct_(tensors, origin, self.snapshots, self._combine(theta), scale=self.scale)

    def _values(self, begin: int, step: int) -> Tensor:
        columns = self.snapshots[:, begin : begin + step].contiguous()
        scale = scale_of(self.scale, begin, begin + step)
        return ops.form_basis(columns, self.coefficients, scale=scale, dtype=torch.float64)

    def _coordinates(self, products: Tensor) -> Tensor:
        """Return C (X g) of one or several X g."""
        return (products.to(torch.float64) @ self.coefficients.T).to(self.coordinate_dtype)

    def _combine(self, theta: Tensor) -> Tensor:
        """Return C^T theta, (T,)."""
        wide = self._checked_theta(theta).to(torch.float64)
        return (wide @ self.coefficients).to(self.coordinate_dtype)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of the basis."""
        chosen = self.coefficients[rows].contiguous()
        return ops.form_basis(self.snapshots, chosen, scale=self.scale, dtype=dtype)

    def _formed_rows(self) -> Iterator[Tensor]:
        for i in range(0, self.dim, _ROWS_AT_A_TIME):
            yield self._rows(slice(i, i + _ROWS_AT_A_TIME), self._dense_dtype())

    def _dense_dtype(self) -> torch.dtype:
        return self.dtype if self.scale is None else torch.float32

    def _spectrum(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in PER_DIRECTION}
