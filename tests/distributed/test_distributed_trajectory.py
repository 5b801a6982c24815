"""Trajectories that several ranks record together, each its own columns."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import RankGroup
from rank_walks import STEPS, network, walk
from safetensors.torch import load_file, save_file

from dldr_ext import LocalSubspace, ShardedSubspace, Trajectory
from dldr_ext.checkpoints.reader import CheckpointReader
from dldr_ext.collectives.dtensors import local_columns
from dldr_ext.files import artifacts

D = 3


def recorded(mode: str, tier: str, path: Any, small: bool = False) -> Trajectory:
    model = network(mode, small)
    group = None if mode == "alone" else model if mode != "whole" else "world"
    trajectory = Trajectory(
        model.named_parameters(), 9, torch.float32, tier, path, process_group=group
    )
    for t in walk(model):
        assert trajectory.record() == t
    return trajectory


def alone(small: bool = False) -> Trajectory:
    model = network(small=small)
    trajectory = Trajectory(model.named_parameters(), 9, torch.float32)
    for _ in walk(model):
        trajectory.record()
    return trajectory


def whole_basis(subspace: Any, params: Any) -> torch.Tensor:
    if isinstance(subspace, ShardedSubspace):
        return subspace.whole().basis
    assert isinstance(subspace, LocalSubspace)
    full = torch.zeros(subspace.dim, sum(p.numel() for p in params))
    if subspace.local is not None:
        full[:, local_columns(params)] = subspace.local.basis / subspace.replicas
    dist.all_reduce(full)
    return full


def analysed(mode: str, tier: str, path: Any, small: bool) -> dict[str, Any]:
    trajectory = recorded(mode, tier, path, small)
    subspace = trajectory.subspace(D)
    assert len(trajectory) == STEPS and subspace.dim == D
    held = trajectory.snapshots.shape
    assert (held == (STEPS, trajectory._store.numel) and "963" in repr(trajectory)) or small
    return {
        "gram": trajectory.gram,
        "ratio": trajectory.explained_variance_ratio(),
        "basis": whole_basis(subspace, trajectory.params),
        "values": subspace.singular_values,
        "mean": subspace.mean,
        "held": held[1],
        "report": subspace.report(),
    }


@pytest.mark.parametrize("mode", ["whole", "sharded", "hybrid"])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("small", [False, True])
def test_as_one_process(ranks: RankGroup, mode: str, tier: str, small: bool, tmp_path: Path):
    path = tmp_path / "run" if tier == "disk" else None
    found = ranks.all(analysed, mode, tier, path, small)
    expected = alone(small)
    subspace = expected.subspace(D)
    n = expected.numel
    assert sum(one.pop("held") for one in found) == n * (2 if mode == "hybrid" else 1)
    for one in found:
        assert one.pop("report") == subspace.report()
        assert all(torch.equal(one[key], found[0][key]) for key in one)  # to the bit
    assert torch.equal(found[0]["gram"], found[0]["gram"].T)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found[0]["gram"], expected.gram, **close)
    torch.testing.assert_close(found[0]["ratio"], expected.explained_variance_ratio(), **close)
    torch.testing.assert_close(found[0]["basis"], subspace.basis, **close)
    torch.testing.assert_close(found[0]["values"], subspace.singular_values, **close)
    torch.testing.assert_close(found[0]["mean"], subspace.mean, **close)


def in_eight_bits(mode: str, tier: str, path: Any) -> list[torch.Tensor]:
    model = network(mode)
    group = model if mode != "whole" else "world"
    trajectory = Trajectory(model.parameters(), 9, torch.int8, tier, path, process_group=group)
    for _ in walk(model):
        trajectory.record()
    with pytest.raises(ValueError, match="expected snapshots of 16 bits or more, got int8"):
        trajectory.save(path or "nowhere")
    basis = whole_basis(trajectory.subspace(D, dtype=torch.float32), trajectory.params)
    held = trajectory.subspace(D)
    assert held.local.basis.dtype == torch.int8 and held.local.scale is not None
    trajectory.close()
    return [trajectory.gram, basis]


@pytest.mark.parametrize(
    "mode, tier", [("whole", "device"), ("whole", "disk"), ("sharded", "host")]
)
def test_snapshots_in_eight_bits(rank_groups: Any, mode: str, tier: str, tmp_path: Path) -> None:
    model = network()
    one = Trajectory(model.parameters(), 9, torch.int8)
    for _ in walk(model):
        one.record()
    found = rank_groups(2).all(
        in_eight_bits, mode, tier, tmp_path / "run" if tier == "disk" else None
    )
    basis = one.subspace(D, dtype=torch.float32).basis
    # Blocks of whole weights are those of one process; local shards have others.
    close = {"rtol": 1e-5, "atol": 1e-5} if mode == "whole" else {"rtol": 0.02, "atol": 0.02}
    for gram, other in found:
        assert torch.equal(gram, found[0][0]) and torch.equal(other, found[0][1])
        torch.testing.assert_close(gram, one.gram, **close)
        torch.testing.assert_close(other, basis, **close)


def anchored(mode: str) -> torch.Tensor:
    model = network(mode)
    anchor = [p.detach().clone() for p in model.parameters()]
    group = model if mode != "whole" else "world"
    options = {"anchor": anchor, "process_group": group}
    trajectory = Trajectory(model.parameters(), 9, torch.float32, **options)
    for _ in walk(model):
        trajectory.record()
    with pytest.raises(ValueError, match="anchor: expected finite values"):
        bad = [p * float("nan") for p in anchor]
        Trajectory(model.parameters(), process_group=group, anchor=bad)
    with pytest.raises(ValueError, match="a GroupedSubspace"):
        trajectory.grouped_subspace([2, 2])
    return trajectory.gram


@pytest.mark.parametrize("mode", ["whole", "sharded"])
def test_an_anchor_is_cut_like_the_weights(rank_groups: Any, mode: str) -> None:
    model = network()
    anchor = [p.detach().clone() for p in model.parameters()]
    one = Trajectory(model.parameters(), 9, torch.float32, anchor=anchor)
    for _ in walk(model):
        one.record()
    for gram in rank_groups(2).all(anchored, mode):
        torch.testing.assert_close(gram, one.gram, rtol=1e-5, atol=1e-5)


def on_the_wire() -> list[int]:
    """Numbers of each collective of a record."""
    model = network()
    trajectory = Trajectory(model.parameters(), 9, process_group="world")
    sent: list[list[int]] = []
    before = dist.all_gather
    try:
        for _ in walk(model):
            sent.append([])
            dist.all_gather = lambda out, t, **k: (sent[-1].append(t.numel()), before(out, t, **k))
            trajectory.record()
    finally:
        dist.all_gather = before
    return sent


def test_a_record_sends_its_row_of_the_gram_matrix(ranks: RankGroup) -> None:
    for sent in ranks.all(on_the_wire):
        assert sent == [[3, t + 1] for t in range(STEPS)]


def refused(what: str, path: Any) -> list[str]:
    """What goes wrong on rank 1 alone, and that nothing was recorded then."""
    odd = dist.get_rank() == 1
    model = network("sharded" if what == "sharded nan" else "whole")
    tier = "disk" if what == "disk full" else "device"
    group = model if what == "sharded nan" else "world"
    trajectory = Trajectory(model.parameters(), 3, torch.float32, tier, path, process_group=group)
    steps = walk(model, last=5)
    next(steps)
    if what != "first nan":
        trajectory.record()
        next(steps)
    kept, before = [p.detach().clone() for p in model.parameters()], artifacts.save
    with torch.no_grad():
        if "nan" in what and odd:
            for p in model.parameters():
                p.fill_(float("nan"))
    if what == "other weights" and odd:
        next(steps)
    if what == "full":
        trajectory.record()
        trajectory.record()
    if what == "disk full" and odd:

        def save(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        artifacts.save = save
    length, gram = len(trajectory), trajectory.gram
    try:
        with pytest.raises((OSError, ValueError)) as error:
            trajectory.record()
    finally:
        artifacts.save = before
    assert len(trajectory) == length and torch.equal(trajectory.gram, gram)
    if what != "full":
        for p, q in zip(model.parameters(), kept, strict=True):
            with torch.no_grad():
                p.copy_(q)
        assert trajectory.record() == length
        files = list(Path(path or ".").rglob("0*.safetensors"))
        assert path is None or len(files) == dist.get_world_size() * len(trajectory)
        assert len(trajectory.gram) == length + 1
    trajectory.close()
    return [type(error.value).__name__, str(error.value)]


@pytest.mark.parametrize(
    "what, kind, message",
    [
        ("nan", "ValueError", "record: rank 1: params[0]"),
        ("first nan", "ValueError", "record: rank 1: params[0]"),
        ("sharded nan", "ValueError", "record: rank 1: params[0]"),
        ("other weights", "ValueError", "expected the same weights on every rank"),
        ("full", "ValueError", "record: rank 0: the trajectory is full: it holds 3 snapshots"),
        ("disk full", "OSError", "record: rank 1: [Errno 28] snapshot 1 was not recorded"),
    ],
)
def test_errors_of_one_rank(
    rank_groups: Any, what: str, kind: str, message: str, tmp_path: Path
) -> None:
    found = rank_groups(2).all(refused, what, tmp_path / "run" if what == "disk full" else None)
    for name, text in found:
        assert name == kind and message in text


def disagreeing(what: str, path: Any) -> str:
    odd, model = dist.get_rank() == 1, network()
    options: dict[str, Any] = {"capacity": 4, "storage": "disk", "path": path}
    if odd and what == "capacity":
        options["capacity"] = 5
    if odd and what == "storage":
        options |= {"storage": "device", "path": None}
    params = list(model.parameters())
    if odd and what == "params":
        params = params[:-1]
    with pytest.raises(ValueError) as error:
        Trajectory(params, process_group="world", **options)
    return str(error.value)


@pytest.mark.parametrize(
    "what, message",
    [
        ("capacity", "capacity: expected 4, as on rank 0, got 5 on rank 1"),
        ("storage", "storage: expected disk, as on rank 0, got device on rank 1"),
        ("params", "shapes: expected [(40, 20), (40,), (3, 40), (3,)], as on rank 0, got"),
    ],
)
def test_ranks_that_differ_are_refused(
    rank_groups: Any, what: str, message: str, tmp_path: Path
) -> None:
    for text in rank_groups(2).all(disagreeing, what, tmp_path / "run"):
        assert message in text
    assert not list(tmp_path.rglob("*.safetensors"))


def gone_on(path: Path, mode: str) -> list[torch.Tensor]:
    """Interrupted after four snapshots; rank 1 then lost one, and was ahead by another."""
    model = network(mode)
    group = model if mode != "whole" else "world"
    first = Trajectory(model.parameters(), 9, torch.float32, "disk", path, process_group=group)
    for _ in walk(model, last=4):
        first.record()
    first.close()
    dist.barrier()
    folder = path / f"rank-00002-of-{dist.get_world_size():05}"
    if dist.get_rank() == 1:
        (folder / "000001.safetensors").write_bytes(b"nothing")
    dist.barrier()
    with pytest.warns(UserWarning, match="left out") if dist.get_rank() == 1 else nullcontext():
        again = Trajectory.load(path, model.parameters(), process_group=group)
    assert len(again) == 3
    for _ in walk(model, first=4):
        again.record()
    again.close()
    third = (
        Trajectory.load(path, model.parameters(), process_group=group) if mode != "whole" else again
    )
    third.save(path.with_suffix(".safetensors"))
    third.close()
    return [third.gram]


@pytest.mark.filterwarnings("ignore:a snapshot was left out")
@pytest.mark.parametrize("mode", ["whole", "sharded"])
def test_a_folder_goes_on_with_what_all_ranks_have(
    ranks: RankGroup, mode: str, tmp_path: Path
) -> None:
    found = ranks.all(gone_on, tmp_path / "run", mode)
    model, kept = network(), []
    whole = Trajectory(model.parameters(), 9, torch.float32)
    for t in walk(model):
        if t != 1:
            whole.record()
            kept.append(t)
    assert all(torch.equal(one[0], found[0][0]) for one in found)
    torch.testing.assert_close(found[0][0], whole.gram, rtol=1e-6, atol=1e-6)
    # One process loads what ranks saved; other ranks do not load their folders.
    loaded = Trajectory.load(tmp_path / "run.safetensors", model.parameters())
    assert torch.equal(loaded.snapshots, whole.snapshots)
    assert torch.equal(loaded.gram, found[0][0])
    with pytest.raises(ValueError, match="expected the folder of one process"):
        Trajectory.load(tmp_path / "run", model.parameters())


def loads(path: Path, mode: str) -> str:
    model = network(mode)
    group = model if mode != "whole" else "world"
    try:
        Trajectory.load(path, model.parameters(), process_group=group)
    except ValueError as error:
        return str(error)
    return ""


def test_a_folder_of_other_ranks_is_refused(rank_groups: Any, tmp_path: Path) -> None:
    rank_groups(4).all(gone_on, tmp_path / "run", "whole")
    for text in rank_groups(2).all(loads, tmp_path / "run", "whole"):
        assert "expected a folder of 2 ranks, as there are" in text
        assert "with rank-00001-of-00004" in text
    for text in rank_groups(4).all(loads, tmp_path / "run", "sharded"):
        assert "rank 0: params[0]: expected shape" in text
    for text in rank_groups(4).all(loads, tmp_path, "whole"):
        assert "without one for each rank" in text


def continued(path: Path, mode: str) -> list[Any]:
    model = network(mode)
    group = model if mode != "whole" else "world"
    trajectory = Trajectory.load(path, model.named_parameters(), process_group=group)
    trajectory.record()
    assert trajectory.names == [name for name, _ in model.named_parameters()]
    return [
        trajectory.gram,
        len(trajectory),
        whole_basis(trajectory.subspace(D), trajectory.params),
    ]


@pytest.mark.parametrize("mode", ["whole", "sharded"])
def test_a_file_of_one_process_loads_on_ranks(ranks: RankGroup, mode: str, tmp_path: Path) -> None:
    one, model = alone(), network()
    one.save(tmp_path / "one.safetensors")
    with torch.no_grad():
        for p, q in zip(one.params, model.parameters(), strict=True):
            p.copy_(q)
    one.record()
    for gram, length, basis in ranks.all(continued, tmp_path / "one.safetensors", mode):
        assert length == STEPS + 1 and torch.equal(gram[:STEPS, :STEPS], one.gram[:STEPS, :STEPS])
        torch.testing.assert_close(gram, one.gram, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(basis, one.subspace(D).basis, rtol=1e-5, atol=1e-5)
    damaged = bytearray((tmp_path / "one.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "one.safetensors").write_bytes(damaged)
    for text in ranks.all(loads, tmp_path / "one.safetensors", mode):
        assert "load: rank 0:" in text and "corrupt" in text


def read_in_parts(folder: Path, mode: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """From checkpoints, and how many numbers this rank read."""
    model = network(mode) if kind != "meta" else network().to("meta")
    group, count, before = (model if mode != "whole" else "world"), [0], CheckpointReader.read
    CheckpointReader.read = lambda self, entry, begin, out: (  # type: ignore[method-assign]
        count.__setitem__(0, count[0] + len(out)) or before(self, entry, begin, out)
    )
    try:
        trajectory = Trajectory.from_checkpoints(
            folder, model, dtype=torch.float32, process_group=group, **options
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        CheckpointReader.read = before  # type: ignore[method-assign]
    found = {
        "gram": trajectory.gram,
        "basis": whole_basis(trajectory.subspace(D), trajectory.params),
        "read": count[0],
        "length": len(trajectory),
    }
    trajectory.close()
    return found


def written(folder: Path) -> list[Path]:
    folder.mkdir()
    model, paths = network(), []
    for t in walk(model):
        paths.append(folder / f"step{t}.safetensors")
        save_file({k: v.clone() for k, v in model.state_dict().items()}, paths[-1])
    return paths


@pytest.mark.parametrize(
    "mode, kind", [("whole", "meta"), ("whole", "disk"), ("sharded", "disk"), ("sharded", "device")]
)
def test_checkpoints_are_read_once_by_all_together(
    ranks: RankGroup, mode: str, kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    written(folder)
    options: dict[str, Any] = {}
    if kind == "disk":
        options = {"storage": "disk", "path": tmp_path / "recorded", "resume": True}
    found = ranks.all(read_in_parts, folder, mode, kind, options)
    one = Trajectory.from_checkpoints(folder, network(), dtype=torch.float32)
    # The first one for the anchor, then for its row.
    assert sum(r["read"] for r in found) == 963 * (STEPS + 1)
    for r in found:
        assert torch.equal(r["gram"], found[0]["gram"])
        torch.testing.assert_close(r["gram"], one.gram, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(r["basis"], one.subspace(D).basis, rtol=1e-5, atol=1e-5)
    if kind == "disk":  # nothing is left to do
        again = ranks.all(read_in_parts, folder, mode, kind, options)
        assert all(torch.equal(r["gram"], found[0]["gram"]) for r in again)
        assert sum(r["read"] for r in again) == 963 * 2  # the first and the last, to compare
        for r in ranks.all(read_in_parts, folder, mode, kind, options | {"capacity": 8}):
            assert "expected the folder of a trajectory" in r["error"]


def test_a_bad_checkpoint_is_left_out_on_all_ranks(ranks: RankGroup, tmp_path: Path) -> None:
    path = written(tmp_path / "run")[2]
    tensors = load_file(path)
    tensors["2.bias"][-1] = float("nan")  # only the last rank reads it
    save_file(tensors, path)
    for r in ranks.all(read_in_parts, tmp_path / "run", "whole", "", {}):
        assert r["error"].startswith("CheckpointError: checkpoints[2]: ")
        assert "2.bias: expected finite values" in r["error"]
    for r in ranks.all(read_in_parts, tmp_path / "run", "whole", "", {"skip_bad": True}):
        assert r["length"] == STEPS - 1 and r["gram"].shape == (STEPS - 1, STEPS - 1)
    path.write_bytes(b"nothing")
    for r in ranks.all(read_in_parts, tmp_path / "run", "whole", "", {}):
        assert "error" in r and "step2" in r["error"]
