"""Constants of the compiled library (csrc/plan.h), read from it.

They are there whatever is imported: the package's ``__init__`` imports `ops` first, which loads the
library before anything else.
"""

from __future__ import annotations

import torch

TILE: int  # elements whose products are summed before they are added to float64 sums
SCALE_BLOCK: int  # columns that share a scale in the 8-bit formats
MAX_CHUNKS: int  # most chunks, of whole tiles, that a flat vector is cut into
MAX_DIM: int  # most basis rows
TILE, SCALE_BLOCK, MAX_CHUNKS, MAX_DIM = torch.ops.dldr_ext._constants()
