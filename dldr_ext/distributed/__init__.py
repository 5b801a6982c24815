"""Subspaces whose basis is cut by columns over the ranks of a process group.

Every rank makes the same calls. The optimizers take these subspaces with ``process_group=``.
"""

from __future__ import annotations

from ..collectives.dtensors import local_columns, local_shards
from ..collectives.partition import cut
from .local import LocalSubspace
from .sharded import ShardedSubspace, shard_if_needed

__all__ = [
    "LocalSubspace",
    "ShardedSubspace",
    "cut",
    "local_columns",
    "local_shards",
    "shard_if_needed",
]
