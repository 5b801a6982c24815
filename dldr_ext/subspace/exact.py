"""The Gram matrix of a basis as it is stored: the error of rounding, and exact coordinates."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..pca import report as report_module
from ..pca.gram import columns_together
from ..tensors.derivatives import in_transform
from ..tensors.parameters import type_name
from .base import AffineSubspace

# Eigenvalues of a Gram matrix below this fraction of the largest are not told from zero: its sums
# are float64, of n terms.
_INDEPENDENT = 2.0**-44


class QuantizationError(NamedTuple):
    """The orthonormality error of a rounded basis: `Subspace.quantization_error`.

    Attributes
    ----------
    largest : float
        The largest |entry| of G - I, with G = P^T P the Gram matrix of the stored rows.
    spectral : float
        The spectral norm of G - I: |P theta|^2 is within this fraction of |theta|^2.
    captured_variance : float or None
        Of the variance along the directions r_i of the reference, the fraction that the span of the
        stored rows still captures: sum_i sigma_i^2 |Q r_i|^2 / sum_i sigma_i^2 |r_i|^2, with Q the
        orthogonal projection on that span and sigma_i the reference's singular values (where it
        has none, sigma_i^2 is its explained variance ratio). None without a reference, or with one
        that has neither.
    """

    largest: float
    spectral: float
    captured_variance: float | None = None

    def __str__(self) -> str:
        text = f"G - I: largest entry {self.largest:.2g}, spectral norm {self.spectral:.2g}"
        if self.captured_variance is None:
            return text + "; captured variance unknown"
        return text + f"; lost of the reference's variance: {1 - self.captured_variance:.2g}"


class ReadableSubspace(AffineSubspace):
    """A subspace of one basis whose columns can be read as plain numbers, some at a time."""

    choice: dict[str, Any] | None
    _gram: Tensor | None = None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the stored rows."""

    @abstractmethod
    def _values(self, begin: int, step: int) -> Tensor:
        """Return columns [begin, begin + step), (d, step) float64; begin % 4096 == 0."""

    def report(self) -> str:
        """Return what was kept and why, as several lines of text.

        The snapshots, the number of directions that was asked for and the one that was kept, why
        no more, what the rank guard dropped, and the share of the variance beside the one that a
        random walk of as many snapshots has along as many directions. Where it is not known how
        the directions were chosen, as for random ones, it says so.

        Returns
        -------
        str

        Examples
        --------
        >>> import torch
        >>> from dldr_ext import Subspace
        >>> print(Subspace(torch.tensor([[0.6, 0.8]]), torch.zeros(2)).report())
        subspace    1 direction of 2 numbers each, float32
        kept        all of them; how they were chosen is not known
        """
        ratio = self.explained_variance_ratio
        return report_module.report(self.dim, self.numel, self.dtype, self.choice, ratio)

    def quantization_error(self, reference: AffineSubspace | None = None) -> QuantizationError:
        """Return how far rounding has taken the basis from an orthonormal one, and what it lost.

        Parameters
        ----------
        reference : Subspace or ImplicitSubspace, optional
            The one before rounding, to compare the captured variance with; on the same device.

        Returns
        -------
        QuantizationError
            In float64, from the basis as it is stored: one pass, chunk by chunk, of n d^2
            products (n (d + d')^2 with a reference of d' directions).

        Raises
        ------
        TypeError, ValueError
            The reference is of another kind or of other parameters.

        Examples
        --------
        >>> import torch
        >>> from dldr_ext import Subspace
        >>> whole = Subspace(torch.tensor([[0.6, 0.8]]), torch.zeros(2), singular_values=[1.0])
        >>> print(whole.quantize("int8").quantization_error(whole))
        G - I: largest entry 0.0019, spectral norm 0.0019; lost of the reference's variance: 1.6e-06
        """
        if reference is None:
            return _deviation(self._stored_gram())
        return _compared(self, _checked_reference(self, reference))

    def _facts(self) -> dict[str, Any]:
        """Return the metadata of a file."""
        return {"shapes": self.shapes, "names": self.names, "choice": self.choice}

    def _stored_gram(self) -> Tensor:
        """Return the Gram matrix of the stored rows, (d, d) float64 on the CPU; made once."""
        if self._gram is None:
            if in_transform():  # in which new tensors belong to the transform, and may not be kept
                raise ValueError(
                    "exact: expected G to be known within a transform of torch.func: call project "
                    "or coordinates with exact=True once before it"
                )
            self._gram = _gram_of(self)
        return self._gram

    def _solve(self, coordinates: Tensor) -> Tensor:
        return _solved(self._stored_gram(), coordinates)


def _gram_of(*spaces: ReadableSubspace) -> Tensor:
    """Return the Gram matrix of the rows of all ``spaces``, float64 on the CPU."""
    rows, device = sum(space.dim for space in spaces), spaces[0].device
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=device)
    step = columns_together(rows, device)
    for begin in range(0, spaces[0].numel, step):
        gram += ops.gram(torch.cat([space._values(begin, step) for space in spaces]))
    return gram.cpu()


def _solved(gram: Tensor, coordinates: Tensor) -> Tensor:
    """Return the solution x of G x = c, with the dtype and device of c; differentiable in c."""
    values = torch.linalg.eigvalsh(gram)
    if not float(values[0]) > _INDEPENDENT * float(values[-1]):
        raise ValueError(
            f"exact: expected linearly independent basis rows, got a Gram matrix with eigenvalues "
            f"from {float(values[0]):.3g} to {float(values[-1]):.3g}"
        )
    factor = torch.linalg.cholesky(gram).to(coordinates.device)
    solution = torch.cholesky_solve(coordinates.to(torch.float64)[:, None], factor)
    return solution[:, 0].to(coordinates.dtype)


def _deviation(gram: Tensor) -> QuantizationError:
    """Return the error of a basis of which nothing but the Gram matrix is known."""
    difference = gram - torch.eye(len(gram), dtype=gram.dtype, device="cpu")
    spectral = torch.linalg.eigvalsh(difference).abs().max()
    return QuantizationError(float(difference.abs().max()), float(spectral))


def _compared(space: ReadableSubspace, reference: ReadableSubspace) -> QuantizationError:
    """Return the error of ``space`` beside the directions before rounding."""
    joint, d = _gram_of(space, reference), space.dim
    gram, mixed = joint[:d, :d], joint[:d, d:]
    captured = None
    variances = _variances(reference)
    if variances is not None:
        kept = torch.linalg.pinv(gram, rtol=_INDEPENDENT, hermitian=True)
        squares = (mixed * (kept @ mixed)).sum(0)
        captured = float(variances @ squares / (variances @ joint.diagonal()[d:]))
    return _deviation(gram)._replace(captured_variance=captured)


def _checked_reference(space: ReadableSubspace, reference: Any) -> ReadableSubspace:
    if not isinstance(reference, ReadableSubspace):
        raise TypeError(
            f"reference: expected a Subspace or ImplicitSubspace, got {type_name(reference)}"
        )
    if reference.numel != space.numel or reference.device != space.device:
        raise ValueError(
            f"reference: expected {space.numel} weights on {space.device}, as the subspace, got "
            f"{reference.numel} on {reference.device}"
        )
    return reference


def _variances(space: AffineSubspace) -> Tensor | None:
    if space.singular_values is not None:
        return space.singular_values**2
    return space.explained_variance_ratio
