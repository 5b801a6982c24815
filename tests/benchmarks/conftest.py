"""What the tests of the experiments share. They are in the source tree only."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# The digits come with scikit-learn, the plots need matplotlib.
if any(find_spec(name) is None for name in ("benchmarks", "sklearn", "matplotlib")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread(threads) -> None:
    """Networks this small only wait for further threads."""
    threads(1)


@pytest.fixture(scope="session")
def digits() -> Any:
    from benchmarks.experiments import data

    return data.load("digits")
