"""Train neural networks in tiny subspaces: fused ops, DLDR and P-BFGS for PyTorch.

Dynamic Linear Dimensionality Reduction (DLDR) follows Li, Tan, Huang, Tao, Liu and Huang, "Low
Dimensional Trajectory Hypothesis is True: DNNs Can Be Trained in Tiny Subspaces", IEEE TPAMI 2022
(arXiv:2103.11154).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from . import _library

_library.load()

from . import (  # noqa: E402  (the ops exist only once the library is loaded)
    _registrations,  # noqa: F401  (registers on import)
    ops,
)

if TYPE_CHECKING:
    from .averaging import greedy_soup, uniform_soup, weight_averaging_subspace
    from .distributed import LocalSubspace, ShardedSubspace, shard_if_needed
    from .grouped import GroupedSubspace, layer_groups
    from .implicit import ImplicitSubspace
    from .optim import PBFGS, PSGD, InSubspace, Status, StepRecord, virtual_batch
    from .subspace import Subspace
    from .trajectory import Trajectory

__version__ = "0.1.0"

__all__ = [
    "PBFGS",
    "PSGD",
    "GroupedSubspace",
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


# Loaded when first asked for: who wants the ops alone does not wait for the rest.
_LATER = {
    "subspace": ("Subspace",),
    "trajectory": ("Trajectory",),
    "optim": ("PBFGS", "PSGD", "InSubspace", "Status", "StepRecord", "virtual_batch"),
    "averaging": ("greedy_soup", "uniform_soup", "weight_averaging_subspace"),
    "grouped": ("GroupedSubspace", "layer_groups"),
    "implicit": ("ImplicitSubspace",),
    "distributed": ("LocalSubspace", "ShardedSubspace", "shard_if_needed"),
    "callbacks": (),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name == module or name in names:
            loaded = import_module(f".{module}", __name__)
            globals()[name] = result = loaded if name == module else getattr(loaded, name)
            return result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER})


def build_info() -> dict[str, Any]:
    """What this installation is and what it can run.

    Returns
    -------
    dict
        ``version``; ``cpu_capability``, the instruction-set path in use ("portable", "avx2" or
        "avx512"; forced with the environment variable ``DLDR_CPU_CAPABILITY`` before the first op
        runs); ``cpu_capabilities``, all paths that this machine can run; ``cuda`` (True if the
        CUDA kernels are loaded); ``cuda_archs``, the architectures they were compiled for;
        ``torch_target``, the oldest torch release whose stable ABI the libraries use; ``torch``,
        the release that runs now; ``built_with``, the release and compiler of the build.
    """
    metadata = _library.build_metadata()
    cuda = _library.cuda_loaded()
    return {
        "version": __version__,
        "cpu_capability": torch.ops.dldr_ext._cpu_capability(),
        "cpu_capabilities": torch.ops.dldr_ext._cpu_capabilities().split(","),
        "cuda": cuda,
        "cuda_archs": metadata.get("cuda_archs", []) if cuda else [],
        "torch_target": _library.TORCH_TARGET,
        "torch": torch.__version__,
        "built_with": metadata,
    }
