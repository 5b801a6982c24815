"""The small problem of a principal component analysis: from a Gram matrix to coefficients.

T snapshots of n numbers each, T far below n: the directions come from the T x T Gram matrix K (the
"method of snapshots"), float64 throughout. Only `exact_gram` reads the snapshots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Shares of the largest eigenvalue (of the Gram matrix before it is centred) up to which one is not
# told from zero.
#
# The ops add products of float32 numbers in float32 within a tile of some thousand elements and in
# float64 beyond it: each entry of their K is off by some 1e-7 of |x_i| |x_j| at most (far less
# where many tiles average it out). A symmetric error E moves each eigenvalue by at most ||E||, so
# that one of 1e-7 of the largest may be all error, and its eigenvector arbitrary.
_FLOAT32_SUMS = 2.0**-22
# With float64 sums: a few roundings of the sums and of the eigensolver; and where the snapshots are
# float32 or less, 4e-6 in terms of singular values, the length that a direction of float32 updates
# loses in the noise of their own arithmetic.
FLOAT64_SUMS, _FLOAT64_SUMS_OF_FLOAT32 = 2.0**-44, 2.0**-36
# A float32 weight is off by up to 2^-24 of itself (2^-25.3 in the root mean square), independently
# in each snapshot: a direction with an eigenvalue below this share of |w|^2 is made of just that.
_WEIGHTS, _WEIGHTS_OF_FLOAT64 = 2.0**-48, 2.0**-104
_PIECE = 1 << 22  # elements of a flat vector


class Spectrum(NamedTuple):
    """Eigenvalues (T,), descending, none negative; eigenvectors as rows (T, T); rank."""

    values: Tensor
    vectors: Tensor
    rank: int

    def explained(self, count: int) -> Tensor:
        """Return the share of the variance along each of the first ``count`` directions."""
        return self.values[:count] / self.values.sum()


def stored_spectrum(gram: Tensor, dtype: torch.dtype) -> Spectrum:
    """Return the centred spectrum of a Gram matrix that the ops made of rows of ``dtype``."""
    share = FLOAT64_SUMS if dtype == torch.float64 else _FLOAT32_SUMS
    return _spectrum(gram, True, share, 0.0)


def square_of(weights: Tensor) -> Tensor:
    """Return |w|^2 in float64, piece by piece: each is copied to float64."""
    norms = [torch.linalg.vector_norm(w, dtype=torch.float64) for w in weights.split(_PIECE)]
    return torch.stack(norms).square().sum()


def exact_spectrum(gram: Tensor, square: float, *, double: bool, center: bool) -> Spectrum:
    """Return the spectrum of an `exact_gram`.

    Parameters
    ----------
    gram : Tensor, shape (T, T)
    square : float
        |w|^2 of one point of the trajectory: how large the weights are.
    double : bool
        The weights and the snapshots are float64 (else at least one of them is float32 or less).
    center : bool
    """
    if double:
        return _spectrum(gram, center, FLOAT64_SUMS, _WEIGHTS_OF_FLOAT64 * square)
    return _spectrum(gram, center, _FLOAT64_SUMS_OF_FLOAT32, _WEIGHTS * square)


def _spectrum(gram: Tensor, center: bool, share: float, floor: float) -> Spectrum:
    """Eigenvalues and eigenvectors of K or, centred, of H K H with H = I - 11^T / T.

    Signs are set as scikit-learn's svd_flip does: the largest entry of each eigenvector, by
    magnitude, is positive.
    """
    gram = gram.detach().cpu()
    floor = max(floor, share * float(torch.linalg.eigvalsh(gram)[-1]))
    values, vectors = torch.linalg.eigh(centered(gram) if center else gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.T.flip(0)
    peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = torch.where(peaks < 0, -vectors, vectors)
    return Spectrum(values, vectors, int((values > floor).sum()))


def centered(gram: Tensor) -> Tensor:
    """H K H, symmetric to the bit."""
    columns = gram.mean(0)
    result = gram - columns[None, :] - columns[:, None] + columns.mean()
    return (result + result.T) / 2


def coefficients(spectrum: Spectrum, dim: int, *, center: bool = True) -> Tensor:
    """C = diag(1 / sigma) V_d^T H, shape (d, T): the basis is C X."""
    result = spectrum.vectors[:dim] / spectrum.values[:dim, None].sqrt()
    return result - result.mean(1, keepdim=True) if center else result
