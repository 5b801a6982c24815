"""Every place that snapshots can be kept in gives the same numbers, to the bit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dldr_ext
from dldr_ext import Trajectory, layer_groups, ops, uniform_soup
from dldr_ext.tensors.matrices import StoredRows
from dldr_ext.trajectory.stores import HostStore, StoreSpec, base, block_gram, deferred, disk
from dldr_ext.trajectory.stores.block_gram import Seconds
from dldr_ext.trajectory.stores.deferred import next_block

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TIERS = ["host", "disk", "staged"]
# One tile, several, and more than 1,024: chunks of two tiles.
SIZES = [117, 20_011, 4_200_001]


class Staged(HostStore):
    """What parameters on CUDA have: rows on the host, multiplied row by row on the device."""

    def _complete(self):
        while self._multiplied < self.length:
            index, end = self._multiplied, min(self._multiplied + 3, self.length)
            block_gram.multiply_by_rows(self.snapshots(), self._gram, index, end)
            self._multiplied = end


def parameters(n, dtype=torch.float32):
    image = torch.randn(2, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    return [nn.Parameter(image), nn.Parameter(torch.randn(n - 54, dtype=dtype))]


def make(tier, params, folder, dtype, capacity=9):
    if tier == "staged":
        result = Trajectory(params, capacity, dtype)
        result._kept = Staged(StoreSpec(result.numel, capacity, dtype, result.device))
        return result
    path = folder / "rows" if tier == "disk" else None
    return Trajectory(params, capacity, dtype, tier, path)


def recorded(tier, folder, n=20_011, dtype=torch.bfloat16, count=7, often=False):
    """A trajectory on the device and one elsewhere, of the same walk."""
    params = parameters(n, torch.float64 if dtype == torch.float64 else torch.float32)
    near, far = Trajectory(params, 9, dtype), make(tier, params, folder, dtype)
    for t in range(count):
        assert near.record() == far.record() == t
        if often:
            assert torch.equal(near.gram, far.gram)
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn_like(p), alpha=0.1 / (t + 1))
    return near, far


def rows_of(trajectory):
    return trajectory.snapshots[:]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_the_same_numbers(tier, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "PIECE", 1 << 12)  # several pieces a row
    near, far = recorded(tier, tmp_path, dtype=dtype)
    assert torch.equal(near.anchor, far.anchor)
    assert torch.equal(rows_of(near), rows_of(far))
    assert torch.equal(near.gram, far.gram)
    assert torch.equal(near.explained_variance_ratio(), far.explained_variance_ratio())
    for options in ({}, {"explained": 0.9}, {"start": "mean"}, {"start": 3, "center": False}):
        one, other = near.subspace(**options), far.subspace(**options)
        assert torch.equal(one.basis, other.basis) and torch.equal(one.origin, other.origin)
        assert torch.equal(one.singular_values, other.singular_values)
    one, other = near.grouped_subspace([1, 1], 3), far.grouped_subspace([1, 1], 3)
    for a, b in zip(one.subspaces, other.subspaces, strict=True):
        assert torch.equal(a.basis, b.basis)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("tier", ["disk", "staged"])
def test_the_gram_matrix_for_any_length_of_row(tier, n, tmp_path, cpu_capability):
    near, far = recorded(tier, tmp_path, n, count=4)
    assert torch.equal(near.gram, far.gram)


@pytest.mark.parametrize("tier", TIERS)
def test_blocks_do_not_show(tier, tmp_path):
    """One row at a time, asked after each, or all in the end."""
    for often in (True, False):
        near, far = recorded(tier, tmp_path / str(often), often=often)
        assert torch.equal(near.gram, far.gram)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 32])
def test_rows_that_are_multiplied_together(block, tmp_path, monkeypatch):
    """The earlier rows are read once for all rows of a block."""
    monkeypatch.setattr(deferred, "next_block", lambda *_: block)
    calls = []
    multiply = block_gram.multiply_on_cpu

    def counted(rows, gram, index):
        calls.append(len(rows) - index)
        return multiply(rows, gram, index)

    monkeypatch.setattr(deferred, "multiply_on_cpu", counted)
    near, far = recorded("disk", tmp_path, count=9)
    far._store.gram()
    left = (9 - 1) % block or block  # the first is multiplied when the second comes
    assert calls[0] == 1 and set(calls[1:-1]) <= {block} and calls[-1] == left
    assert torch.equal(near.gram, far.gram)
    assert far.cost.bytes_read == sum(
        sum(calls[: i + 1]) * far.numel * 2 for i in range(len(calls))
    )


@pytest.mark.parametrize(
    ("reading", "computing", "count", "expected"),
    [(1, 4, 1, 1), (1, 1, 1, 4), (3, 3, 4, 16), (1, 9, 1, 1), (9, 0, 1, 32), (1.1, 2, 1, 3)],
)
def test_the_block_that_is_chosen(reading, computing, count, expected):
    """As many rows as are multiplied in four times the time that reading takes."""
    assert next_block(Seconds(reading, computing), count) == expected


@pytest.mark.parametrize("tiles", [1, 2, 3, 1024])
def test_large_chunks_are_added_in_order(tiles, monkeypatch):
    """Rows of more than 2^32 elements have chunks that one call cannot sum: pretended here."""
    rows = torch.randn(3, 7 * 4096 + 5)
    whole, sums, one = (torch.zeros(3, 3, dtype=torch.float64) for _ in range(3))
    # A plan with one chunk: what the op does with 1,024 tiles of a chunk.
    ops.gram_block_(rows, whole, 0, 3)
    monkeypatch.setattr(block_gram, "_MOST_CHUNKS", tiles)
    pieces = [rows[:, a:b] for a, b in block_gram._in_order(0, rows.shape[1])]
    assert len(pieces) == 1 + max(0, 8 - tiles)
    for piece in pieces:
        if tiles > 1 and piece is pieces[0]:
            ops.gram_block_(piece, sums, 0, 3)
            continue
        ops.gram_block_(piece, one, 0, 3)
        sums += one
    assert torch.equal(whole, sums)


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_not_finite_is_not_stored(tier, tmp_path):
    _, far = recorded(tier, tmp_path)
    before, gram = rows_of(far).clone(), far.gram
    with torch.no_grad():
        good = far.params[1][-1].item()
        far.params[1][-1] = torch.inf
        with pytest.raises(ValueError, match=r"params\[1\]: expected finite values"):
            far.record()
        far.params[1][-1] = 1e30
        with pytest.raises(ValueError, match=r"a difference from the anchor of 1e.30 overflows"):
            far.record()
        far.params[1][-1] = good
    assert len(far) == 7 and torch.equal(rows_of(far), before) and torch.equal(far.gram, gram)
    assert far.record() == 7 and far.record() == 8
    with pytest.raises(ValueError, match="full: it holds 9 snapshots"):
        far.record()


def test_a_folder_goes_on_bit_for_bit(tmp_path):
    near, far = recorded("disk", tmp_path)
    far.close()
    again = Trajectory.load(tmp_path / "rows", near.params)
    assert repr(again) == (
        "Trajectory(7 of 9 snapshots, numel=20011, dtype=bfloat16, device=cpu, storage=disk)"
    )
    assert torch.equal(again.gram, near.gram) and torch.equal(again.anchor, near.anchor)
    assert near.record() == again.record() == 7
    assert torch.equal(again.gram, near.gram)
    assert torch.equal(again.subspace().basis, near.subspace().basis)


@pytest.mark.parametrize("tier", TIERS)
def test_saved_as_one_file(tier, tmp_path):
    near, far = recorded(tier, tmp_path)
    near.save(tmp_path / "near")
    far.save(tmp_path / "far")
    assert (tmp_path / "near").read_bytes() == (tmp_path / "far").read_bytes()
    assert torch.equal(rows_of(Trajectory.load(tmp_path / "far", near.params)), rows_of(near))


def test_names_and_groups_and_soups(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    params = list(model.named_parameters())
    near = Trajectory(params, 5)
    far = Trajectory(params, 5, storage="disk", path=tmp_path)
    for _ in range(4):
        near.record()
        far.record()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
    one, other = uniform_soup(near), uniform_soup(far)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert far.grouped_subspace(layer_groups(model), 2).names == near.names
    far.close()
    assert Trajectory.load(tmp_path, model.parameters()).names == near.names
    with pytest.raises(ValueError, match=r"params\[0\]: expected the name 0.weight, as in the"):
        Trajectory.load(tmp_path, [(f"x{name}", p) for name, p in params])


def test_the_files_are_safetensors(tmp_path):
    near, _ = recorded("disk", tmp_path, count=3)
    names = sorted(path.name for path in (tmp_path / "rows").iterdir())
    assert names == [f"00000{t}.safetensors" for t in range(3)] + ["anchor.safetensors", "lock"]
    for t in range(3):
        file = load_file(tmp_path / "rows" / f"00000{t}.safetensors")
        assert list(file) == ["delta"] and torch.equal(file["delta"], near.snapshots[t])
    assert torch.equal(load_file(tmp_path / "rows" / names[3])["anchor"], near.anchor)


@pytest.mark.parametrize("tier", ["disk", "staged"])
def test_stored_rows_are_like_an_array(tier, tmp_path):
    near, far = recorded(tier, tmp_path)
    rows, expected = far.snapshots, near.snapshots
    assert isinstance(rows, StoredRows) and rows.shape == expected.shape and len(rows) == 7
    assert rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    for index in (0, 6, -1, slice(None), slice(2, 5), slice(None, None, -2), slice(5, 2)):
        wanted = expected[range(7)[index]] if not isinstance(index, slice) else None
        if isinstance(index, slice):
            wanted = expected[list(range(7)[index])]
        assert torch.equal(rows[index], wanted)
    assert torch.equal(rows[:, 5:900], expected[:, 5:900])
    assert torch.equal(rows[1:3, -7:], expected[1:3, -7:])
    assert torch.equal(rows[2, :0], expected[2, :0])
    assert torch.equal(torch.stack(list(rows)), expected)
    part = rows.narrow(100, 300)
    assert torch.equal(part[:, 10:], expected[:, 110:300]) and part.shape == (7, 200)
    for bad in (7, -8):
        with pytest.raises(IndexError):
            rows[bad]
    with pytest.raises(TypeError, match="columns: expected a slice of step 1"):
        rows[:, 3]
    copy = rows[0]
    copy.fill_(7)
    assert torch.equal(rows[0], expected[0]), "writing to a copy changes nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "disk"}, "path: expected a folder with storage='disk', got None"),
        ({"storage": "host", "path": "x"}, "path: expected None with storage='host', got 'x'"),
        ({"path": "x"}, "path: expected None with storage='device', got 'x'"),
    ],
)
def test_bad_arguments(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        Trajectory(parameters(100), **options)
    with pytest.raises(ValueError, match="dtype: expected"):
        Trajectory(parameters(100), dtype=torch.int64, storage="disk", path="x")
    assert list(tmp_path.iterdir()) == [], "nothing was made"


def test_cost(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(base.time, "perf_counter", lambda: next(clock))
    trajectory = Trajectory([torch.randn(1000)], 9, torch.float32)
    for _ in range(4):
        trajectory.record()
    assert trajectory.cost == (4, 4, (0 + 1 + 2 + 3) * 4000, 4 * 4000)
    assert trajectory.cost.per_snapshot == (1, 6000, 4000)
    assert Trajectory([torch.ones(2)]).cost.per_snapshot == (0, 0, 0)


_MEMORY = """
import sys, torch, dldr_ext
from dldr_ext.pca import gram
from dldr_ext.trajectory.stores import block_gram, disk

