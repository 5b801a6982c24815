"""Trajectories on disk: killed, interrupted, out of space, opened twice, damaged.

DLDR_EVERY_CASE=1 kills a writer 2,000 times and tries a million damaged headers.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dldr_ext
from dldr_ext import Trajectory
from dldr_ext.files import artifacts
from dldr_ext.trajectory.stores import deferred, disk

EVERY_CASE = os.environ.get("DLDR_EVERY_CASE") == "1"
N = 300


def parameters():
    return [torch.zeros(N - 5), torch.zeros(5)]


def record(trajectory, value):
    for p in trajectory.params:
        p.fill_(value)
    return trajectory.record()


def recorded(folder, count, capacity=20):
    trajectory = Trajectory(
        parameters(), capacity, storage="disk", path=folder, anchor=torch.zeros(N)
    )
    for t in range(count):
        record(trajectory, t + 1)
    return trajectory


def values(trajectory):
    """One number for each snapshot, which all its elements must be."""
    rows = trajectory.snapshots[:]
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    expected = rows.double() @ rows.double().T
    assert torch.equal(trajectory.gram, expected)
    return rows[:, 0].tolist()


def test_killed_at_any_moment(tmp_path):
    """SIGKILL at random: what record() returned for is there, what it did not is whole or gone."""
    kills = 2000 if EVERY_CASE else 100
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "crash_writer.py")]
    root = str(Path(dldr_ext.__file__).parents[1])
    output = subprocess.run(
        [*command, str(tmp_path / "folder"), str(kills), "1"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    on_its_way, half_written, total = map(int, output.stdout.split())
    assert on_its_way > kills // 10 and half_written > 0 and total > kills // 20


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type
)
def test_a_snapshot_that_fails_is_not_counted(tmp_path, monkeypatch, step, count, error):
    trajectory = recorded(tmp_path, count)
    before = sorted(os.listdir(tmp_path))

    def fail(*args):
        raise error

    if step == "write":
        monkeypatch.setattr(disk, "stored", fail)
    else:
        monkeypatch.setattr(artifacts.os, step, fail)
    with pytest.raises(type(error)) as caught:
        record(trajectory, 9)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert f"snapshot {count} was not recorded: No space left on device" in str(caught.value)
        assert f"the {count} recorded before are whole" in str(caught.value)
    assert {*os.listdir(tmp_path)} - {*before} <= {disk.HEADER}
    for again in range(2):
        assert len(trajectory) == count + again
        assert values(trajectory)[:count] == [1, 2, 3][:count]
        record(trajectory, count + again + 1)
    trajectory.close()
    assert values(Trajectory.load(tmp_path, parameters())) == list(range(1, count + 3))


def test_a_limit_on_the_size_of_files(tmp_path):
    """The system itself refuses to write on."""
    trajectory = recorded(tmp_path, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="snapshot 3 was not recorded: File too large") as caught:
            record(trajectory, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert str(tmp_path / "000003.safetensors") in str(caught.value)
    assert record(trajectory, 4) == 3 and values(trajectory) == [1, 2, 3, 4]


def test_an_interrupt_between_the_file_and_the_count(tmp_path, monkeypatch):
    """The file is there but was never counted: the next snapshot takes its place."""
    trajectory = recorded(tmp_path, 0)

    def interrupt(**_):
        raise KeyboardInterrupt

    for t in range(3):
        monkeypatch.setattr(trajectory._store, "_count", interrupt)
        with pytest.raises(KeyboardInterrupt):
            record(trajectory, 100)
        monkeypatch.undo()
        trajectory._store.length = t  # as if it had come an instruction earlier
        record(trajectory, t + 1)
        assert values(trajectory) == list(range(1, t + 2))
    trajectory.close()
    assert values(Trajectory.load(tmp_path, parameters())) == [1, 2, 3]


def test_a_first_snapshot_that_failed_is_no_anchor(tmp_path, monkeypatch):
    """Its weights were to be the anchor; then those of the next one are, on disk as well."""
    params = parameters()
    trajectory = Trajectory(params, 5, torch.float32, "disk", tmp_path)
    saved = artifacts.save

    def only_the_header(path, kind, *rest):
        if kind == "snapshot":
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(path, kind, *rest)

    monkeypatch.setattr(artifacts, "save", only_the_header)
    with pytest.raises(OSError, match="snapshot 0 was not recorded"):
        record(trajectory, 5)
    monkeypatch.undo()
    assert trajectory.anchor is None and len(trajectory) == 0
    record(trajectory, 7)
    record(trajectory, 8)
    trajectory.close()
    loaded = Trajectory.load(tmp_path, params)
    assert loaded.anchor.unique().tolist() == [7] and values(loaded) == [0, 1]


def test_snapshots_that_are_not_whole_are_left_out(tmp_path):
    recorded(tmp_path, 6).close()
    files = sorted(tmp_path.glob("0*.safetensors"))
    whole = files[5].read_bytes()
    files[5].write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match=r"left out: .*000005.safetensors: not a whole"):
        trajectory = Trajectory.load(tmp_path, parameters())
    assert values(trajectory) == [1, 2, 3, 4, 5]
    record(trajectory, 7)
    trajectory.close()
    files[5].unlink()
    content = bytearray(files[2].read_bytes())
    content[-1] ^= 1
    files[2].write_bytes(content)
    with pytest.warns(UserWarning, match=r"left out: .*000002.safetensors: corrupt"):
        trajectory = Trajectory.load(tmp_path, parameters())
    assert values(trajectory) == [1, 2, 4, 5, 7]


def test_a_temporary_file_is_reported_and_dropped(tmp_path):
    recorded(tmp_path, 2).close()
    left = tmp_path / ".000002.safetensors.0123abcd.tmp"
    left.write_bytes(b"half")
    with pytest.warns(UserWarning, match="a half-written file was dropped: .000002.safetensors"):
        assert len(Trajectory.load(tmp_path, parameters())) == 2
    assert not left.exists()


def test_snapshots_of_another_trajectory_are_left_out(tmp_path):
    recorded(tmp_path / "one", 2).close()
    recorded(tmp_path / "two", 3).close()
    (tmp_path / "two" / "000002.safetensors").rename(tmp_path / "one" / "000002.safetensors")
    with pytest.warns(UserWarning, match=r"expected a snapshot of this trajectory, found \{'of'"):
        assert values(Trajectory.load(tmp_path / "one", parameters())) == [1, 2]


@pytest.mark.parametrize("block", [1, 32])
def test_a_file_that_shrinks_while_it_is_open(tmp_path, monkeypatch, block):
    """Whether recording has read it already, and has it mapped, or has not."""
    monkeypatch.setattr(deferred, "next_block", lambda *_: block)
    trajectory = recorded(tmp_path, 3)
    os.truncate(tmp_path / "000001.safetensors", 700)
    with pytest.raises(ValueError, match=r"000001.safetensors: changed since .*: 700 bytes, not"):
        trajectory.gram  # noqa: B018
    with pytest.raises(ValueError, match=r"000001.safetensors: changed since"):
        trajectory.subspace(1)


def test_a_folder_is_open_once(tmp_path):
    trajectory = recorded(tmp_path, 2)
    message = f"no other trajectory has open, got {tmp_path}, which this process records to"
    with pytest.raises(ValueError, match=message):
        Trajectory.load(tmp_path, parameters())
    with pytest.raises(ValueError, match=message):
        Trajectory(parameters(), storage="disk", path=tmp_path)
    script = "import sys, torch; from dldr_ext import Trajectory; Trajectory.load(sys.argv[1], [])"
    command = [sys.executable, "-c", script.replace("[]", "[torch.zeros(295), torch.zeros(5)]")]
    root = str(Path(dldr_ext.__file__).parents[1])
    other = subprocess.run([*command, tmp_path], cwd=root, capture_output=True, text=True)
    assert f"{tmp_path}, which process {os.getpid()} records to; close() gives it" in other.stderr
    record(trajectory, 3)
    assert values(trajectory) == [1, 2, 3]
    trajectory.close()
    trajectory.close()
    with pytest.raises(ValueError, match="it was closed, or this process is a fork"):
        record(trajectory, 4)
    assert values(trajectory) == [1, 2, 3], "what is there can still be read"
    again = Trajectory.load(tmp_path, parameters())
    del again, trajectory
    assert len(Trajectory.load(tmp_path, parameters())) == 3, "a dropped one gives it back too"


def test_a_fork_neither_records_nor_holds_the_folder(tmp_path):
    """As a worker of a data loader is one. In a process of its own, without other threads."""
    script = """
