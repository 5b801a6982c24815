"""PyTorch Lightning: each optimizer in its loop, the callbacks, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dldr_ext
from dldr_ext import PBFGS, PSGD, InSubspace, Subspace, Trajectory
from dldr_ext.batch_norm import reestimated

pl = pytest.importorskip("lightning.pytorch")
from dldr_ext.integrations.lightning import (  # noqa: E402
    BatchNormCallback,
    Float16,
    SubspaceChecks,
    TrajectoryCallback,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of small data and few workers

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip
MAKE = {
    "pbfgs": lambda m, s, **k: PBFGS(m.named_parameters(), s, buffers=m, **k),
    "psgd": lambda m, s, **k: PSGD(m.named_parameters(), s, lr=0.1, momentum=0.9, **k),
    "adam": lambda m, s, **k: InSubspace(
        m.named_parameters(), s, torch.optim.Adam, lr=0.1, **k
    ),
}  # fmt: skip


def data(batch_size: int = 16, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = 2 + 2 * torch.randn(64, 6, generator=generator)
    labels = (inputs[:, 0] > inputs[:, 1]).long()
    return DataLoader(TensorDataset(inputs, labels), batch_size, shuffle=shuffle)


class Module(pl.LightningModule):
    """Trained by what ``make`` gives, by default SGD."""

    def __init__(self, make: Any = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        self.make, self.means = make, []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", cross_entropy(self(batch[0]), batch[1]))
        self.means.append(self.net[1].running_mean.clone())

    def configure_optimizers(self) -> Any:
        if self.make is not None:
            return self.make(self)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def subspace() -> Subspace:
    """The same whatever a module that is resumed holds by then."""
    generator = torch.Generator().manual_seed(2)
    return Subspace.random(Module().named_parameters(), 6, generator=generator)


def within(name: str, **options: Any) -> Module:
    return Module(lambda m: MAKE[name](m, subspace(), **options))


def fit(module: Any, loader: Any = None, ckpt: Any = None, **options: Any) -> Any:
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, **options})
    trainer.fit(module, loader or data(), ckpt_path=ckpt)
    return trainer


def loss_of(module: Any) -> float:
    inputs, labels = data().dataset.tensors
    module.train()
    with torch.no_grad():
        return float(cross_entropy(module(inputs), labels))


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


# Recording.


def test_records_from_fit_start_to_fit_end() -> None:
    module = Module()
    trajectory = Trajectory(module.named_parameters(), 20, torch.float32)
    callback = TrajectoryCallback(trajectory, every=3)
    fit(module, callbacks=[callback], max_epochs=2)  # 8 steps
    assert len(trajectory) == 2 and callback.recorder is None
    fit(module, callbacks=[callback])  # goes on where it ended: steps 9 and 12
    assert len(trajectory) == 4
    fit(module, callbacks=[TrajectoryCallback(trajectory)])
    assert len(trajectory) == 8
    last = trajectory.anchor + trajectory.snapshots[-1]
    torch.testing.assert_close(last, weights(module))


def test_makes_a_trajectory_that_begins_with_the_first_weights() -> None:
    module = Module()
    first = weights(module)
    callback = TrajectoryCallback(every=2, capacity=5, dtype=torch.float32)
    fit(module, callbacks=[callback], accumulate_grad_batches=2, max_epochs=8)  # 16 steps
    found = callback.trajectory
    assert found.capacity == 5 and len(found) == 5 and torch.equal(found.anchor, first)
    with pytest.raises(TypeError, match=r"no options of a trajectory beside one, got \['dtype'\]"):
        TrajectoryCallback(found, dtype=torch.float32)
    with pytest.raises(TypeError, match="expected a Trajectory or None, got Module"):
        TrajectoryCallback(module)


def test_an_exception_ends_the_recording() -> None:
    class Fails(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            if index == 2:
                raise KeyError("data")
            return super().training_step(batch, index)

    module = Fails()
    callback = TrajectoryCallback(Trajectory(module.parameters(), 20))
    with pytest.raises(KeyError):
        fit(module, callbacks=[callback])
    assert callback.recorder is None and len(callback.trajectory) == 2


def test_the_stride_is_in_checkpoints(tmp_path: Path) -> None:
    path, loader = tmp_path / "last.ckpt", data(22)  # 3 steps an epoch
    callback = TrajectoryCallback(every=1, capacity=3)
    fit(Module(), loader, callbacks=[callback, SaveEpoch(path)], max_epochs=4)
    module = Module()
    resumed = TrajectoryCallback(Trajectory(module.named_parameters(), 8))
    noted = Note(resumed)
    fit(module, loader, path, callbacks=[resumed, noted], max_epochs=4)
    # After step 6 the stride was 4, and step 4 the last that was kept: 8, 12.
    assert noted.seen == [(4, t // 4 - 1) for t in range(7, 13)]


class SaveEpoch(pl.Callback):
    """Saves a checkpoint after the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


