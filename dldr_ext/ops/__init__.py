"""The fused, memory-bound ops over lists of parameter tensors.

Notation: ``n`` parameters in all, ``d`` basis rows, ``T`` snapshots. ``basis`` is P^T, shape
(d, n). Flat order is logical order: the concatenation of ``t.reshape(-1)`` over the list, whatever
the memory format of each tensor.

Storage dtypes of ``basis`` and ``snapshots``: float32, bfloat16, float16, float64; int8 and
float8_e4m3fn together with ``scale``, float32 of shape (d, ceil(n / 256)): element i of row r
stands for ``basis[r, i] * scale[r, i // 256]``. Tensor lists may mix float32, bfloat16, float16
and float64. Arithmetic is float32 (float64 for a float64 basis) with float64 across chunks, in an
order set by n alone: results are bitwise the same from run to run, and on CPU for any number of
threads and any way the same flat vector is cut into tensors.

Bad input raises ``ValueError`` or ``TypeError`` before anything is written.
"""

from __future__ import annotations

from .library import load

load()

from . import derivatives, registrations  # noqa: E402, F401  (register on import)
from .functional import (  # noqa: E402
    form_basis,
    gram,
    gram_append_,
    gram_block_,
    project,
    project_many,
    reconstruct,
    reconstruct_,
    reconstruct_residual,
    store_snapshot_,
    trial_,
)

__all__ = [
    "form_basis",
    "gram",
    "gram_append_",
    "gram_block_",
    "project",
    "project_many",
    "reconstruct",
    "reconstruct_",
    "reconstruct_residual",
    "store_snapshot_",
    "trial_",
]
