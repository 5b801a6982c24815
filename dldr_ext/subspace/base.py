"""What every subspace w = w0 + P theta offers, however P is stored."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..collectives.consistency import digest
from ..reporting.notebook import Shown, View
from ..tensors.derivatives import needed, refuse_transforms
from ..tensors.parameters import (
    check_matches,
    check_memory,
    check_names,
    flatten,
    forget_computed,
    named_parameters,
    numel,
    type_name,
)
from . import shown
from .parametrize import SubspaceModule

#: What a subspace may know of each of its directions, by the names of its attributes.
PER_DIRECTION = ("explained_variance_ratio", "singular_values", "mean")

if TYPE_CHECKING:
    from typing_extensions import Self


class AffineSubspace(Shown):
    """The weights w0 + P theta: what `Subspace`, `GroupedSubspace` and `ImplicitSubspace` share.

    Attributes
    ----------
    origin : Tensor, shape (n,)
        w0, float32 (float64 with a float64 basis).
    explained_variance_ratio, singular_values : Tensor, shape (d,), or None
        What is known of the directions; float64 on the CPU.
    mean : Tensor, shape (d,), or None
        Coordinates of the mean of the snapshots, where known.
    choice : dict or None
        How the directions were chosen, where known: what `Subspace.report` says.
    shapes, names : list or None
        Of the parameters, in order, where known.
    """

    origin: Tensor
    explained_variance_ratio: Tensor | None
    singular_values: Tensor | None
    mean: Tensor | None
    choice: dict[str, Any] | None
    shapes: list[tuple[int, ...]] | None
    names: list[str] | None

    @property
    @abstractmethod
    def dim(self) -> int:
        """d, the number of directions."""

    @property
    def numel(self) -> int:
        """n, the number of weights."""
        return self.origin.numel()

    @property
    def device(self) -> torch.device:
        """The device of the basis."""
        return self.origin.device

    @property
    def coordinate_dtype(self) -> torch.dtype:
        """The dtype of theta and of projections: float32, or float64 for a float64 basis."""
        return self.origin.dtype

    @property
    def spread(self) -> Tensor | None:
        """Standard deviations s_i = sigma_i / sqrt(T) of the T snapshots along each direction.

        The unit that ``metric="trajectory"`` of the optimizers measures theta_i in; (d,) float64 on
        the CPU, None where the singular values are not known. Where T is not (a subspace put
        together by hand), it counts as d + 1, the fewest snapshots that span d directions.
        """
        if self.singular_values is None:
            return None
        snapshots = self.dim + 1 if self.choice is None else self.choice["snapshots"]
        return self.singular_values / math.sqrt(snapshots)

    def project(
        self,
        tensors: Sequence[Any] | Mapping[str, Tensor | None] | Tensor,
        *,
        exact: bool = False,
    ) -> Tensor:
        """Return the coordinates P^T g of a gradient (or any vector).

        Parameters
        ----------
        tensors : sequence of Tensor or None, or dict
            One for each parameter, in order; None counts as zeros. Or one flat vector (n,). Names
            of a dict or of pairs (name, tensor) are compared with those of the parameters.
        exact : bool
            Coordinates c of the orthogonal projection P c of g instead: G c = P^T g is solved in
            float64, with G = P^T P of the basis as it is stored. The two differ by the rounding of
            the basis, which 8 bits make visible. Of a loss at w0 + P theta, P^T g is the gradient
            in theta whatever the rounding. G is made once, in one pass of n d^2 float64 products.

        Returns
        -------
        Tensor, shape (d,)
            float32 (float64 for a float64 basis); differentiable in the tensors, with torch.func
            too (of a basis that is partitioned over ranks it has no derivative, and raises when
            one is asked for).

        Raises
        ------
        TypeError, ValueError
            The tensors are not those of the parameters, by number, shape or name; ``exact`` with a
            basis whose rows are linearly dependent, or that is partitioned over ranks.

        See Also
        --------
        coordinates : Of weights: what theta they are nearest to.
        dldr_ext.ops.project : The pass over the basis.
        """
        if isinstance(tensors, Mapping):
            tensors = list(tensors.items())
        listed: list[Any] = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if listed and all(isinstance(entry, tuple) and len(entry) == 2 for entry in listed):
            self._check_names([entry[0] for entry in listed], "tensors")
            listed = [entry[1] for entry in listed]
        if self.shapes is not None and len(listed) == len(self.shapes):
            zero = torch.zeros((), device=self.device)
            listed = [
                zero.expand(shape) if tensor is None else tensor
                for tensor, shape in zip(listed, self.shapes, strict=True)
            ]
        if all(isinstance(tensor, Tensor) for tensor in listed):
            self._check_list(listed, "tensors")
        c = self._project(listed)
        return self._solve(c) if exact else c

    def coordinates(self, params: Iterable[Any] | Tensor, *, exact: bool = False) -> Tensor:
        """Return the coordinates P^T (w - w0) of weights.

        The difference is taken first: it is small, and the projections of w and of w0 would cancel.

        Parameters
        ----------
        params : iterable of Tensor
            The parameters, or one flat vector (n,).
        exact : bool
            Coordinates of the nearest point of the subspace, as in `project`: w0 + P theta gives
            theta back, in 8 bits too.

        Returns
        -------
        Tensor, shape (d,)
            float32 (float64 for a float64 basis); differentiable in the parameters, as `project`
            is in its tensors: under ``torch.no_grad()`` it is a number without a past.

        Raises
        ------
        TypeError, ValueError
            As in `project`; parameters on another device, or named in another order.

        See Also
        --------
        nearest : Exact where the basis is rounded enough for it to matter.
        reconstruct : The way back.
        """
        listed = self._weights(params)
        dtype = self.origin.dtype
        if needed(*listed):
            flat = torch.cat([p.reshape(-1).to(dtype) for p in listed])
        else:
            flat = flatten(listed, dtype)
        c = self._project([flat.sub_(self.origin)])
        return self._solve(c) if exact else c

    def reconstruct(self, theta: Tensor) -> Tensor:
        """Return the flat weights w0 + P theta.

        Parameters
        ----------
        theta : Tensor, shape (d,)
            On the device of the subspace.

        Returns
        -------
        Tensor, shape (n,)
            float32 (float64 for a float64 basis); differentiable in theta, with torch.func too.

        Raises
        ------
        TypeError, ValueError
            Another shape, device or an integer dtype of theta; one that requires a gradient where
            the basis is partitioned over ranks.

        See Also
        --------
        reconstruct_ : The same, written into the parameters.
        coordinates : The way back.
        """
        return self._reconstruct(theta)

    def reconstruct_(self, params: Iterable[Any], theta: Tensor) -> None:
        """Write w0 + P theta into the parameters, rounded once to the dtype of each.

        Parameters
        ----------
        params : iterable of Tensor
            The parameters that the subspace was made with, in order, or one flat vector (n,).
        theta : Tensor, shape (d,)

        Raises
        ------
        TypeError, ValueError
            Other parameters or another theta than expected; nothing has been written then.

        See Also
        --------
        reconstruct : The same as a new tensor, differentiable.
        """
        listed = self._weights(params)
        refuse_transforms("reconstruct_", theta=theta, params=listed)
        names = self.names if len(listed) == len(self.names or ()) else None
        check_memory(listed, names, plain=True)
        self.write_(listed, theta)
        forget_computed()

    def direction(self, index: int) -> Tensor:
        """Return one basis vector, a column of P.

        Parameters
        ----------
        index : int
            -d <= index < d.

        Returns
        -------
        Tensor, shape (n,)
            A copy, in the dtype of the origin.

        Raises
        ------
        IndexError
            There are fewer directions.
        """
        return self._direction(index)

    def nearest(self, params: Iterable[Any] | Tensor) -> Tensor:
        """Return the coordinates of the point of the subspace nearest to the weights, as values.

        Those of `coordinates`, with ``exact`` where the basis has 8 bits, and no gradient: what an
        optimizer with ``theta0="current"`` starts from.

        Parameters
        ----------
        params : iterable of Tensor
            As in `coordinates`, with the same errors.

        Returns
        -------
        Tensor, shape (d,)
            In the dtype of the origin.
        """
        listed = [params] if isinstance(params, Tensor) else list(params)
        refuse_transforms("nearest", params=listed)
        with torch.no_grad():
            return self.coordinates(listed, exact=self._rounded)

    # For optimizers, which checked their lists once: no check but those of the ops.

    @abstractmethod
    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the coordinates of several lists of tensors, in one pass over the basis.

        Parameters
        ----------
        lists : sequence of sequences of Tensor
            n elements in each.

        Returns
        -------
        Tensor, shape (len(lists), d)

        See Also
        --------
        dldr_ext.ops.project_many : The pass.
        """

    def combine_(self, out: Tensor, theta: Tensor, origin: Tensor | None = None) -> None:
        """Write origin + P theta into a flat vector.

        Parameters
        ----------
        out : Tensor, shape (n,)
        theta : Tensor, shape (d,)
        origin : Tensor, shape (n,), optional
            None stands for zeros.
        """
        self._write([out], theta, origin)

    def write_(self, params: Sequence[Tensor], theta: Tensor) -> None:
        """Write origin + P theta into parameters: see `reconstruct_`.

        Parameters
        ----------
        params : sequence of Tensor
            n elements in all.
        theta : Tensor, shape (d,)
        """
        self._write(params, theta, self.origin)

    @abstractmethod
    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return P theta and g - P c, in one pass over the basis.

        Parameters
        ----------
        theta, coordinates : Tensor, shape (d,)
            Of the direction; c, of what is taken off the gradient.
        tensors : sequence of Tensor
            g, n elements in all.

        Returns
        -------
        direction, residual : Tensor, shape (n,)

        See Also
        --------
        dldr_ext.ops.reconstruct_residual : The pass.
        """

    # For optimizers that step on several ranks together, each with a loss of its own. Here every
    # rank has the whole basis and all parameters.

    spans_ranks = False  # `project_many` and the like are the same calls on every rank

    def partial_sum(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        """Return this rank's part of the mean's coordinates, which are the sum over all ranks.

        Parameters
        ----------
        lists : sequence of sequences of Tensor
            As in `project_many`, of this rank.
        size : int
            The number of ranks.
        same : int
            How many of the last lists are the same on every rank, as weights are.

        Returns
        -------
        Tensor, shape (len(lists), d), float64
        """
        return self.project_many(lists).to(torch.float64) / size

    def digest(self) -> str:
        """Return a checksum of the basis.

        Returns
        -------
        str
            Hexadecimal: the same for the same bits, on every device.
        """
        return digest(*(self.direction(i) for i in range(self.dim)))

    def weight(self, size: int) -> float:
        """Return the weight of this rank's part in a sum over all elements of a mean gradient.

        Parameters
        ----------
        size : int
            The number of ranks.

        Returns
        -------
        float
        """
        return 1.0 / size

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Return the inner product of two flat vectors.

        Parameters
        ----------
        a, b : Tensor, shape (n,)

        Returns
        -------
        float
        """
        return float(torch.dot(a, b))

    def with_origin(self, params: Iterable[Any] | Tensor) -> Self:
        """Return the same directions through other weights, which theta = 0 then stands for.

        Parameters
        ----------
        params : iterable of Tensor
            The parameters (their current values, copied), or one flat vector (n,).

        Returns
        -------
        subspace of the same kind
            The basis is shared, not copied.

        Raises
        ------
        TypeError, ValueError
            As in `coordinates`.
        """
        weights = self._weights(params)
        refuse_transforms("with_origin", params=weights)
        return self._moved_to(flatten(weights, self.origin.dtype))

    @abstractmethod
    def quantize(self, format: str) -> AffineSubspace:
        """Return the same subspace with the basis in 8 bits: see `Subspace.quantize`.

        Parameters
        ----------
        format : "int8" or "float8_e4m3fn"

        Returns
        -------
        subspace
        """

    @abstractmethod
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AffineSubspace:
        """Return the same subspace on another device or with another dtype: see `Subspace.to`.

        Parameters
        ----------
        device : torch.device or str, optional
        dtype : torch.dtype, optional
            Of the basis.

        Returns
        -------
        subspace
        """

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as a safetensors file.

        An earlier file of this name is replaced once all is written. Any exception leaves it as it
        was.

        Parameters
        ----------
        path : str or path-like
            Shapes and names of the parameters and what `report` says are kept in the file too.

        Raises
        ------
        OSError
            The file cannot be written.
        """

    def parametrize(self, model: nn.Module) -> SubspaceModule:
        """Return the model as a function of theta: a module whose only parameter is theta.

        Parameters
        ----------
        model : nn.Module
            Its trainable parameters are those of the subspace.

        Returns
        -------
        SubspaceModule
            Any optimizer of ``torch.optim`` works on it.

        Raises
        ------
        TypeError, ValueError
            Not a module, or not one with the parameters of the subspace: with the first that
            differs.

        Examples
        --------
        >>> import torch
        >>> from dldr_ext import Subspace
        >>> model = torch.nn.Linear(3, 2)
        >>> module = Subspace.random(model.named_parameters(), 4).parametrize(model)
        >>> [(name, tuple(p.shape)) for name, p in module.named_parameters()]
        [('theta', (4,))]
        >>> optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        >>> module(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> module.write_back() is model
        True
        """
        return SubspaceModule(model, self)

    def _view(self, at_once: bool) -> View:
        return shown.view_of(self, at_once)

    @property
    def _rounded(self) -> bool:
        """Whether the basis is rounded so much that exact coordinates differ visibly."""
        return False

    @abstractmethod
    def _reconstruct(self, theta: Tensor) -> Tensor:
        """Return w0 + P theta, differentiable."""

    @abstractmethod
    def _direction(self, index: int) -> Tensor:
        """Return a column of P."""

    @abstractmethod
    def _moved_to(self, origin: Tensor) -> Self:
        """Return the same directions through another origin, which is kept, not copied.

        Where the mean is from there would take a pass over the basis: it is None.
        """

    @abstractmethod
    def _project(self, tensors: Sequence[Any]) -> Tensor:
        """Return P^T g, differentiable."""

    def _solve(self, coordinates: Tensor) -> Tensor:
        """Return (P^T P)^-1 c."""
        raise ValueError(f"exact: expected False for a {type(self).__name__}, got True")

    @abstractmethod
    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        """Write origin + P theta into a list of n elements."""

    def _weights(self, params: Iterable[Any] | Tensor) -> list[Tensor]:
        listed, names = named_parameters([params] if isinstance(params, Tensor) else params)
        self._check_list(listed, "params")
        self._check_names(names, "params")
        if listed[0].device != self.device:
            raise ValueError(
                f"params: expected device {self.device}, as the subspace, got {listed[0].device}"
            )
        return listed

    def _checked_theta(self, theta: Tensor) -> Tensor:
        """Return theta, if it is a vector of d floating-point numbers on this device."""
        if not isinstance(theta, Tensor) or not theta.dtype.is_floating_point:
            got = theta.dtype if isinstance(theta, Tensor) else type_name(theta)
            raise TypeError(f"theta: expected a floating-point tensor, got {got}")
        if theta.shape != (self.dim,) or theta.device != self.device:
            raise ValueError(
                f"theta: expected shape ({self.dim},) on {self.device}, got {tuple(theta.shape)} "
                f"on {theta.device}"
            )
        return theta

    def _check_names(self, names: list[str] | None, argument: str) -> None:
        if names is not None and len(names) == len(self.names or ()):  # not of one flat vector
            check_names(names, self.names, "subspace", argument)

    def _check_list(self, tensors: Sequence[Any], argument: str) -> None:
        """Check a list against the shapes if they are known; one flat vector will always do."""
        flat = len(tensors) == 1 and tensors[0].shape == (self.numel,)
        if self.shapes is not None and not flat:
            check_matches(tensors, self.shapes, self.names, "subspace", argument)
        elif numel(tensors) != self.numel:
            raise ValueError(
                f"{argument}: expected {self.numel} elements in all (columns of basis), got "
                f"{numel(tensors)}"
            )
