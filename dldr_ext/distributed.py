"""Subspaces whose basis is cut by columns over the ranks of a process group.

Every rank makes the same calls. The optimizers take these subspaces with ``process_group=``.
"""

from __future__ import annotations

from ._cut import cut
from ._local_subspace import LocalSubspace
from ._placements import local_columns, local_shards
from ._sharded_subspace import ShardedSubspace
from ._sharding import shard_if_needed

__all__ = [
    "LocalSubspace",
    "ShardedSubspace",
    "cut",
    "local_columns",
    "local_shards",
    "shard_if_needed",
]
