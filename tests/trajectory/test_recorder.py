"""Trajectories that record as an optimizer steps, and that are thinned out when they are full."""

from __future__ import annotations

import copy
import errno
import os
import signal
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_group import RankGroup
from rank_walks import network
from torch import nn

from dldr_ext import PBFGS, PSGD, Trajectory
from dldr_ext.files import artifacts
from dldr_ext.trajectory.stores import HostStore, StoreSpec, disk

N = 300


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(N - 5)), nn.Parameter(torch.randn(5))]


def sgd(params: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, **options)


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


def new(params: Any, capacity: int, dtype: Any, storage: str, path: Path) -> Trajectory:
    folder = path / "folder" if storage == "disk" else None
    trajectory = Trajectory(params, capacity, dtype, storage, folder)
    if storage == "host":  # of parameters on the CPU it is in the same memory as they are
        spec = StoreSpec(N, capacity, dtype, torch.device("cpu"))
        trajectory._kept = HostStore(spec)
    return trajectory


def check_same(found: Trajectory, expected: Trajectory) -> None:
    assert len(found) == len(expected)
    assert torch.equal(found.snapshots[:], expected.snapshots[:])
    assert torch.equal(found.gram, expected.gram)
    assert torch.equal(found.anchor, expected.anchor)


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize(("capacity", "every", "dtype", "strides"), [
    (2, 1, torch.bfloat16, {1, 2, 4, 8, 16}), (5, 1, torch.float32, {1, 2, 4, 8}),
    (6, 2, torch.int8, {2, 4, 8}), (3, 3, torch.bfloat16, {3, 6, 12}),
])  # fmt: skip
def test_thinned_as_recorded_with_the_wider_stride(
    tmp_path: Path, storage: str, capacity: int, every: int, dtype: Any, strides: set[int]
) -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = new(params, capacity, dtype, storage, tmp_path)
    trajectory.record()
    recorder = trajectory.attach(optimizer, every)
    walk, seen = [[p.detach().clone() for p in params]], {every}
    for t in range(1, 26):
        step(optimizer)
        walk.append([p.detach().clone() for p in params])
        if recorder.every in seen and t < 25:
            continue
        seen.add(recorder.every)
        expected = Trajectory(at := [p.clone() for p in params], 24, dtype)
        for values in walk[: t + 1 : recorder.every]:
            for p, value in zip(at, values, strict=True):
                p.data.copy_(value)
            expected.record()
        check_same(trajectory, expected)
    assert seen == strides
    if storage == "disk":
        trajectory.close()
        check_same(Trajectory.load(tmp_path / "folder", params), expected)


def test_nothing_is_recorded_before_the_first_step_or_after_the_last() -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 20)
    recorder = trajectory.attach(optimizer, every=3)
    assert len(trajectory) == 0
    for count in (0, 0, 1, 1, 1, 2):
        step(optimizer)
        assert len(trajectory) == count
    recorder.remove()
    recorder.remove()
    for _ in range(4):
        step(optimizer)
    assert len(trajectory) == 2
    trajectory.attach(optimizer)
    step(optimizer)
    assert len(trajectory) == 3


def test_stop_and_error() -> None:
    params = parameters()
    optimizer = sgd(params)
    stopping, raising = Trajectory(params, 2), Trajectory(params, 3)
    stopped = stopping.attach(optimizer, on_full="stop")
    raising.attach(optimizer, on_full="error")
    for _ in range(3):
        step(optimizer)
    with pytest.raises(ValueError, match="the trajectory is full: it holds 3 snapshots"):
        step(optimizer)
    assert (len(stopping), len(raising), stopped.every) == (2, 3, 1)
    stopped.remove()


def test_what_is_not_finite_is_left_out() -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 20)
    trajectory.attach(optimizer, every=2)
    message = r"trajectory: params\[0\]: expected finite values, .* such snapshots are left out$"
    for t in range(10):
        good = params[0].detach().clone()
        if t in (3, 7):  # said once
            params[0].data[3] = torch.nan
        with pytest.warns(UserWarning, match=message) if t == 3 else nullcontext():
            step(optimizer)
        if t in (3, 7):
            params[0].data.copy_(good)
    assert len(trajectory) == 3


def test_a_failure_ends_the_recording_and_not_the_training() -> None:
    model = nn.Linear(3, 2)
    optimizer = sgd(model.parameters())
    trajectory, strict = (Trajectory(model.named_parameters(), 20) for _ in range(2))
    recorder = trajectory.attach(optimizer)
    step(optimizer)
    model.bias = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match=r"replaced .* \(bias\).*; recording ends here, training"):
        step(optimizer)
    step(optimizer)
    assert len(trajectory) == 1
    recorder.remove()
    with pytest.raises(ValueError, match="replaced"):
        strict.attach(optimizer)


