"""One small run of the demo, which several files look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dldr_ext.demo import data, run


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for further threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="package")
def config() -> run.Config:
    return run.Config("digits", dim=6, seeds=2, epochs=4, threads=1)


@pytest.fixture(scope="package")
def calls() -> list[tuple[int, str, float]]:
    """What the run reported of its progress."""
    return []


@pytest.fixture(scope="package")
def outcome(config, calls):
    return run.run(config, lambda *call: calls.append(call))
