"""The principal directions of stored snapshots, or of some of their columns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..tensors.matrices import Matrix
from . import spectrum
from .dimension import choose
from .gram import exact_gram

_Kind = TypeVar("_Kind")


def principal_subspace(
    snapshots: Matrix,
    gram: Tensor | None,
    origin: Tensor,
    dtype: torch.dtype,
    form: Callable[..., _Kind],
    *,
    double: bool,
    center: bool,
    most: int,
    dim: int | str | None = None,
    explained: float | None = None,
    stacklevel: int,
    **known: Any,
) -> _Kind:
    """The subspace that principal component analysis finds.

    Parameters
    ----------
    snapshots : Tensor, StoredRows or ScaledRows, shape (T, n)
    gram : Tensor, shape (T, T), float64, or None
        Their Gram matrix, if it is known to all digits.
    origin : Tensor, shape (n,)
        A point of the trajectory: w0.
    dtype : torch.dtype
        Of the basis.
    form : callable
        Makes the subspace of the coefficients, as `dense` does.
    double : bool
        Snapshots and weights are float64.
    center : bool
    most : int
        Number of directions at most.
    dim, explained
        What was asked for: as in `Trajectory.subspace`.
    stacklevel : int
        Of a warning; 0 for none.
    **known
        Further arguments of ``form``.

    Raises
    ------
    ValueError
        All snapshots are the same.
    """
    # The Gram matrix that recording made serves to watch it; the basis needs more digits.
    gram = exact_gram(snapshots) if gram is None else gram
    found = spectrum.exact_spectrum(gram, double, origin, center=center)
    if found.rank == 0:
        raise ValueError(
            f"the {len(snapshots)} snapshots do not differ (by more than rounding explains): there "
            "is no direction to keep"
        )
    count, facts, warning = choose(found, len(snapshots), most, dim, explained, center)
    if warning is not None and stacklevel:
        warnings.warn(warning, UserWarning, stacklevel=stacklevel)
    coefficients = spectrum.coefficients(found, count, center=center).to(snapshots.device)
    return form(
        snapshots,
        coefficients,
        origin,
        dtype,
        explained_variance_ratio=found.explained(count),
        singular_values=found.values[:count].sqrt(),
        choice=facts,
        **known,
    )
