"""The number of components: what is asked for, what a spectrum supports, and why no more."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from ..tensors.constants import MAX_DIM
from .random_walk import SHORTEST, left_over, supported, walk_spectrum
from .report import FIELDS
from .spectrum import Spectrum

_DEFAULT_DIM = 40


class Request(NamedTuple):
    """The components that are asked for: arguments as of `dldr_ext.Trajectory.subspace`."""

    dim: int | str | None = None
    explained: float | None = None
    center: bool = True

    def limit(self, length: int) -> int:
        """Return the most components of ``length`` snapshots that the request allows.

        Raises
        ------
        ValueError
            ``dim`` and ``explained`` together, or one of them out of range.
        """
        dim, explained, center = self
        if dim is not None and explained is not None:
            raise ValueError(f"expected dim or explained, got both: {dim} and {explained}")
        if explained is not None and not 0 < explained <= 1:
            raise ValueError(f"explained: expected 0 < explained <= 1, got {explained}")
        limit = length - 1 if center else length
        if isinstance(dim, str):
            if dim != "auto":
                raise ValueError(f"dim: expected a number or 'auto', got {dim!r}")
            _check_auto(length, center)
            return min(limit, MAX_DIM)
        if dim is None:
            return min(limit, MAX_DIM if explained is not None else _DEFAULT_DIM)
        return checked_dim(dim, limit, f"{length} {'centred ' * center}snapshots")


class Components(NamedTuple):
    """A number of components, what a subspace remembers of it, and what is worth a warning."""

    dim: int
    choice: dict[str, Any]
    warning: str | None


def number_of_components(spectrum: Spectrum, length: int, request: Request) -> Components:
    """Return how many components to keep, as far as there are so many.

    Parameters
    ----------
    spectrum : Spectrum
        Of rank 1 or more.
    length : int
        T, the number of snapshots.
    request : Request
    """
    dim, explained, center = request
    most = request.limit(length)
    warning, why = None, "as asked for" if dim is not None else "the default"
    if dim == "auto":
        asked = 'dim = "auto"'
        count, why = supported(spectrum.values[: length - 1], spectrum.rank)
        if count == 0:
            warning = f"{asked}: no direction stands out from noise, kept the first"
            count, why = 1, "no direction stands out from noise"
    elif explained is not None:
        asked = f"explained = {explained:g}"
        count = int((spectrum.explained(spectrum.rank).cumsum(0) < explained).sum()) + 1
        why = "the fewest that explain this share"
    else:
        asked = f"dim = {most}" if dim is not None else "no number"
        count = most
    if count > min(most, spectrum.rank):
        count = min(most, spectrum.rank)
        why = "no more directions are above rounding" if count < most else f"{most} is the limit"
        if isinstance(dim, int):
            warning = (
                f"dim = {dim} is above the numerical rank of the snapshots: kept {count} directions"
            )
    walk = 1 - float(left_over(walk_spectrum(length))[count - 1]) if center else None
    values = (length, spectrum.rank, asked, why, walk)
    return Components(count, dict(zip(FIELDS, values, strict=True)), warning)


def checked_dim(dim: int, limit: int, have: str) -> int:
    """Return ``dim`` as an int, if 1 <= dim <= min(limit, 1024).

    ``have`` says in the error where the limit is from.
    """
    result = operator.index(dim)
    limit = min(limit, MAX_DIM)
    if not 1 <= result <= limit:
        raise ValueError(f"dim: expected 1 <= dim <= {limit} ({have}), got {result}")
    return result


def _check_auto(length: int, center: bool) -> None:
    """Check that there are enough snapshots for dim='auto'."""
    if not center:
        raise ValueError("dim: 'auto' compares centred spectra, got center=False")
    if length < SHORTEST:
        raise ValueError(
            f"dim: 'auto' needs {SHORTEST} snapshots or more to tell a spectrum from noise, got "
            f"{length}"
        )