class Note(pl.Callback):
    """The stride and the number of snapshots after each step."""

    def __init__(self, callback: TrajectoryCallback) -> None:
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, *args: Any) -> None:
        callback = self.callback
        self.seen.append((callback.recorder.every, len(callback.trajectory)))


def test_the_package_that_the_program_has_imported() -> None:
    pytest.importorskip("pytorch_lightning")
    program = """
import pytorch_lightning, torch
from dldr_ext.integrations.lightning import TrajectoryCallback
class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
callback = TrajectoryCallback()
pytorch_lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
    enable_checkpointing=False).fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 3), 4))
print(len(callback.trajectory))
"""
    root = str(Path(dldr_ext.__file__).parents[1])
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["3"], done.stderr


# Optimizers.


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MAKE)
def test_trains_and_resumes_bit_for_bit(tmp_path: Path, name: str, precision: str) -> None:
    path, whole = tmp_path / "half.ckpt", within(name)
    before = loss_of(whole)
    loader = data(64 if name == "pbfgs" else 16)
    options = {"max_epochs": 4, "precision": precision}
    fit(whole, loader, callbacks=[SubspaceChecks(), SaveEpoch(path)], **options)
    assert loss_of(whole) < 0.9 * before
    half = within(name)
    fit(half, loader, ckpt=path, callbacks=[SubspaceChecks()], **options)
    assert torch.equal(weights(half), weights(whole))


@pytest.mark.parametrize("name", MAKE)
def test_float16(name: str) -> None:
    """On the CPU, where Lightning does not offer it by itself."""
    plugin = Float16("cpu")
    options = {"grad_scaler": plugin.scaler} if name == "pbfgs" else {}
    module = within(name, **options)
    before = loss_of(module)
    fit(module, data(64), plugins=[plugin], callbacks=[SubspaceChecks()], max_epochs=10)
    assert loss_of(module) < 0.9 * before


# Refused at the start.


def schedule(kind: Any, **options: Any) -> Any:
    def make(module: Any) -> Any:
        optimizer = MAKE["pbfgs"](module, subspace())
        scheduler = kind(optimizer, **options)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    return Module(make)


def two(module: Any) -> Any:
    module.automatic_optimization = False
    return [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]