def test_bad_arguments(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(4, 2)
    optimizer = sgd(model.parameters())
    trajectory = Trajectory(model.named_parameters(), 20)
    with pytest.raises(
        TypeError, match="attach: optimizer: expected a torch optimizer, got Linear"
    ):
        trajectory.attach(model)
    with pytest.raises(ValueError, match="attach: every: expected at least 1 step, got 0"):
        trajectory.attach(optimizer, every=0)
    with pytest.raises(ValueError, match=r"on_full: expected one of \['thin', .*, got 'wrap'"):
        trajectory.attach(optimizer, on_full="wrap")
    with pytest.raises(
        ValueError, match=r"on_full='thin': expected a capacity of at least 2 .* 1$"
    ):
        Trajectory(model.parameters(), 1).attach(optimizer)
    with pytest.raises(
        ValueError, match=r"of the trajectory \(weight, \.\.\.\), got SGD over 2 others; attach the"
    ):
        trajectory.attach(sgd(other.parameters()))
    with pytest.raises(ValueError, match=r"of the trajectory \(\(2, 3\), \.\.\.\), got SGD over 2"):
        Trajectory([p.data for p in model.parameters()]).attach(sgd(other.parameters()))
    recorder = trajectory.attach(optimizer)
    with pytest.raises(ValueError, match=r"got SGD twice; remove\(\) of the first handle"):
        trajectory.attach(optimizer, every=2)
    recorder.remove()
    trajectory.attach(optimizer).remove()
    folder = Trajectory(model.parameters(), storage="disk", path=tmp_path)
    folder.close()
    with pytest.raises(ValueError, match="path: expected a folder that this process has open"):
        folder.attach(optimizer)
    for _ in range(3):
        step(optimizer)
        trajectory.record()
    trajectory.into_subspace(1)
    with pytest.raises(ValueError, match="the trajectory is consumed"):
        trajectory.attach(optimizer)


class Wrapper:
    """As accelerate's and Lightning's are."""

    def __init__(self, optimizer: Any, name: str) -> None:
        setattr(self, name, optimizer)
        self._inner, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:
        self._inner.step()


@pytest.mark.parametrize("name", ["optimizer", "_optimizer"])
def test_wrapped_optimizers(name: str) -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 20)
    trajectory.attach(Wrapper(Wrapper(optimizer, name), name))
    step(optimizer)
    assert len(trajectory) == 1
    with pytest.raises(ValueError, match="got SGD twice"):
        trajectory.attach(optimizer)


class Lookahead(torch.optim.Optimizer):
    """As timm's: steps on after the one inside, and has not called torch's constructor."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:  # type: ignore[override]
        self.optimizer.step()


class Sam(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = sgd(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def second_step(self) -> None:
        self.base_optimizer.step()


class Centred(torch.optim.SGD):
    """A step of its own, after that of an optimizer inside."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.optimizer = sgd(self.param_groups)
        self.optimizer.param_groups = self.param_groups

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.optimizer.step()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.mean())


def test_optimizers_around_others() -> None:
    """Lookahead would be recorded before its own step or not at all; SAM's halves are no step."""
    params = parameters()
    trajectory = Trajectory(params, 20, torch.float32)
    with pytest.raises(ValueError, match=r"got Lookahead, which wraps .*: call trajectory.record"):
        trajectory.attach(Lookahead(sgd(params)))
    sam, centred = Sam(params), Centred(params)
    for optimizer, call in ((sam, sam.second_step), (centred, centred.step)):
        recorder = trajectory.attach(optimizer)
        for p in params:
            p.grad = torch.randn_like(p)
        call()
        recorder.remove()
    assert len(trajectory) == 2
    assert trajectory.anchor is not None
    last = trajectory.anchor + trajectory.snapshots[1]
    torch.testing.assert_close(last, torch.cat([p.detach() for p in params]))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool) -> None:
    params = parameters()
    optimizer = torch.optim.Adam(params, lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trajectory = Trajectory(params, 20)
    recorder = trajectory.attach(optimizer, every=2)
    lengths = []
    for bad in (0, 1, 1, 0, 1, 0, 0):
        scaler.scale(torch.ones(1))  # which makes the scale
        for p in params:
            p.grad = torch.full_like(p, torch.inf if bad else 1.0)
        scaler.step(optimizer)
        scaler.update()
        lengths.append(len(trajectory))
    assert lengths == [0, 0, 0, 1, 1, 1, 2]
    assert recorder.state_dict() == {"every": 2, "steps": 0}


def test_closures_and_optimizers_in_a_subspace() -> None:
    model, inputs = nn.Linear(6, 1), torch.randn(32, 6)
    first = Trajectory(model.named_parameters(), 20, torch.float32)

    def run(optimizer: Any, steps: int = 4) -> int:
        trajectory = Trajectory(model.named_parameters(), 20, torch.float32)
        trajectory.attach(optimizer, every=2)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(trajectory.anchor + trajectory.snapshots[-1], flat)
        return len(trajectory)

    first.attach(lbfgs := torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2))
    assert run(lbfgs) == 2 and len(first) == 4
    space = first.subspace(dim=2)
    assert run(PBFGS(model.named_parameters(), space)) == 2
    assert run(PSGD(model.named_parameters(), space, lr=0.01)) == 2


