"""Subspaces with one stored basis."""

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
from ..pca.gram import orthonormalize_
from ..pca.report import checked_facts
from ..tensors.derivatives import refuse_transforms
from ..tensors.formats import wide_dtype
from ..tensors.memory import empty_rows
from ..tensors.parameters import DTYPES, dtype_name, dtype_names, flatten, named_parameters, numel
from . import basis as basis_module
from .base import PER_DIRECTION
from .exact import ReadableSubspace
from .from_snapshots import subspace_arguments

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
    mean : Tensor, shape (d,), optional
        Coordinates of the mean of the snapshots; kept as float64 on the CPU.
    shapes : sequence of shapes, optional
        Of the parameters, in order: lists of tensors are then checked against it.
    names : sequence of str, optional
        Of the parameters, in order.
    choice : mapping, optional
        How the number of components was chosen: what `report` says, as a trajectory or a file has
        it.

    Attributes
    ----------
    basis, origin, scale, explained_variance_ratio, singular_values, mean, shapes, names, choice
        As given.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit the others, what was expected and what came.

    See Also
    --------
    dldr_ext.Trajectory.subspace : The principal directions of a training run.
    GroupedSubspace : A basis for each group of parameters.
    ImplicitSubspace : Snapshots in place of a basis.

    References
    ----------
    Li, Tan, Huang, Tao, Liu, Huang, "Low Dimensional Trajectory Hypothesis is True: DNNs Can Be
    Trained in Tiny Subspaces", IEEE TPAMI 2022 (arXiv:2103.11154).

    Examples
    --------
    A line and a plane's worth of directions for a layer with three weights:

    >>> import torch
    >>> from dldr_ext import Subspace
    >>> basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    >>> subspace = Subspace(basis, torch.ones(3), shapes=[(1, 2), (1,)])
    >>> subspace
    Subspace(dim=2, numel=3, dtype=float32, device=cpu)
    >>> layer = torch.nn.Linear(2, 1)
    >>> subspace.reconstruct_(layer.parameters(), torch.tensor([2.0, 5.0]))
    >>> layer.weight.data, layer.bias.data
    (tensor([[3., 4.]]), tensor([5.]))
    >>> subspace.coordinates(layer.parameters()).detach()
    tensor([2., 5.])
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> subspace.project([p.grad for p in layer.parameters()])
    tensor([1.0000, 1.4000])
    """

    def __init__(
        self,
        basis: Tensor,
        origin: Tensor,
        *,
        scale: Tensor | None = None,
        explained_variance_ratio: Tensor | None = None,
        singular_values: Tensor | None = None,
        mean: Tensor | None = None,
        shapes: Iterable[Sequence[int]] | None = None,
        names: Iterable[str] | None = None,
        choice: Mapping[str, Any] | None = None,
    ) -> None:
        refuse_transforms(type(self).__name__, basis=basis, origin=origin, scale=scale)
        self.basis = basis_module.checked_basis(basis)
        self.scale = basis_module.checked_scale(scale, self.basis)
        self.origin = basis_module.checked_origin(origin, self.basis)
        self.explained_variance_ratio = self._per_direction(
            "explained_variance_ratio", explained_variance_ratio
        )
        self.singular_values = self._per_direction("singular_values", singular_values)
        self.mean = self._per_direction("mean", mean)
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
        """The dtype of the stored basis."""
        return self.basis.dtype

    def __repr__(self) -> str:
        return (
            f"Subspace(dim={self.dim}, numel={self.numel}, dtype={dtype_name(self.dtype)}, "
            f"device={self.device})"
        )

    def _reconstruct(self, theta: Tensor) -> Tensor:
        return ops.reconstruct(self.origin, self.basis, theta, scale=self.scale)

    def _direction(self, index: int) -> Tensor:
        row = self.basis[index]
        if self.scale is None:
            return row.to(self.origin.dtype, copy=True)
        scale = self.scale[index]
        return basis_module.dequantize(row[None], scale[None], self.origin.dtype)[0]

    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the coordinates of several lists of tensors, (len(lists), d), in one pass."""
        return ops.project_many(self.basis, lists, scale=self.scale)

    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return P theta and g - P c, both (n,), in one pass: `ops.reconstruct_residual`."""
        return ops.reconstruct_residual(self.basis, theta, coordinates, tensors, scale=self.scale)

    def quantize(self, format: str) -> Subspace:
        """Return the same subspace with the basis in 8 bits.

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

        See Also
        --------
        quantization_error : What rounding has done.

        Examples
        --------
        >>> import torch
        >>> from dldr_ext import Subspace
        >>> small = Subspace(torch.tensor([[0.6, 0.8]]), torch.zeros(2)).quantize("int8")
        >>> small.basis, small.direction(0)
        (tensor([[ 95, 127]], dtype=torch.int8), tensor([0.5984, 0.8000]))
        """
        basis, scale = basis_module.quantize(self.basis, self.scale, format)
        return self._with(basis, self.origin, scale)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Subspace:
        """Return the same subspace on another device or with another dtype of the basis.

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

        Raises
        ------
        ValueError
            An 8-bit dtype: that takes `quantize`.
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
        """Save as a safetensors file.

        Basis, scale and origin are written as they are stored, with all that is known of the
        directions. An earlier file is replaced once all is written.

        Parameters
        ----------
        path : str or path-like

        Raises
        ------
        OSError
            The file cannot be written; an earlier one is left as it was.

        See Also
        --------
        load : Opens the file, on any device.
        """
        artifacts.save(path, KIND, VERSION, self._tensors(), self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Subspace:
        """Load a saved subspace.

        Parameters
        ----------
        path : str or path-like
            A file, or a folder of torch.distributed.checkpoint that ranks have saved to.
        device : torch.device or str
            Where the tensors go.

        Returns
        -------
        Subspace

        Raises
        ------
        ValueError
            The file is truncated, corrupt or something else: with the path and what was found.
        """
        if os.path.isdir(path):
            if not is_dcp(path):
                raise ValueError(
                    "path: expected a file, or a folder of torch.distributed.checkpoint, got "
                    f"{path}"
                )
            return cls(**read_subspace(path, [(0, saved_shape(path, "subspace")[1])], device))
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
        """Return a random orthonormal basis at the current weights: the control experiment.

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

        Raises
        ------
        TypeError, ValueError
            Parameters that are no such list; a ``dim`` above their number of elements.

        References
        ----------
        Li, Farkhoor, Liu, Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes",
        ICLR 2018 (arXiv:1804.08838): training in random subspaces.
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
        """Return a subspace of weights that were kept by other means than a `Trajectory`.

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

        Returns
        -------
        Subspace

        Raises
        ------
        TypeError, ValueError
            Snapshots of different parameters, fewer than two, not finite or all equal; a ``dim``
            above their number.

        Warns
        -----
        UserWarning
            ``dim`` is above the numerical rank: the directions up to the rank are returned.
            "auto" finds nothing but noise: one direction is returned.

        Examples
        --------
        >>> import torch
        >>> from dldr_ext import Subspace
        >>> weights = torch.tensor([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
        >>> subspace = Subspace.from_snapshots(weights, dim=1)
        >>> subspace.origin, subspace.coordinates(weights[2])
        (tensor([1., 1.]), tensor([3.]))
        """
        return cls(**subspace_arguments(snapshots, dim, orthonormal, dtype))

    def _project(self, tensors: Sequence[Any]) -> Tensor:
        return ops.project(self.basis, tensors, scale=self.scale)

    @property
    def _rounded(self) -> bool:
        return self.scale is not None

    def _moved_to(self, origin: Tensor) -> Subspace:
        result = self._with(self.basis, origin, self.scale)
        result.mean = None
        return result

    def _values(self, begin: int, step: int) -> Tensor:
        return basis_module.values(self.basis, self.scale, begin, step, torch.float64)

    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        ops.reconstruct_(tensors, origin, self.basis, theta, scale=self.scale)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a file, by the names of the constructor's arguments."""
        names = ("basis", "origin", "scale", *PER_DIRECTION)
        tensors = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _with(self, basis: Tensor, origin: Tensor, scale: Tensor | None) -> Subspace:
        result = Subspace(
            basis,
            origin,
            scale=scale,
            **{name: getattr(self, name) for name in PER_DIRECTION},
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