import os, sys, torch
from dldr_ext import Trajectory
torch.set_num_threads(1)
trajectory = Trajectory([torch.zeros(9)], storage="disk", path=sys.argv[1])
trajectory.record()
readable, writable = os.pipe()
if os.fork() == 0:
    os.close(writable)
    try:
        trajectory.record()
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
    os.read(readable, 1)  # lives until the parent is done
    os._exit(0)
trajectory.record()
trajectory.close()
print(len(Trajectory.load(sys.argv[1], [torch.zeros(9)])))
os.close(writable)
os.wait()
"""
    root = str(Path(dldr_ext.__file__).parents[1])
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert "this process is a fork of the one that opened it" in output.stderr
    assert output.stdout == "2\n", output.stderr


def test_folders_that_cannot_be_used(tmp_path):
    recorded(tmp_path / "old", 3).close()
    with pytest.raises(ValueError, match=r"expected a new or an empty folder, got .*old, which ho"):
        recorded(tmp_path / "old", 0)
    assert values(Trajectory.load(tmp_path / "old", parameters())) == [1, 2, 3]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"got .*empty without anchor.safetensors"):
        Trajectory.load(tmp_path / "empty", parameters())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        recorded(tmp_path / "file", 0)
    with pytest.raises(OSError, match="file"):
        recorded(tmp_path / "file" / "folder", 0)
    with pytest.raises(ValueError, match=r"params\[0\]: expected shape \(295,\), as in the traj"):
        Trajectory.load(tmp_path / "old", [torch.zeros(N)])
    assert len(Trajectory.load(tmp_path / "old", parameters())) == 3, "the lock was given back"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_may_not_be_written_to_is_read(tmp_path, monkeypatch, code):
    recorded(tmp_path / "old", 4).close()
    (tmp_path / "old" / ".000009.safetensors.x.tmp").write_text("half-written by somebody")
    before = sorted(path.name for path in (tmp_path / "old").iterdir())
    opened = os.open

    def read_only(path, flags, *mode, **where):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *mode, **where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        first, second = (Trajectory.load(tmp_path / "old", parameters()) for _ in range(2))
        assert values(first) == values(second) == [1, 2, 3, 4]
        assert len(first.explained_variance_ratio()) == len(second.subspace(dim=1).basis) == 1
        with pytest.raises(ValueError, match=r"may be written to, got .*old, which was opened to"):
            first.record()
        assert len(first) == 4
        with pytest.raises(OSError, match="lock"):
            recorded(tmp_path / "new", 0)
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == before
    with pytest.warns(UserWarning, match="half-written file was dropped"):
        writer = Trajectory.load(tmp_path / "old", parameters())  # those that read keep no lock
    writer.record()
    assert len(writer) == 5 and len(first) == 4


def test_a_folder_without_permission():
    """As another user, where the tests run as root, whom nothing is forbidden."""
    script = """
