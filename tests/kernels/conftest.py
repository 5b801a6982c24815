"""Builds the kernel bench with CMake and ninja, and hands it to the tests. Needs NumPy, no torch.

`DLDR_KERNELS_DIR` names a folder that already holds the module instead of build/kernels.
"""

import importlib.machinery
import importlib.util
import os
import sysconfig
from pathlib import Path

import pytest
from kernel_build import ROOT, build
from kernel_paths import EMULATED, MMA, PATHS, Bench


@pytest.fixture(scope="session")
def kernels_folder() -> Path:
    if given := os.environ.get("DLDR_KERNELS_DIR"):
        return Path(given)
    folder = ROOT / "build" / "kernels"
    build(folder)
    return folder


@pytest.fixture(scope="session")
def kernels(kernels_folder):
    file = kernels_folder / f"dldr_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    loader = importlib.machinery.ExtensionFileLoader("dldr_kernels", str(file))
    spec = importlib.util.spec_from_file_location("dldr_kernels", file, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return Bench(module)


def _path(name: str, kernels) -> str:
    """Skip what this processor cannot run, or need not run on emulated instructions.

    A sanitizer sees what emulated instructions read and write, the others' tiles it does not.
    """
    paths = kernels.paths()
    if name not in paths:
        pytest.skip(f"this processor cannot run {name}")
    if name.endswith(EMULATED) and name[: -len(EMULATED)] in paths and not kernels.SANITIZERS:
        pytest.skip("this processor runs the instructions themselves")
    return name


@pytest.fixture(params=PATHS)
def path(request, kernels) -> str:
    """Every instruction-set path that this processor can run."""
    return _path(request.param, kernels)


@pytest.fixture(params=PATHS + MMA)
def mma_path(request, kernels) -> str:
    """The same, with those that have kernels of their own for matrix products."""
    return _path(request.param, kernels)
