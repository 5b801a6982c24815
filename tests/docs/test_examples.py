"""The programs in examples/ run, on less data, and do what they are there to show."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_problems import one_thread  # noqa: F401  (a fixture)
from rank_group import RankGroup

FOLDER = Path(__file__).resolve().parents[2] / "examples"


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


def test_pinn(one_thread: None) -> None:  # noqa: F811
    found = run("pinn", evaluations=300)
    for problem in ("Poisson", "Burgers"):
        one, other = found[problem, "pbfgs", 0], found[problem, "lbfgs", 0]
        assert one["loss"] < other["loss"] and one["evaluations"] < 310


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


def torchrun(name: str, *options: str) -> str:
    """What a program prints on two ranks of this machine."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [option for option in options if not option.startswith("--max-restarts")]
    ours = [option for option in options if option.startswith("--max-restarts")]
    done = subprocess.run(
        [sys.executable, *command, *ours, str(FOLDER / f"{name}.py"), *program],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ddp(tmp_path: Path) -> None:
    """A rank dies after step 4: all go on from the checkpoint, as if nothing had happened."""
    options = ("--steps", "8", "--folder")
    printed = torchrun("ddp", "--max-restarts=3", *options, str(tmp_path), "--die-at", "4")
    group = RankGroup(2)
    (tmp_path / "again").mkdir()
    found = group.all(ddp_example, tmp_path / "again", 8)
    group.close()
    resumed = torch.load(tmp_path / "checkpoint.pt")["subspace"]["theta"]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], resumed.to(found[0].dtype))
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) >= 8 and losses[-1] < losses[0]


def ddp_example(folder: Path, steps: int) -> torch.Tensor:
    return run("ddp", folder=folder, steps=steps)


def test_fsdp2() -> None:
    losses = [float(word) for word in torchrun("fsdp2").split()[-2:]]
    assert losses[1] < 0.9 * losses[0]


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


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    found = run("transformers_trainer", epochs=(2, 3), pieces=320)
    assert found["pbfgs"] < found["adamw"] + 0.3 < 4.5  # 5.5 at the start