import os, sys, torch
from dldr_ext import Trajectory
os.chmod(sys.argv[1], 0o555)
if os.geteuid() == 0:
    os.seteuid(65534)
Trajectory([torch.zeros(3)], storage="disk", path=sys.argv[1])
"""
    root = str(Path(dldr_ext.__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", script, folder]
        output = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert f"PermissionError: [Errno 13] Permission denied: '{folder}" in output.stderr
        assert os.listdir(folder) == []


# Damaged headers, sealed with a checksum that is right, so that they are believed.


def sealed(header, data):
    """A file with this header; its checksum field, if it is still there, says what it must."""
    size = len(header).to_bytes(8, "little")
    at = header.find(b'crc32":"') + len(b'crc32":"')
    if at >= 8 and len(header) >= at + 8:
        header = header[:at] + b"00000000" + header[at + 8 :]
        crc = zlib.crc32(data, zlib.crc32(header))
        header = header[:at] + f"{crc:08x}".encode() + header[at + 8 :]
    return size + header + data


def parts(path):
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NUMBERS = st.sampled_from([-1, 0, 1, 4, 299, 300, 301, 600, 2**31, 2**63 - 1, 2**64, 10**30])


@st.composite
def damaged(draw, header):
    """Some bytes changed, or a field of the JSON, or of the JSON in it, replaced."""
    if draw(st.booleans()):
        content = bytearray(header)
        for _ in range(draw(st.integers(1, 4))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        return bytes(content)
    found = json.loads(header)
    fields = found["__metadata__"]
    ours = json.loads(fields["dldr_ext.metadata"])
    tensors = [entry for name, entry in found.items() if name != "__metadata__"]
    target = draw(st.sampled_from([ours, ours, fields, found, *tensors]))
    if target:
        key = draw(st.sampled_from(sorted(target)))
        if draw(st.booleans()):
            target.pop(key)
        else:
            target[key] = draw(JSON | NUMBERS | st.lists(NUMBERS | st.lists(NUMBERS), max_size=3))
    if fields is found.get("__metadata__"):
        fields["dldr_ext.metadata"] = json.dumps(ours)
    return json.dumps(found, separators=(",", ":")).encode()


@pytest.mark.parametrize("which", ["file", "anchor", "snapshot"])
def test_damaged_headers(tmp_path, which):
    """A ValueError that names the file, or a trajectory that is whole: never anything else."""
    folder = tmp_path / "folder"
    trajectory = recorded(folder, 2, capacity=3)
    trajectory.save(tmp_path / "file")
    trajectory.close()
    names = {"anchor": "anchor.safetensors", "snapshot": "000001.safetensors"}
    path = tmp_path / "file" if which == "file" else folder / names[which]
    loaded = tmp_path / "file" if which == "file" else folder
    header, data = parts(path)
    counts = {"whole": 0, "left out": 0, "refused": 0}

    @settings(
        max_examples=333_334 if EVERY_CASE else 250,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(header))
    @example(header)
    @example(b"")
    @example(b"[" * 100_000)
    @example(header.replace(b'"version":"1"', b'"version":"' + b"1" * 5000 + b'"'))
    @example(header.replace(b"[300]", b"[" + b"9" * 40 + b"]"))
    def attempt(changed):
        path.write_bytes(sealed(changed, data))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = Trajectory.load(loaded, parameters())
            except ValueError as error:
                assert str(path) in str(error) or "params" in str(error), error
                counts["refused"] += 1
                return
        try:
            assert len(found) == 2 - len(caught) and values(found) == [1, 2][: len(found)]
            assert all("a snapshot was left out" in str(warning.message) for warning in caught)
        finally:
            found.close()
        counts["left out" if caught else "whole"] += 1

    attempt()
    if which == "snapshot":
        assert counts["refused"] == 0 and counts["left out"] > 50
    else:
        assert counts["refused"] > 50
    assert counts["whole"] > 0
