"""The programs in examples/ run, on less data, and do what they are there to show."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_problems import one_thread  # noqa: F401  (a fixture)

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, **options: Any) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(**options)


def test_every_example_is_tested() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in FOLDER.glob("*.py")} <= tests


def test_digits() -> None:
    pytest.importorskip("sklearn")
    found = run("digits")
    assert found["pbfgs"] >= found["sgd"] > 0.85
    assert len((FOLDER / "digits.py").read_text().splitlines()) < 45


def test_resume() -> None:
    one, other = run("resume")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adversarial() -> None:
    pytest.importorskip("sklearn")
    found = run("adversarial", epochs=4, steps=8, examples=700)
    assert found["pbfgs"] > 0.4 > 0.1 > found["start"]


def test_weight_averaging() -> None:
    pytest.importorskip("sklearn")
    found = run("weight_averaging", epochs=8, steps=30)
    assert found["trained average"] >= found["last"] - 0.01
    assert found["greedy soup"] >= found["last"] - 0.02
    assert min(found.values()) > 0.85


def test_refreshed_basis() -> None:
    losses = run("refreshed_basis")
    assert losses["refreshed twice"] < 0.95 * losses["first subspace"]


@pytest.mark.filterwarnings("ignore")
def test_lightning_module() -> None:
    pytest.importorskip("lightning")
    found = run("lightning_module", epochs=(3, 10))
    assert found["pbfgs"] < 0.8 * found["sgd"]


@pytest.mark.filterwarnings("ignore")
def test_huggingface_loop() -> None:
    pytest.importorskip("transformers")
    found = run("huggingface_loop", recorded=100, steps=10)
    assert found["pbfgs"] < 0.3 * found["start"]