@pytest.mark.filterwarnings("ignore")  # in torch
def test_compiled_steps() -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 20, torch.float32)
    trajectory.attach(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        compiled()
    assert len(trajectory) == 3
    assert torch.allclose(trajectory.snapshots[2], torch.full((N,), -0.1 * (1.9 + 2.71)))


def test_rows_that_an_implicit_subspace_reads_stay() -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 4, torch.int8)
    trajectory.attach(optimizer)
    for _ in range(4):
        step(optimizer)
    implicit = trajectory.subspace(dim=2, materialize=False)
    before = implicit.reconstruct(torch.ones(2))
    expected = trajectory.snapshots[:][::2]
    step(optimizer)
    assert len(trajectory) == 3 and torch.equal(trajectory.snapshots[:2], expected)
    assert torch.equal(implicit.reconstruct(torch.ones(2)), before)


def test_copies_of_an_optimizer_do_not_record() -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 20)
    trajectory.attach(optimizer)
    step(copy.deepcopy(optimizer))
    step(optimizer)
    assert len(trajectory) == 1


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_ctrl_c_while_thinning(tmp_path: Path, monkeypatch: Any, storage: str) -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = new(params, 4, torch.float32, storage, tmp_path)
    recorder = trajectory.attach(optimizer)
    for _ in range(4):
        step(optimizer)
    expected, gram = trajectory.snapshots[:][::2].clone(), trajectory.gram[::2, ::2]
    original = trajectory._store._drop_odd_rows

    def interrupted(in_place: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        original(in_place)

    monkeypatch.setattr(trajectory._store, "_drop_odd_rows", interrupted)
    # In the background of a shell Python takes no notice of the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            step(optimizer)
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.equal(trajectory.snapshots[:], expected)
    assert torch.equal(trajectory.gram, gram)
    assert recorder.every == 2


# On the disk: a crash at any point leaves the full trajectory or the thinned one.


def full(folder: Path, capacity: int = 6, rounds: int = 0) -> Trajectory:
    """Snapshot t has weights t + 1, those of the rounds before are thinned out already."""
    trajectory = Trajectory(
        [torch.zeros(N)], capacity, torch.float32, "disk", folder, anchor=torch.zeros(N)
    )
    at = 0
    for turn in range(rounds + 1):
        if turn:
            trajectory.thin()
        while len(trajectory) < capacity:
            at += 1
            trajectory.params[0].fill_(at)
            trajectory.record()
    return trajectory


def values(trajectory: Trajectory) -> list[float]:
    rows = trajectory.snapshots[:]
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(trajectory.gram, rows.double() @ rows.double().T)
    return rows[:, 0].tolist()


@pytest.mark.parametrize("capacity", [5, 6])
@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize(
    ("step", "count"),
    [("write", 0), ("fsync", 0), ("replace", 0), ("fsync", 1)]
    + [("unlink", count) for count in range(3)],
)
def test_killed_while_thinning(
    tmp_path: Path, monkeypatch: Any, capacity: int, rounds: int, step: str, count: int
) -> None:
    trajectory = full(tmp_path, capacity, rounds)
    before = values(trajectory)
    owner, name = {
        "write": (artifacts, "_write"), "unlink": (Path, "unlink")
    }.get(step, (artifacts.os, step))  # fmt: skip
    original, calls = getattr(owner, name), []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > count:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, fail)
    with suppress(Killed):
        trajectory.thin()
    monkeypatch.undo()
    header_is_old = step in ("write", "replace") or (step, count) == ("fsync", 0)
    left = before if header_is_old else before[::2]
    trajectory.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a half-written file
        loaded = Trajectory.load(tmp_path, [torch.zeros(N)])
    assert values(loaded) == left
    files = {path.name for path in tmp_path.glob("*.safetensors")} - {disk.HEADER}
    assert len(files) == len(left) and not list(tmp_path.glob(".*"))
    if len(left) < capacity:
        loaded.params[0].fill_(99)
        loaded.record()
        left = [*left, 99]
    loaded.close()
    assert values(Trajectory.load(tmp_path, [torch.zeros(N)])) == left


