"""Train neural networks in tiny subspaces: fused ops, DLDR and P-BFGS for PyTorch.

Dynamic Linear Dimensionality Reduction (DLDR) follows Li, Tan, Huang, Tao, Liu and Huang, "Low
Dimensional Trajectory Hypothesis is True: DNNs Can Be Trained in Tiny Subspaces", IEEE TPAMI 2022
(arXiv:2103.11154).
"""

from __future__ import annotations

from typing import Any

import torch

from . import ops
from .averaging import greedy_soup, uniform_soup, weight_averaging_subspace
from .distributed import LocalSubspace, ShardedSubspace, shard_if_needed
from .ops import library
from .optim import PBFGS, PSGD, InSubspace, Status, StepRecord, virtual_batch
from .subspace import GroupedSubspace, IdentitySubspace, ImplicitSubspace, Subspace, layer_groups
from .trajectory import Trajectory

__all__ = [
    "PBFGS",
    "PSGD",
    "GroupedSubspace",
    "IdentitySubspace",
    "ImplicitSubspace",
    "InSubspace",
    "LocalSubspace",
    "ShardedSubspace",
    "Status",
    "StepRecord",
    "Subspace",
    "Trajectory",
    "build_info",
    "greedy_soup",
    "layer_groups",
    "ops",
    "shard_if_needed",
    "uniform_soup",
    "virtual_batch",
    "weight_averaging_subspace",
]

# That of the tag which it was built at: setup.py writes it.
__version__: str = library.build_metadata().get("version", "0+unknown")


def build_info() -> dict[str, Any]:
    """Return what this installation is and what it can run.

    Returns
    -------
    dict
        ``version``; ``cpu_capability``, the instruction-set path in use ("portable", "avx2",
        "avx512", "avx512_bf16" or "amx"; forced with the environment variable
        ``DLDR_CPU_CAPABILITY`` before the first op runs); ``cpu_capabilities``, all paths that
        this machine can run, the fastest last; ``cuda`` (True if the CUDA kernels are loaded);
        ``cuda_archs``, the architectures they were compiled for; ``torch_target``, the oldest
        torch release whose stable ABI the libraries use; ``torch``, the release that runs now;
        ``built_with``, the release and compiler of the build.
    """
    metadata = library.build_metadata()
    cuda = library.cuda_loaded()
    return {
        "version": __version__,
        "cpu_capability": torch.ops.dldr_ext._cpu_capability(),
        "cpu_capabilities": torch.ops.dldr_ext._cpu_capabilities().split(","),
        "cuda": cuda,
        "cuda_archs": metadata.get("cuda_archs", []) if cuda else [],
        "torch_target": library.TORCH_TARGET,
        "torch": torch.__version__,
        "built_with": metadata,
    }
