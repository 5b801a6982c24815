"""Streaming analysis: the numbers of a recorded trajectory, resumable, nothing lost."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import Tied, states, walk, write

from dldr_ext import Subspace, Trajectory
from dldr_ext.analysis.analysis import Analysis
from dldr_ext.checkpoints import Series
from dldr_ext.pca.metrics import effective_dimension


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4,096 columns, read 1,024 at a time."""
    monkeypatch.setattr("dldr_ext.pca.gram._CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr("dldr_ext.analysis.analysis._WINDOW", 1024)


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_subspace_is_that_of_the_trajectory_to_the_bit(tmp_path, small_chunks, dtype):
    folder, model = walk(tmp_path / "run", dtype=torch.float64)
    expected = Trajectory.from_checkpoints(folder, model, dtype=dtype).subspace(3)
    expected.save(tmp_path / "expected.safetensors")
    result = Analysis(Series(folder), tmp_path / "out", dim=3, dtype=dtype, chunk_bytes=1).run()
    written = tmp_path / "out" / "subspace.safetensors"
    if dtype == torch.float64:  # its Gram matrix was summed up while recording
        found = Subspace.load(written)
        assert torch.allclose(found.basis, expected.basis, rtol=1e-9, atol=1e-12)
        assert torch.equal(found.origin, expected.origin)
        assert found.shapes == expected.shapes and found.names == expected.names
        ratio = torch.tensor(result["explained_variance_ratio"][:3], dtype=torch.float64)
        assert torch.allclose(ratio, expected.explained_variance_ratio, rtol=1e-12)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-9, atol=1e-12)
        return
    assert written.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert [p.name for p in (tmp_path / "out").iterdir()] == [written.name]
    assert result["numel"] == expected.numel
    assert result["explained_variance_ratio"][:3] == expected.explained_variance_ratio.tolist()


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupted_analysis_goes_on(tmp_path, small_chunks, at, error):
    """Five chunks of each pass: stopped at each of the first eight."""
    folder, _ = walk(tmp_path / "run")
    whole = Analysis(Series(folder), tmp_path / "whole", dim=3, chunk_bytes=1)
    facts = whole.run()
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise error

    options = {"dim": 3, "chunk_bytes": 1}
    with pytest.raises(error):
        Analysis(Series(folder), tmp_path / "out", progress=stop, **options).run()
    assert not (tmp_path / "out" / "subspace.safetensors").exists()
    seen = []
    again = Analysis(
        Series(folder), tmp_path / "out", progress=lambda *a: seen.append(a), **options
    )
    result = again.run()
    assert len(seen) == 10 - at
    assert result["gram"] == facts["gram"]
    a, b = (tmp_path / name / "subspace.safetensors" for name in ("whole", "out"))
    assert a.read_bytes() == b.read_bytes()


def test_changed_files_start_anew(tmp_path, small_chunks):
    folder, model = walk(tmp_path / "run")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Analysis(Series(folder), tmp_path / "out", chunk_bytes=1, progress=stop).run()
    torch.save(model.state_dict(), folder / "9.pt")
    again = Analysis(Series(folder), tmp_path / "out", chunk_bytes=1)
    again.run()
    assert again.resumed_at == 0
    expected = Trajectory.from_checkpoints(folder, model).subspace()
    assert torch.equal(
        Subspace.load(tmp_path / "out" / "subspace.safetensors").basis, expected.basis
    )


def test_numbers(tmp_path):
    _, found, expected = states(5)
    folder = write(tmp_path / "run", [*found, found[4], found[2]])
    with torch.device("meta"):
        model = Tied()
    result = Analysis(
        Series(folder, model), tmp_path / "out", dtype=torch.float32, keep_basis=False
    ).run()
    assert result["subspace"] is None and list((tmp_path / "out").iterdir()) == []
    rows = torch.stack([*expected.snapshots, expected.snapshots[4], expected.snapshots[2]]).double()
    assert torch.allclose(torch.tensor(result["gram"], dtype=torch.float64), rows @ rows.T)
    norms = torch.tensor(result["drift"]["from_first"], dtype=torch.float64)
    assert torch.allclose(norms, rows.norm(dim=1))
    steps = rows.diff(dim=0)
    assert torch.allclose(
        torch.tensor(result["drift"]["steps"], dtype=torch.float64), steps.norm(dim=1), atol=1e-6
    )
    cosines = torch.nn.functional.cosine_similarity(steps[:3], steps[1:4])
    successive = torch.tensor(result["cosines"]["successive"], dtype=torch.float64)
    assert torch.allclose(successive[:3], cosines)
    assert successive[3] == 0  # from a checkpoint to itself there is no step
    assert [pair[:2] for pair in result["near_duplicates"]] == [[2, 6], [4, 5]]


def test_effective_dimension():
    ratio = torch.tensor([0.5, 0.4, 0.06, 0.04], dtype=torch.float64)
    found = effective_dimension(ratio)
    assert found["participation_ratio"] == pytest.approx(1 / (0.25 + 0.16 + 0.0036 + 0.0016))
    assert (found["0.95"], found["0.99"]) == (3, 4)
