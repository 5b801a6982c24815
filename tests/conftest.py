"""Fixtures shared by the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import dldr_ext


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(params=dldr_ext.build_info()["cpu_capabilities"])
def cpu_capability(request):
    """Runs a test on every instruction-set path of this machine."""
    before = torch.ops.dldr_ext._cpu_capability()
    torch.ops.dldr_ext._set_cpu_capability(request.param)
    yield request.param
    torch.ops.dldr_ext._set_cpu_capability(before)


@pytest.fixture
def threads():
    """Sets the number of threads and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