rates = torch.optim.lr_scheduler
other = Module()
REFUSED = {
    "accumulation": (
        lambda: within("pbfgs"), {"accumulate_grad_batches": 2},
        r"PBFGS: expected Trainer\(accumulate_grad_batches=1\).* got 2: make the batches larger",
    ),
    "clipping": (
        lambda: within("pbfgs"), {"gradient_clip_val": 0.5},
        r"PBFGS: expected Trainer\(gradient_clip_val=None\).* got 0.5; PSGD",
    ),
    "cosine": (
        lambda: schedule(rates.CosineAnnealingLR, T_max=4), {},
        "PBFGS: lr: expected a schedule that does not end at 0.* got CosineAnnealingLR: leave",
    ),
    "linear": (
        lambda: schedule(rates.LambdaLR, lr_lambda=lambda t: max(0.0, 1 - t / 4)), {},
        "does not end at 0.* got LambdaLR",
    ),
    "other parameters": (
        lambda: Module(lambda _: MAKE["pbfgs"](other, subspace())), {},
        "PBFGS: params: expected parameters of the module that is fitted, Module, got others",
    ),
    "scaler": (
        lambda: within("pbfgs"), {"plugins": [pl.plugins.MixedPrecision(
            "16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
        r"expected Trainer\(precision='bf16-mixed'\), or plugins=\[Float16\(\)\]",
    ),
    "another module's trajectory": (
        Module, {"callbacks": [TrajectoryCallback(Trajectory(other.named_parameters()))]},
        "expected one of parameters of the module that is fitted, Module, got one of others",
    ),
    "several optimizers": (
        lambda: Module(two), {"callbacks": [TrajectoryCallback()]},
        r"expected one optimizer of Module .* got 2 \(of \['SGD', 'SGD'\]\): give each trajectory",
    ),
    "twice": (
        Module, {"callbacks": [once := TrajectoryCallback(), once]},
        "TrajectoryCallback: expected it once among the callbacks of the trainer, got it twice",
    ),
    "batch norm twice": (
        Module, {"callbacks": [BatchNormCallback(model="net"), BatchNormCallback()]},
        r"one for each layer of batch norm, .* of the submodules \['net', ''\]: keep one",
    ),
    "no forward": (
        lambda: type("Silent", (Module,), {"forward": pl.LightningModule.forward})(),
        {"callbacks": [BatchNormCallback()]},
        r"BatchNormCallback: model: .* got Silent without one: pass the name",
    ),
    "no submodule": (
        Module, {"callbacks": [BatchNormCallback(model="encoder")]},
        r"expected the name of a submodule of Module, one of \['net'\] or below, got 'encoder'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_the_start(case: str) -> None:
    make, options, message = REFUSED[case]
    module = make()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, **{"callbacks": [SubspaceChecks()], **options})
    assert torch.equal(weights(module), before)


def test_schedules_that_end_above_0() -> None:
    module = schedule(rates.CosineAnnealingLR, T_max=4, eta_min=0.1)
    before = loss_of(module)
    fit(module, callbacks=[SubspaceChecks()])
    assert loss_of(module) < before


def test_the_same_trajectory_twice() -> None:
    module = Module()
    trajectory = Trajectory(module.named_parameters())
    with pytest.raises(ValueError, match=r"not attached to, got SGD twice; remove\(\)"):
        fit(module, callbacks=[TrajectoryCallback(trajectory), TrajectoryCallback(trajectory)])


# Batch norm.


@pytest.mark.parametrize("batches", [None, data, data()], ids=["trainer's", "callable", "given"])
def test_validates_with_statistics_of_the_weights(batches: Any) -> None:
    runs = {}
    for callbacks in ([], [BatchNormCallback(batches)]):
        module = within("pbfgs")
        torch.manual_seed(3)
        trainer = pl.Trainer(**QUIET, max_epochs=3, callbacks=callbacks, num_sanity_val_steps=1)
        trainer.fit(module, data(32, shuffle=True), data(64))
        runs[len(callbacks)] = module
    plain, helped = runs[0], runs[1]
    assert torch.equal(weights(plain), weights(helped))
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(helped.named_buffers())[name])
    helped.train()
    with reestimated(helped, data()):
        expected = helped.net[1].running_mean.clone()
    assert len(helped.means) == 4 and torch.allclose(helped.means[-1], expected, atol=1e-5)
    assert (plain.means[-1] - expected).abs().max() > 0.1


def test_layers_that_do_not_train_keep_their_statistics() -> None:
    class Frozen(Module):
        def on_train_start(self) -> None:
            self.net[1].eval()

    module = Frozen()
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[BatchNormCallback(model="net")])
    trainer.fit(module, data(), data(64))
    assert not torch.stack(module.means).any() and not module.net[1].training


# Ranks.


def in_parallel(group: Any, folder: str | None) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    rank = torch.distributed.get_rank()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}

    class Here(LightningEnvironment):
        """The processes are there, and so is their group."""

        creates_processes_externally = True

        def teardown(self) -> None:
            pass

    module = within("pbfgs", process_group=group)
    strategy = DDPStrategy(cluster_environment=Here(), process_group_backend="gloo")
    options = {**QUIET, "strategy": strategy, "devices": 2, "use_distributed_sampler": True}
    storage = {} if folder is None else {"storage": "disk", "path": folder}
    callbacks = [TrajectoryCallback(every=2, capacity=4, **storage), BatchNormCallback()]
    before = loss_of(module)
    trainer = pl.Trainer(**options, max_epochs=3, callbacks=callbacks)
    trainer.fit(module, data(16), data(16))
    return weights(module), len(callbacks[0].trajectory), before, loss_of(module)


def test_on_two_ranks(rank_groups: Any, tmp_path: Path) -> None:
    (one, snapshots, before, after), other_rank = rank_groups(2).all(in_parallel, "world", None)
    assert torch.equal(one, other_rank[0]) and after < 0.9 * before
    assert snapshots == 4
    for given in ((None, None), ("world", str(tmp_path))):
        for error in rank_groups(2).run(in_parallel, *given):
            assert isinstance(error, ValueError) and "process_group='world'" in str(error)
