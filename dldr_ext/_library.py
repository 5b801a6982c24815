"""Finds and loads the compiled op libraries; says plainly what is wrong when it cannot."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_CPU_LIBRARY = _HERE / "_C.so"
_CUDA_LIBRARY = _HERE / "_C_cuda.so"

#: Oldest torch whose stable ABI the libraries are compiled for.
TORCH_TARGET = "2.10"


def build_metadata() -> dict[str, Any]:
    """What the libraries were built with, as setup.py noted it (empty if they were never built)."""
    path = _HERE / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _registered() -> bool:
    return hasattr(torch.ops.dldr_ext, "project")


def _found() -> str:
    return (
        f"found: torch {torch.__version__} (CUDA {torch.version.cuda}), "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )


def load() -> None:
    """Loads `_C` and, where torch has CUDA and the library is there, `_C_cuda`."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    needed = tuple(int(part) for part in TORCH_TARGET.split("."))
    if version < needed:
        raise ImportError(f"dldr_ext needs torch >= {TORCH_TARGET}; {_found()}")
    if _registered():
        return
    if not _CPU_LIBRARY.is_file():
        raise ImportError(
            f"dldr_ext: the compiled library {_CPU_LIBRARY.name} is missing beside {_HERE.name}/"
            "__init__.py. If this is a source checkout, build it with "
            f"`pip install --no-build-isolation -e .` in its folder; {_found()}"
        )
    _load_one(_CPU_LIBRARY)
    if torch.version.cuda is not None and _CUDA_LIBRARY.is_file():
        _load_one(_CUDA_LIBRARY)


def _load_one(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"dldr_ext: {path.name} could not be loaded: {error}. It was built with "
            f"{build_metadata() or 'unknown settings'}; {_found()}. Reinstall with "
            "`pip install --no-build-isolation --force-reinstall --no-deps dldr_ext`."
        ) from error


def cuda_loaded() -> bool:
    """True if the CUDA kernels are registered."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("dldr_ext::project", "CUDA")
