"""The principal components of a Gram matrix: the one way from K to a basis.

Whoever has snapshots goes through `decompose`: recording, ranks that record together (which solve
the T x T problem once), `Subspace.from_snapshots`, and the analysis of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dimension import Request, number_of_components
from .spectrum import Spectrum, coefficients, exact_spectrum


class Decomposition(NamedTuple):
    """The leading principal directions, as combinations of the snapshots.

    Attributes
    ----------
    coefficients : Tensor, shape (d, T), float64 on the CPU
        C: the basis is C X.
    explained_variance_ratio, singular_values : Tensor, shape (d,), float64 on the CPU
    mean : Tensor, shape (d,), float64 on the CPU
        Coordinates of the mean of the snapshots, from the first one or that of `seen_from` on.
    choice : dict
        How the number of components was chosen: see `dldr_ext.Subspace`.
    warning : str or None
        What a user should know of that number.
    spectrum : Spectrum
        Of all directions.
    """

    coefficients: Tensor
    explained_variance_ratio: Tensor
    singular_values: Tensor
    mean: Tensor
    choice: dict[str, Any]
    warning: str | None
    spectrum: Spectrum

    @property
    def dim(self) -> int:
        """The number of components, d."""
        return len(self.coefficients)

    def seen_from(self, start: str | int) -> Decomposition:
        """Return the same with the mean as it is seen from a snapshot: "first", "last", an index.

        Snapshot t is at sigma_i^2 C_it, since C K = Sigma^2 C (about the mean, where centred).
        """
        if start == "mean":
            return self._replace(mean=torch.zeros_like(self.mean))
        index = {"first": 0, "last": -1}[start] if isinstance(start, str) else start
        c = self.coefficients
        return self._replace(mean=self.singular_values.square() * (c.mean(1) - c[:, index]))

    def metadata(self) -> dict[str, Any]:
        """Return what a subspace keeps of it, as keyword arguments."""
        return {
            "explained_variance_ratio": self.explained_variance_ratio,
            "singular_values": self.singular_values,
            "mean": self.mean,
            "choice": self.choice,
        }


def _solve_here(solve: Callable[[], Spectrum]) -> Spectrum:
    return solve()


def decompose(
    gram: Tensor,
    square: float,
    request: Request,
    *,
    double: bool,
    what: str = "snapshots",
    solved_once: Callable[[Callable[[], Spectrum]], Spectrum] = _solve_here,
) -> Decomposition:
    """Return the principal components that are asked for: Gram matrix, spectrum, coefficients.

    Parameters
    ----------
    gram : Tensor, shape (T, T), float64
        To all digits: see `exact_gram`.
    square : float
        |w|^2 of one point of the trajectory: how large the weights are.
    request : Request
    double : bool
        The weights and the snapshots are float64 (else at least one of them is float32 or less).
    what : str
        What the rows are called in messages.
    solved_once : callable
        Calls the function it is given, or takes what another rank found by calling it.

    Raises
    ------
    ValueError
        The request cannot be met by so many snapshots; all snapshots are the same.
    """
    request.limit(len(gram))
    spectrum = solved_once(
        lambda: exact_spectrum(gram, square, double=double, center=request.center)
    )
    if spectrum.rank == 0:
        raise ValueError(
            f"the {len(gram)} {what} do not differ (by more than rounding explains): there is no "
            "direction to keep"
        )
    dim, choice, warning = number_of_components(spectrum, len(gram), request)
    values = spectrum.values[:dim].sqrt()
    return Decomposition(
        coefficients(spectrum, dim, center=request.center),
        spectrum.explained(dim),
        values,
        torch.zeros_like(values),
        choice,
        warning,
        spectrum,
    ).seen_from("first")
