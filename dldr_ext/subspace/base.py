"""What every subspace w = w0 + P theta offers, however P is stored."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..collectives.consistency import digest
from ..tensors.parameters import check_matches, flatten, numel, unique_parameters

if TYPE_CHECKING:
    from typing_extensions import Self

    from .parametrize import SubspaceModule


class AffineSubspace(ABC):
    """The weights w0 + P theta: what `Subspace`, `GroupedSubspace` and `ImplicitSubspace` share.

    Attributes
    ----------
    origin : Tensor, shape (n,)
        w0, float32 (float64 with a float64 basis).
    explained_variance_ratio, singular_values : Tensor, shape (d,), or None
        What is known of the directions; float64 on the CPU.
    shapes, names : list or None
        Of the parameters, in order, where known.
    """

    origin: Tensor
    explained_variance_ratio: Tensor | None
    singular_values: Tensor | None
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
        """Where the basis is."""
        return self.origin.device

    @property
    def coordinate_dtype(self) -> torch.dtype:
        """Of theta and of projections: float32, or float64 for a float64 basis."""
        return self.origin.dtype

    def project(self, tensors: Sequence[Tensor | None] | Tensor, *, exact: bool = False) -> Tensor:
        """Coordinates P^T g of a gradient (or any vector).

        Parameters
        ----------
        tensors : sequence of Tensor or None
            One for each parameter, in order; None counts as zeros. Or one flat vector (n,).
        exact : bool
            Coordinates c of the orthogonal projection P c of g instead: G c = P^T g is solved in
            float64, with G = P^T P of the basis as it is stored. The two differ by the rounding of
            the basis, which 8 bits make visible. Of a loss at w0 + P theta, P^T g is the gradient
            in theta whatever the rounding. G is made once, in one pass of n d^2 float64 products.

        Returns
        -------
        Tensor, shape (d,)
            float32 (float64 for a float64 basis).

        Raises
        ------
        ValueError
            ``exact`` with a basis whose rows are linearly dependent, or that is cut over ranks.
        """
        listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
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
        """Coordinates P^T (w - w0) of weights, shape (d,).

        The difference is taken first: it is small, and the projections of w and of w0 would cancel.
        With ``exact`` those of the nearest point of the subspace, as in `project`: w0 + P theta
        gives theta back, in 8 bits too.
        """
        listed = self._weights(params)
        c = self._project([flatten(listed, self.origin.dtype).sub_(self.origin)])
        return self._solve(c) if exact else c

    @abstractmethod
    def reconstruct(self, theta: Tensor) -> Tensor:
        """Flat weights w0 + P theta, shape (n,); differentiable in theta."""

    def reconstruct_(self, params: Iterable[Any], theta: Tensor) -> None:
        """Writes w0 + P theta into the parameters, rounded once to the dtype of each."""
        self._write(self._weights(params), theta, self.origin)

    @abstractmethod
    def direction(self, index: int) -> Tensor:
        """One basis vector, a column of P, shape (n,), in the dtype of the origin: a copy."""

    # The same for optimizers, which checked their lists once: no check but those of the ops.

    def nearest(self, params: Iterable[Any]) -> Tensor:
        """Coordinates of the point nearest to the weights: exact ones where it matters, (d,)."""
        return self.coordinates(params)

    @abstractmethod
    def project_many(self, lists: Sequence[Sequence[Tensor]]) -> Tensor:
        """Coordinates of several lists of tensors, shape (len(lists), d): one pass for all."""

    def combine_(self, out: Tensor, theta: Tensor, origin: Tensor | None = None) -> None:
        """Writes origin + P theta into a flat vector (n,); None stands for zeros."""
        self._write([out], theta, origin)

    @abstractmethod
    def combine_residual(
        self, theta: Tensor, coordinates: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """P theta and g - P c, both (n,), in one pass: see `ops.reconstruct_residual`."""

    # The same for optimizers that step on several ranks together, each with a loss of its own. Here
    # every rank has the whole basis and all parameters.

    spans_ranks = False  # `project_many` and the like are the same calls on every rank

    def addend(self, lists: Sequence[Sequence[Tensor]], size: int, same: int = 0) -> Tensor:
        """This rank's term, (len(lists), d) float64: the mean's coordinates are the sum of all.

        The last ``same`` lists are the same on every rank, as weights are.
        """
        return self.project_many(lists).to(torch.float64) / size

    def digest(self) -> str:
        """A checksum of the basis."""
        return digest(*(self.direction(i) for i in range(self.dim)))

    def weight(self, size: int) -> float:
        """Of this rank's term in a sum over all parameters of the mean gradient."""
        return 1.0 / size

    def dot(self, a: Tensor, b: Tensor) -> float:
        """The product of two flat vectors (n,)."""
        return float(torch.dot(a, b))

    @abstractmethod
    def with_origin(self, params: Iterable[Any] | Tensor) -> Self:
        """The same directions through other weights, which theta = 0 then stands for.

        Parameters
        ----------
        params : iterable of Tensor
            The parameters (their current values, copied), or one flat vector (n,).
        """

    @abstractmethod
    def quantize(self, format: str) -> AffineSubspace:
        """The same subspace with the basis in 8 bits: see `Subspace.quantize`."""

    @abstractmethod
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AffineSubspace:
        """The same subspace on another device or with another dtype: see `Subspace.to`."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves as a safetensors file; an earlier file is replaced once all is written."""

    def parametrize(self, model: nn.Module) -> SubspaceModule:
        """The model as a function of theta: a module whose only parameter is theta, shape (d,).

        See `dldr_ext.parametrize.SubspaceModule`.
        """
        from .parametrize import SubspaceModule

        return SubspaceModule(model, self)

    @abstractmethod
    def _project(self, tensors: Sequence[Any]) -> Tensor:
        """P^T g, differentiable."""

    def _solve(self, coordinates: Tensor) -> Tensor:
        """(P^T P)^-1 c."""
        raise ValueError(f"exact: expected False for a {type(self).__name__}, got True")

    @abstractmethod
    def _write(self, tensors: Sequence[Tensor], theta: Tensor, origin: Tensor | None) -> None:
        """Writes origin + P theta into a list of n elements."""

    def _weights(self, params: Iterable[Any] | Tensor) -> list[Tensor]:
        listed = unique_parameters([params] if isinstance(params, Tensor) else params)
        self._check_list(listed, "params")
        if listed[0].device != self.device:
            raise ValueError(
                f"params: expected device {self.device}, as the subspace, got {listed[0].device}"
            )
        return listed

    def _check_list(self, tensors: Sequence[Any], argument: str) -> None:
        """Checks against the shapes if known; one flat vector will always do."""
        flat = len(tensors) == 1 and tensors[0].shape == (self.numel,)
        if self.shapes is not None and not flat:
            check_matches(tensors, self.shapes, self.names, "subspace", argument)
        elif numel(tensors) != self.numel:
            raise ValueError(
                f"{argument}: expected {self.numel} elements in all (columns of basis), got "
                f"{numel(tensors)}"
            )