class Killed(BaseException):
    pass


def test_files_that_cannot_be_removed_do_not_count(tmp_path: Path, monkeypatch: Any) -> None:
    trajectory = full(tmp_path)

    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    trajectory.thin()
    assert values(trajectory) == [1, 3, 5] and len(list(tmp_path.glob("0*"))) == 6
    monkeypatch.undo()
    trajectory.close()
    loaded = Trajectory.load(tmp_path, [torch.zeros(N)])
    assert values(loaded) == [1, 3, 5] and len(list(tmp_path.glob("0*"))) == 3
    loaded.params[0].fill_(7)
    loaded.record()
    assert values(loaded) == [1, 3, 5, 7] and (tmp_path / "000006.safetensors").exists()


def test_a_full_disk_ends_the_recording(tmp_path: Path, monkeypatch: Any) -> None:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 4, storage="disk", path=tmp_path)
    trajectory.attach(optimizer)
    for _ in range(4):
        step(optimizer)

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", fail)
    message = r"the 4 snapshots were not thinned out: No space .* whole.*; recording ends here"
    with pytest.warns(UserWarning, match=message):
        step(optimizer)
    step(optimizer)
    monkeypatch.undo()
    assert len(trajectory) == 4 and trajectory.gram.shape == (4, 4)


# Over ranks.


def recorded(mode: str, storage: str, path: Any, fails: bool = False) -> Any:
    model = network(mode)
    group = "world" if mode == "whole" else model
    options = {"dtype": torch.float32, "process_group": group}
    named = list(model.named_parameters())
    trajectory = Trajectory(named, 5, storage=storage, path=path, **options)
    every = Trajectory(named, 30, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    every.record()
    trajectory.record()
    recorder = trajectory.attach(optimizer)
    every.attach(optimizer)
    if fails and torch.distributed.get_rank() == 1:

        def fail(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        trajectory._store.local._write_header = fail
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(14):
            optimizer.zero_grad()
            inputs = torch.randn(4, next(iter(model.parameters())).shape[1])
            model(inputs).square().mean().backward()
            if mode == "whole":
                for p in model.parameters():
                    torch.distributed.all_reduce(p.grad)
            optimizer.step()
    stride = recorder.every
    kept = slice(None, None, stride)
    rows = every.snapshots[:][kept][: len(trajectory)]
    return {
        "stride": stride,
        "length": len(trajectory),
        "rows": torch.equal(trajectory.snapshots[:], rows),
        "gram": torch.equal(trajectory.gram, every.gram[kept, kept][: len(rows), : len(rows)]),
        "warned": [str(one.message) for one in caught if "trajectory:" in str(one.message)],
    }


@pytest.mark.parametrize("mode", ["whole", "sharded"])
@pytest.mark.parametrize("storage", ["device", "disk"])
def test_over_ranks(rank_groups: Any, mode: str, storage: str, tmp_path: Path) -> None:
    ranks: RankGroup = rank_groups(2)
    path = tmp_path / "run" if storage == "disk" else None
    same = {"stride": 4, "length": 4, "rows": True, "gram": True, "warned": []}
    assert ranks.all(recorded, mode, storage, path) == [same, same]


def with_nan(rank: int) -> Any:
    params = parameters()
    optimizer = sgd(params)
    trajectory = Trajectory(params, 20, process_group="world")
    trajectory.attach(optimizer)
    step(optimizer)
    if torch.distributed.get_rank() == rank:
        params[0].data[290] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(optimizer)
    params[0].data[290] = 0.0
    step(optimizer)
    return len(trajectory), [str(one.message) for one in caught if "trajectory:" in str(one)]


def test_a_rank_that_is_not_finite(rank_groups: Any) -> None:
    for length, (message,) in rank_groups(2).all(with_nan, 1):
        assert length == 2 and "record: rank 1: params[0]" in message
        assert message.endswith("such snapshots are left out")


def test_a_rank_that_cannot_thin(rank_groups: Any, tmp_path: Path) -> None:
    found = rank_groups(2).all(recorded, "whole", "disk", tmp_path / "run", True)
    for one in found:
        assert (one["stride"], one["length"], one["rows"]) == (1, 5, True)
        assert len(one["warned"]) == 1 and "thin: rank 1: [Errno 28]" in one["warned"][0]
