"""Fixtures shared by the tests.

Tests with the mark `cuda` are skipped where there is no NVIDIA GPU. DLDR_CUDA_TESTS_ON=cpu runs
them on CPU tensors instead, as far as they need no device: so their own code is checked anywhere.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

import dldr_ext

CUDA_TESTS_ON = os.environ.get("DLDR_CUDA_TESTS_ON", "cuda")
_ON_GPU = torch.cuda.is_available()


def pytest_configure(config):
    if CUDA_TESTS_ON not in ("cuda", "cpu"):
        raise pytest.UsageError(f"DLDR_CUDA_TESTS_ON: expected cuda or cpu, got {CUDA_TESTS_ON!r}")


def pytest_collection_modifyitems(items):
    for item in items:
        real = item.get_closest_marker("needs_gpu") is not None
        stand_in = CUDA_TESTS_ON == "cpu" and not real
        if not _ON_GPU and not stand_in and (real or item.get_closest_marker("cuda")):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> None:
    """Leaves out what the tests of other files made where all objects there are, are looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


@contextmanager
def _cpu_path(name: str):
    """The CPU kernels of one instruction set."""
    before = torch.ops.dldr_ext._cpu_capability()
    torch.ops.dldr_ext._set_cpu_capability(name)
    yield
    torch.ops.dldr_ext._set_cpu_capability(before)


@pytest.fixture(params=dldr_ext.build_info()["cpu_capabilities"])
def cpu_capability(request):
    """Runs a test on every instruction-set path of this machine."""
    with _cpu_path(request.param):
        yield request.param


@contextmanager
def _tensors_on(device: str):
    """New tensors are made there."""
    with torch.device(device):
        yield
    if device == "cuda":
        torch.cuda.synchronize()  # an error of a kernel belongs to this test


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Runs a test with the tensors of each kind of device."""
    name = CUDA_TESTS_ON if request.param == "cuda" else "cpu"
    with _tensors_on(name):
        yield torch.device(name)


@pytest.fixture(
    params=[
        *dldr_ext.build_info()["cpu_capabilities"],
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def kernels(request):
    """Runs a test on every instruction-set path of this machine and on CUDA."""
    cuda = request.param == "cuda"
    with _tensors_on(CUDA_TESTS_ON) if cuda else _cpu_path(request.param):
        yield request.param


@pytest.fixture
def gpu():
    """Tensors are made on the GPU."""
    with _tensors_on(CUDA_TESTS_ON):
        yield torch.device(CUDA_TESTS_ON)


@pytest.fixture
def threads():
    """Sets the number of threads and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rank_groups():
    """Groups of so many ranks, started once for all tests that do not end them."""
    from rank_group import RankGroup

    groups: dict[int, RankGroup] = {}

    def group(size: int) -> RankGroup:
        if size not in groups:
            groups[size] = RankGroup(size)
        return groups[size]

    yield group
    for started in groups.values():
        started.close()


@pytest.fixture(params=[2, 4])
def ranks(request, rank_groups):
    """2 or 4 ranks: see `rank_group.RankGroup`."""
    return rank_groups(request.param)