gram._CHUNK_BYTES["cpu"] = disk._MAPPED_BYTES = block_gram._WINDOW_BYTES = 1 << 22

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e3

torch.set_num_threads(1)
param = torch.zeros(250_000)
dldr_ext.Trajectory([param], 2).record()
start = peak()
for count in (48, 144):
    folder = f"{sys.argv[1]}/{count}"
    trajectory = dldr_ext.Trajectory([param], count, torch.float32, "disk", folder)
    for t in range(count):
        param[:: t + 1] += 1
        trajectory.record()
    trajectory.subspace(2)
    trajectory.save(folder + "/file")
    print(peak() - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_snapshots(tmp_path):
    """48 MB and 144 MB on disk, in pieces of 4 MB: all that is done with them takes the same."""
    root = str(Path(dldr_ext.__file__).parents[1])
    command = [sys.executable, "-c", _MEMORY, str(tmp_path)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    few, many = map(float, output.split())
    assert many < few + 32 and many < 96


def test_the_programs_of_the_page(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "trajectories.md"
    if not page.exists():
        pytest.skip("needs the folder docs/ of a source checkout")
    text = page.read_text()
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names = {}
    exec("".join(programs), names)
    assert names["subspace"].dim == 10 and len(names["trajectory"]) == 31
    assert names["small"].dtype == torch.int8 and names["exact"].dtype == torch.float32
    printed = capsys.readouterr().out
    assert "RecordingCost(snapshots=30" in printed and "Trajectory(consumed" in printed
