"""Linear subspaces of the weights, w = w0 + P theta, and the ways in which P is stored."""

from __future__ import annotations

from .base import AffineSubspace
from .dense import Subspace
from .exact import QuantizationError
from .grouped import GroupedSubspace, layer_groups
from .identity import IdentitySubspace
from .implicit import ImplicitSubspace
from .parametrize import SubspaceModule

__all__ = [
    "AffineSubspace",
    "GroupedSubspace",
    "IdentitySubspace",
    "ImplicitSubspace",
    "QuantizationError",
    "Subspace",
    "SubspaceModule",
    "layer_groups",
]
