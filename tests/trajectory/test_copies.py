"""Trajectories, subspaces and optimizers that are pickled or copied after they were used."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace, Trajectory, virtual_batch

Copied = Callable[[Any], Any]


def _saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [lambda thing: pickle.loads(pickle.dumps(thing)), copy.deepcopy, _saved]
IDS = ["pickle", "deepcopy", "torch.save"]
STORAGE = ["device", "host", "disk"]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def _walk(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)


def _recorded(storage: str, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Trajectory]:
    model = _model()
    options = {"path": folder / "t"} if storage == "disk" else {}
    trajectory = Trajectory(model.named_parameters(), 9, dtype, storage, **options)
    for _ in range(6):
        trajectory.record()
        _walk(model)
    return model, trajectory


def _use(trajectory: Trajectory, folder: Path) -> None:
    """Call every method that leaves something behind."""
    trajectory.explained_variance_ratio()
    trajectory.subspace(3)
    trajectory.grouped_subspace([2, 2, 2], 2)
    trajectory.save(folder / "saved")
    repr((trajectory, trajectory.gram, trajectory.snapshots, trajectory.anchor, trajectory.cost))
    if trajectory.storage != "disk":
        space = trajectory.subspace(3, materialize=False)
        space.nearest(trajectory.params)
        del space
        gc.collect()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("storage", STORAGE)
def test_a_trajectory(storage: str, dtype: torch.dtype, way: Copied, tmp_path: Path) -> None:
    model, trajectory = _recorded(storage, tmp_path, dtype)
    _use(trajectory, tmp_path)
    other, twin = way((model, trajectory))
    assert torch.equal(twin.gram, trajectory.gram)
    assert torch.equal(twin.subspace(3).direction(0), trajectory.subspace(3).direction(0))
    assert twin.params[0] is other[0].weight and twin.names == trajectory.names
    if storage == "disk":
        with pytest.raises(ValueError, match="path: expected a folder that this process has open"):
            twin.record()
    else:
        assert twin.record() == 6
        assert torch.equal(twin.snapshots[:6], trajectory.snapshots[:6])
    twin.close()
    assert len(trajectory) == 6 and trajectory.record() == 6
    trajectory.close()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_copy_knows_of_the_implicit_subspace_beside_it(way: Copied, tmp_path: Path) -> None:
    _, trajectory = _recorded("device", tmp_path, torch.float32)
    space = trajectory.subspace(3, materialize=False)
    alone = way(trajectory)
    assert alone.into_subspace(3).dim == 3  # nothing reads the rows of this one
    twin, its_space = way((trajectory, space))
    with pytest.raises(ValueError, match="an implicit subspace"):
        twin.into_subspace(3)
    assert torch.equal(its_space.direction(1), space.direction(1))
    del its_space
    gc.collect()
    assert twin.into_subspace(3).dim == 3


def _spaces(model: nn.Module, trajectory: Trajectory) -> dict[str, Any]:
    return {
        "dense": trajectory.subspace(4),
        "random": Subspace.random(model.named_parameters(), 4),
        "implicit": trajectory.subspace(4, materialize=False),
        "grouped": trajectory.grouped_subspace([2, 2, 2], 2),
        "int8": trajectory.subspace(4).quantize("int8"),
    }


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("kind", ["dense", "random", "implicit", "grouped", "int8"])
def test_a_subspace_and_its_module(kind: str, way: Copied, tmp_path: Path) -> None:
    model, trajectory = _recorded("device", tmp_path, torch.float32)
    space = _spaces(model, trajectory)[kind]
    params, x = list(model.parameters()), torch.randn(7, 6)
    space.project([p.detach() for p in params])
    space.nearest(params)
    repr((space, space.report(), space.digest(), space.spread))
    module = space.parametrize(model)
    module(x).sum().backward()
    module.write_back()
    module.theta.data += 0.1
    twin, its_module = way((space, module))
    assert torch.equal(twin.coordinates(params), space.coordinates(params))
    assert torch.equal(its_module(x), module(x))


MAKERS = {
    "PBFGS": lambda m, s: PBFGS(m.parameters(), s, buffers=m),
    "PBFGS with all": lambda m, s: PBFGS(
        m.named_parameters(), s, line_search_fn="strong_wolfe", residual_lr=0.01, weight_decay=0.1
    ),
    "PBFGS scaled": lambda m, s: PBFGS(
        m.parameters(), s, grad_scaler=torch.amp.GradScaler("cpu", enabled=False)
    ),
    "PSGD": lambda m, s: PSGD(m.parameters(), s),
    "Adam": lambda m, s: InSubspace(m.parameters(), s, torch.optim.Adam, lr=0.1),
    "LBFGS": lambda m, s: InSubspace(m.parameters(), s, torch.optim.LBFGS, lr=0.1),
}


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("kind", ["dense", "implicit", "grouped"])
def test_an_optimizer(kind: str, made: str, way: Copied, tmp_path: Path) -> None:
    model, trajectory = _recorded("device", tmp_path, torch.float32)
    space = _spaces(model, trajectory)[kind]
    optimizer, generator = MAKERS[made](model, space), torch.Generator().manual_seed(1)
    x = torch.randn(16, 6)
    parts = list(x.split(8))

    def noisy() -> Tensor:
        return model(x + 1e-3 * torch.randn(x.shape, generator=generator)).square().mean()

    def usual() -> Tensor:
        optimizer.zero_grad()
        loss = noisy()
        loss.backward()
        return loss

    for closure in (noisy, usual, virtual_batch(lambda part: model(part).square().mean(), parts)):
        optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.resync()
    optimizer.change_subspace(space)
    optimizer.step(noisy)
    other, twin = way((model, optimizer))
    optimizer.zero_grad()
    twin.zero_grad()
    for _ in range(2):
        optimizer.step(lambda: model(x).square().mean())
        twin.step(lambda: other(x).square().mean())
    assert torch.equal(optimizer.theta, twin.theta)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def _in_a_worker(trajectory: Trajectory, queue: Any) -> None:
    queue.put((len(trajectory), float(trajectory.gram.sum()), trajectory.subspace(2).dim))


@pytest.mark.slow
def test_a_spawned_worker_takes_a_trajectory(tmp_path: Path) -> None:
    _, trajectory = _recorded("device", tmp_path, torch.float32)
    _use(trajectory, tmp_path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_in_a_worker, args=(trajectory, queue))
    worker.start()
    assert queue.get(timeout=300) == (6, float(trajectory.gram.sum()), 2)
    worker.join()
