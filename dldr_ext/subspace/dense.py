"""Linear subspaces of the weights: w = w0 + P theta."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..files import artifacts
from ..files.column_checkpoint import is_dcp, read_subspace, saved_shape
from ..pca.dimension import checked_dim
from ..pca.form_basis import formed
from ..pca.gram import column_step, orthonormalize_
from ..pca.report import checked_facts
from ..tensors.alignment import empty_rows
from ..tensors.formats import wide_dtype
from ..tensors.matrices import Matrix
from ..tensors.parameters import DTYPES, dtype_name, dtype_names, flatten, named_parameters, numel
from . import basis as basis_module
from .exact import ReadableSubspace
from .from_snapshots import subspace_arguments


def dense(
    snapshots: Matrix,
    coefficients: Tensor,
    origin: Tensor,
    dtype: torch.dtype,
    **known: Any,
) -> Subspace:
    """The subspace with the basis coefficients @ snapshots, formed chunk by chunk."""
    basis, scale = formed(snapshots, coefficients, dtype, column_step(snapshots))
    return Subspace(basis, origin, scale=scale, **known)


def read_whole(path: str | os.PathLike[str], device: Any) -> Subspace:
    """See `Subspace.load`."""
    if not is_dcp(path):
        raise ValueError(
            f"path: expected a file, or a folder of torch.distributed.checkpoint, got {path}"
        )
    return Subspace(**read_subspace(path, [(0, saved_shape(path, "subspace")[1])], device))


KIND, VERSION = "subspace", 1


class Subspace(ReadableSubspace):
    """The weights w = w0 + P theta: a basis, and the point that theta = 0 stands for.

    Parameters
    ----------
    basis : Tensor, shape (d, n)
        P^T: basis vectors as rows, meant to be orthonormal; 1 <= d <= 1024. float32, bfloat16,
        float16 or float64; int8 or float8_e4m3fn together with ``scale``. Kept, not copied, if
        contiguous.
    origin : Tensor, shape (n,)
        w0. Kept as float32 (float64 with a float64 basis); another floating dtype is converted.
    scale : Tensor, shape (d, ceil(n / 256)), float32, optional
        Element i of row r stands for ``basis[r, i] * scale[r, i // 256]``.
    explained_variance_ratio, singular_values : Tensor, shape (d,), optional
        What is known of the directions; kept as float64 on the CPU.
    shapes : sequence of shapes, optional
        Of the parameters, in order: lists of tensors are then checked against it.
    names : sequence of str, optional
        Of the parameters, in order.
    choice : mapping, optional
        How the directions were chosen: what `report` says, as a trajectory or a file has it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        basis: Tensor,
        origin: Tensor,
        *,
        scale: Tensor | None = None,
        explained_variance_ratio: Tensor | None = None,
        singular_values: Tensor | None = None,
        shapes: Iterable[Sequence[int]] | None = None,
        names: Iterable[str] | None = None,
        choice: Mapping[str, Any] | None = None,
    ) -> None:
        self.basis = basis_module.checked_basis(basis)
        self.scale = basis_module.checked_scale(scale, self.basis)
        self.origin = basis_module.checked_origin(origin, self.basis)
        self.explained_variance_ratio = self._per_direction(
            "explained_variance_ratio", explained_variance_ratio
        )
        self.singular_values = self._per_direction("singular_values", singular_values)
        self.shapes = None if shapes is None else [tuple(map(int, shape)) for shape in shapes]
        self.names = None if names is None else [str(name) for name in names]
        if self.shapes is not None and sum(map(math.prod, self.shapes)) != self.numel:
            raise ValueError(
                f"shapes: expected {self.numel} elements in all (columns of basis), got "
                f"{sum(map(math.prod, self.shapes))}"
            )
        if self.names is not None and len(self.names) != len(self.shapes or ()):
            raise ValueError(
                f"names: expected one for each of {len(self.shapes or ())} shapes, got "
                f"{len(self.names)}"
            )
        self.choice = checked_facts(choice)

    @property
    def dim(self) -> int:
        """d, the number of directions."""
        return self.basis.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored basis."""
        return self.basis.dtype

    def __repr__(self) -> str:
        return (
            f"Subspace(dim={self.dim}, numel={self.numel}, dtype={dtype_name(self.dtype)}, "
            f"device={self.device})"
        )

    def reconstruct(self, theta: Tensor) -> Tensor:
        """Flat weights w0 + P theta, shape (n,); differentiable in theta."""
        return ops.reconstruct(self.origin, self.basis, theta, scale=self.scale)

    def direction(self, index: int) -> Tensor:
        """One basis vector, a column of P, shape (n,), in the dtype of the origin: a copy."""
        row = self.basis[index]
        if self.scale is None:
            return row.to(self.origin.dtype, copy=True)
        scale = self.scale[index]
        return basis_module.dequantize(row[None], scale[None], self.origin.dtype)[0]

    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Coordinates of several lists of tensors, shape (len(lists), d): one pass for all."""
        return ops.project_many(self.basis, lists, scale=self.scale)

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """P theta and g - P c, both (n,), in one pass: see `ops.reconstruct_residual`."""
        return ops.reconstruct_residual(self.basis, theta, coordinates, tensors, scale=self.scale)

    def with_origin(self, params: Iterable[Any] | Tensor) -> Subspace:
        """The same directions through other weights, which theta = 0 then stands for.

        Parameters
        ----------
        params : iterable of Tensor
            The parameters (their current values, copied), or one flat vector (n,).
        """
        return self._with(self.basis, flatten(self._weights(params), self.origin.dtype), self.scale)

    def nearest(self, params: Iterable[Any]) -> Tensor:
        """Coordinates of the point nearest to the weights: exact ones in 8 bits, (d,)."""
        return self.coordinates(params, exact=self.scale is not None)

    def quantize(self, format: str) -> Subspace:
        """The same subspace with the basis in 8 bits.

        Parameters
        ----------
        format : "int8" or "float8_e4m3fn"
            With one float32 scale for each row and block of 256: the largest magnitude in the
            block over 127 or 448. A block of zeros has scale 0.

        Returns
        -------
        Subspace
            Its rows are those of this one rounded, hence orthonormal up to that rounding.

        Raises
        ------
        ValueError
            Another format; the basis holds NaN or Inf.
        """
        basis, scale = basis_module.quantize(self.basis, self.scale, format)
        return self._with(basis, self.origin, scale)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Subspace:
        """The same subspace on another device or with another dtype of the basis.

        Parameters
        ----------
        device : torch.device, optional
        dtype : torch.dtype, optional
            float32, bfloat16, float16 or float64; from an 8-bit basis this dequantises. The origin
            becomes float64 with float64, else float32.

        Returns
        -------
        Subspace
            ``self`` if nothing changes.
        """
        dtype = self.dtype if dtype is None else dtype
        device = self.device if device is None else torch.device(device)
        if dtype != self.dtype and dtype not in DTYPES:
            raise ValueError(
                f"dtype: expected one of {dtype_names(DTYPES)}, got {dtype}; for int8 or "
                "float8_e4m3fn use quantize()"
            )
        basis, scale, origin = self.basis, self.scale, self.origin
        if dtype != self.dtype:
            if scale is None:
                basis = basis.to(dtype)
            else:
                basis, scale = basis_module.dequantize(basis, scale, dtype), None
            origin = origin.to(wide_dtype(dtype))
        basis, origin = basis.to(device), origin.to(device)
        scale = None if scale is None else scale.to(device)
        if basis is self.basis:
            return self
        result = self._with(basis, origin, scale)
        if dtype == self.dtype:
            result._gram = self._gram
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves as a safetensors file; an earlier file is replaced once all is written."""
        artifacts.save(path, KIND, VERSION, self._tensors(), self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Subspace:
        """Loads a saved subspace onto ``device``: a file, or a folder that ranks have saved to.

        Raises
        ------
        ValueError
            The file is truncated, corrupt or something else: with the path and what was found.
        """
        if os.path.isdir(path):
            pass

            return read_whole(path, device)
        with artifacts.Reader(path, KIND, VERSION) as file:
            tensors: dict[str, Any] = {name: file.read(name, device) for name in file.names()}
            try:
                return cls(**tensors, **file.metadata)
            except (TypeError, ValueError) as error:
                raise file.error(f"not a usable subspace: {error}") from error

    @classmethod
    def random(
        cls,
        params: Iterable[Any],
        dim: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Subspace:
        """A random orthonormal basis at the current weights: the control experiment.

        Parameters
        ----------
        params : iterable of Tensor
            ``model.parameters()``, or ``model.named_parameters()`` to keep the names too.
        dim : int
            1 <= dim <= min(n, 1024).
        generator : torch.Generator, optional
            On the device of the parameters.
        dtype : torch.dtype
            Of the basis: float32, bfloat16, float16 or float64.

        Returns
        -------
        Subspace
            Uniformly distributed over all subspaces of this dimension.
        """
        listed, names = named_parameters(params)
        n, device = numel(listed), listed[0].device
        dim = checked_dim(dim, n, f"the parameters have {n} elements")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {dtype_names(DTYPES)}, got {dtype}")
        wide = wide_dtype(dtype)
        origin = flatten(listed, wide)
        basis = empty_rows(dim, n, dtype=dtype, device=device)
        for row in basis:
            row.copy_(torch.randn(n, generator=generator, dtype=wide, device=device))
        # Gaussian rows are far from parallel, unless n is close to dim: a second round, then.
        for _ in range(1 if n >= 2 * dim else 2):
            orthonormalize_(basis)
        return cls(basis, origin, shapes=[tuple(p.shape) for p in listed], names=names)

    @classmethod
    def from_snapshots(
        cls,
        snapshots: Tensor | Sequence[Any],
        dim: int | str,
        orthonormal: str = "pca",
        *,
        dtype: torch.dtype | None = None,
    ) -> Subspace:
        """A subspace from weights that were kept by other means.

        Parameters
        ----------
        snapshots : Tensor, shape (T, n), or sequence
            Raw weights (not deltas), one row each; or T lists of tensors, or T dicts of name and
            tensor (parameters only, no integer buffers).
        dim : int or "auto"
            Number of directions: at most T - 1 for "pca", T for "qr". "auto", for "pca" alone: as
            in `Trajectory.subspace`.
        orthonormal : "pca" or "qr"
            "pca": the principal directions, centred; theta = 0 is the first snapshot (DLDR,
            arXiv:2103.11154). "qr": the first ``dim`` snapshots themselves, orthonormalised in
            order, not centred; theta = 0 is the zero vector, so that w = P theta takes in each of
            these snapshots and all their averages (trainable weight averaging: Li, Huang, Tao, Wu,
            Huang, "Trainable Weight Averaging", arXiv:2205.13104).
        dtype : torch.dtype, optional
            Of the basis. Default: the snapshots' (lists: float32, or float64 if any tensor is).

        Warns
        -----
        UserWarning
            ``dim`` is above the numerical rank: the directions up to the rank are returned.
            "auto" finds nothing but noise: one direction is returned.
        """
        return cls(**subspace_arguments(snapshots, dim, orthonormal, dtype))

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        return ops.project(self.basis, tensors, scale=self.scale)

    def _values(self, begin: int, step: int) -> Tensor:
        return basis_module.values(self.basis, self.scale, begin, step, torch.float64)

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        ops.reconstruct_(tensors, origin, self.basis, theta, scale=self.scale)

    def _tensors(self) -> dict[str, Tensor]:
        """What a file holds, by the names of the constructor's arguments."""
        known = ("basis", "origin", "scale", "explained_variance_ratio", "singular_values")
        found = {name: getattr(self, name) for name in known}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _with(self, basis: Tensor, origin: Tensor, scale: Tensor | None) -> Subspace:
        result = Subspace(
            basis,
            origin,
            scale=scale,
            explained_variance_ratio=self.explained_variance_ratio,
            singular_values=self.singular_values,
            shapes=self.shapes,
            names=self.names,
            choice=self.choice,
        )
        if basis is self.basis:
            result._gram = self._gram
        return result

    def _per_direction(self, argument: str, value: Any) -> Tensor | None:
        if value is None:
            return None
        value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if value.shape != (self.dim,):
            raise ValueError(
                f"{argument}: expected shape ({self.dim},), one for each row of basis, got "
                f"{tuple(value.shape)}"
            )
        return value
