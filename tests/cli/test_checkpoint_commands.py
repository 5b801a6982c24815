"""`dldr analyze` and `dldr soup`, as a user calls them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accessibility import problems
from checkpoint_files import legacy, safe, states, strided, untied, walk, write
from command import call, needs, words
from safetensors.torch import load_file

from dldr_ext import Subspace, Trajectory, greedy_soup, uniform_soup
from dldr_ext.analysis.analysis import Analysis
from dldr_ext.averaging import soup_files
from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.files.partial import alone_in

FILES = {"report.html", "analysis.json", "subspace.safetensors"}
PLOTS = {f"{name}.png" for name in ("path", "spectrum", "drift", "layers", "cosine")}


@pytest.fixture(autouse=True)
def _packages():
    needs("typer", "rich", "matplotlib")


@pytest.fixture
def run(tmp_path):
    model, found, _ = states(6)
    return write(tmp_path / "run", found), model, found


def test_analyze_in_8_bits(run, tmp_path, capsys):
    folder, _, _ = run
    options = [
        "--dim",
        "3",
        "--dtype",
        "float8_e4m3fn",
        "--json",
        "--output",
        str(tmp_path / "out"),
    ]
    code, printed, errors = call(capsys, "analyze", str(folder), *options)
    assert code == 0 and not errors and json.loads(printed)["dtype"] == "float8_e4m3fn"
    found = Subspace.load(tmp_path / "out" / "subspace.safetensors")
    assert found.dim == 3 and found.dtype == torch.float8_e4m3fn


def test_analyze(run, tmp_path, capsys):
    folder, model, _ = run
    out = tmp_path / "deep" / "out"
    code, printed, _ = call(capsys, "analyze", str(folder), "-o", str(out), "--dim", "3")
    assert code == 0
    assert {path.name for path in out.iterdir()} == FILES | PLOTS
    assert "6 checkpoints of 183 numbers" in words(printed)
    assert str(out / "report.html") in printed
    report = (out / "report.html").read_text()
    assert report.count("<svg") == 5 and problems(report) == []
    assert not any(mark in report for mark in ("$", "{{", "{%"))
    for path in folder.iterdir():
        assert str(path) in report
    selected = [name for name, p in model.named_parameters() if p.requires_grad]
    include = [part for name in selected for part in ("--include", name)]
    assert call(capsys, "analyze", str(folder), "-o", str(out), *include, "-q") == (0, "", "")
    expected = Trajectory.from_checkpoints(folder, model).subspace()
    assert torch.equal(Subspace.load(out / "subspace.safetensors").basis, expected.basis)


def test_analyze_as_json(run, tmp_path, capsys):
    folder, _, _ = run
    out = tmp_path / "out"
    arguments = ["--json", "--no-subspace", "--exclude", "frozen.*", "--dtype", "float32"]
    code, printed, err = call(capsys, "analyze", str(folder), "-o", str(out), *arguments)
    assert (code, err) == (0, "")
    result = json.loads(printed)
    assert result == json.loads((out / "analysis.json").read_text())
    assert result["dtype"] == "float32" and result["subspace"] is None
    assert len(result["checkpoints"]) == len(result["gram"]) == 6
    assert {path.name for path in out.iterdir()} == (FILES | PLOTS) - {"subspace.safetensors"}


def test_analyze_chooses_the_directions(tmp_path, capsys):
    model, found, _ = states(16)
    folder, out = write(tmp_path / "run", found), tmp_path / "out"
    selected = [name for name, p in model.named_parameters() if p.requires_grad]
    include = [part for name in selected for part in ("--include", name)]
    arguments = ["analyze", str(folder), "-o", str(out), *include]
    code, printed, _ = call(capsys, *arguments)
    assert code == 0 and 'dim = "auto"' in printed
    expected = Trajectory.from_checkpoints(folder, model).subspace("auto")
    subspace = Subspace.load(out / "subspace.safetensors")
    assert subspace.dim == expected.dim > 1
    assert subspace.report() == expected.report()
    assert subspace.choice["why"] in (out / "report.html").read_text()
    code, printed, _ = call(capsys, *arguments, "--json", "--no-subspace")
    result = json.loads(printed)
    assert result["choice"] == expected.choice
    lines = [f"{name:<11} {text}" for name, text in result["report"].items()]
    assert "\n".join(lines) == expected.report()


LOSSES = """
import torch
def good(state):
    return state["norm.bias"].square().sum() + 1
def bad(state):
    raise RuntimeError("no data")
def nan(state):
    return float("nan")
nothing = 3
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
    (tmp_path / "losses_of_a_test.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "losses_of_a_test", raising=False)
    return "losses_of_a_test"


def test_loss_and_comparison(run, tmp_path, capsys, losses):
    folder, _, found = run
    second = write(tmp_path / "second", states(4)[1])
    out = tmp_path / "out"
    arguments = ["analyze", str(folder), "-o", str(out), "--loss", f"{losses}:good"]
    code, printed, _ = call(capsys, *arguments, "--compare", str(second))
    assert code == 0
    shown = words(printed)
    assert "run: 6 checkpoints of 183" in shown and "second: 4 checkpoints" in shown
    assert "Loss along the path of run" in shown and "Loss along the path of second" in shown
    assert "Loss on the plane: direction 1" in shown and "Two runs side by side" in shown
    result = json.loads((out / "analysis.json").read_text())
    expected = [float(state["norm.bias"].square().sum() + 1) for state in found]
    assert result["loss"]["along"][0] == pytest.approx(expected)
    assert f"{expected[-1]:.6g}" in shown and len(result["loss"]["plane"]["loss"]) == 11
    assert len(result["other"]["checkpoints"]) == 4
    names = {path.name for path in out.iterdir()}
    assert names == FILES | PLOTS | {"loss.png", "other-layers.png", "other-cosine.png"}
    page = (out / "report.html").read_text()
    assert problems(page) == [] and page.count("<svg") == 8


@pytest.mark.parametrize(
    ("loss", "code", "message"),
    [
        ("losses_of_a_test:bad", 1, "losses_of_a_test:bad: raised RuntimeError: no data ("),
        ("losses_of_a_test:nan", 1, "nan: expected a finite number, got nan at"),
        ("losses_of_a_test:nothing", 2, "expected module:function, got"),
        ("losses_of_a_test", 2, "expected module:function, got"),
        ("no_such_module:f", 2, "No module named 'no_such_module'"),
    ],
)
def test_a_bad_loss_is_named_first(run, tmp_path, capsys, losses, loss, code, message):
    folder, _, _ = run
    out = tmp_path / "out"
    found, printed, err = call(capsys, "analyze", str(folder), "-o", str(out), "--loss", loss)
    assert (found, printed) == (code, "") and message in words(err)
    assert not out.exists()


def test_a_second_run_of_another_architecture(run, tmp_path, capsys):
    folder, _, _ = run
    other, out = walk(tmp_path / "other")[0], tmp_path / "out"
    arguments = ["analyze", str(folder), "-o", str(out), "--compare", str(other)]
    code, printed, err = call(capsys, *arguments)
    assert (code, printed) == (1, "")
    assert f"expected the architecture of {folder / '8.pt'}: the tensor conv.weight, found" in err
    assert not out.exists()


@pytest.mark.parametrize("command", ["analyze", "demo"])
def test_a_folder_that_cannot_be_written_is_named_first(run, tmp_path, capsys, command):
    folder, _, _ = run
    checkpoints = [str(folder)] if command == "analyze" else ["--data", "digits"]
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deep", Path("/proc/self/out")):
        code, printed, err = call(capsys, command, *checkpoints, "-o", str(out))
        assert (code, printed) == (2, "") and "--output" in words(err)
        message = "is not a folder" if "file" in str(out) else "a folder that can be written to"
        assert message in words(err)


def test_files_are_put_in_order(run, tmp_path, capsys):
    folder, _, _ = run
    files = sorted(map(str, folder.iterdir()))
    arguments = ["analyze", *files, "-o", str(tmp_path / "out"), "--json"]
    _, printed, _ = call(capsys, *arguments)
    names = [os.path.basename(path) for path in json.loads(printed)["checkpoints"]]
    assert names == ["8.pt", "9.pt", "10.pt", "11.pt", "12.pt", "13.pt"]
    _, printed, _ = call(capsys, *arguments, "--as-given")
    assert json.loads(printed)["checkpoints"] == files


@pytest.mark.parametrize("command", ["analyze", "soup"])
def test_a_bad_checkpoint(run, tmp_path, capsys, command):
    folder, _, _ = run
    (folder / "10.pt").write_bytes(b"")
    out = tmp_path / ("out" if command == "analyze" else "out.safetensors")
    arguments = [command, str(folder), "-o", str(out), "--json"]
    code, printed, err = call(capsys, *arguments)
    assert (code, printed) == (1, "")
    assert err == f"dldr: checkpoints[2]: {folder / '10.pt'}: empty: 0 bytes\n"
    assert not out.exists()
    code, printed, err = call(capsys, *arguments, "--skip-bad")
    assert code == 0
    assert len(json.loads(printed)["skipped"]) == 1
    assert err == f"dldr: left out checkpoints[2]: {folder / '10.pt'}: empty: 0 bytes\n"
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dim", "0"], 2, "--dim"),
        (["--dim", "most"], 2, "expected a number of at least 1, or auto, got most"),
        (["--dim", "auto"], 1, "dim: 'auto' needs 8 snapshots or more"),
        (["--dim", "9"], 1, "dim: expected 1 <= dim <= 5 (6 centred snapshots), got 9"),
        (["--dim", "2", "--explained", "0.9"], 2, "expected --dim or --explained, got both"),
        (["--explained", "2"], 1, "explained: expected 0 < explained <= 1, got 2.0"),
        (["--dtype", "int16"], 2, "--dtype"),
        (["--include", "nothing"], 1, "expected floating-point tensors, found none"),
        (["--key", "ema"], 1, "expected the key 'ema', found a dict with the keys"),
        (["nowhere.pt"], 1, "nowhere.pt: not found"),
    ],
)
def test_bad_options_of_analyze(run, tmp_path, capsys, arguments, code, message):
    folder, _, _ = run
    out = tmp_path / "out"
    found, printed, err = call(capsys, "analyze", str(folder), "-o", str(out), *arguments)
    assert (found, printed) == (code, "")
    assert message in words(err)
    assert not out.exists() or list(out.iterdir()) == []


def test_interrupted_and_called_again(run, tmp_path, capsys, monkeypatch):
    folder, _, _ = run
    out = tmp_path / "out"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dldr_ext.cli.options.ByteBar.__call__", interrupt)
        code, _, err = call(capsys, "analyze", str(folder), "-o", str(out))
    assert code == 130
    assert err.endswith("dldr: interrupted; the same command goes on from here\n")
    assert [path.name for path in out.iterdir()] == [".analysis.part"]
    code, _, _ = call(capsys, "analyze", str(folder), "-o", str(out))
    assert code == 0
    assert {path.name for path in out.iterdir()} == FILES | PLOTS


def test_interrupted_and_called_again_for_other_weights_of_the_same_files(tmp_path, monkeypatch):
    for i in range(4):
        both = {"model": {"w": torch.ones(9000) * i}, "ema": {"w": torch.ones(9000) * i**2}}
        torch.save(both, tmp_path / f"{i}.pt")

    def stop(*_):
        raise KeyboardInterrupt

    def analysis(key, name, **options):
        series = Series(tmp_path, key=key)
        return Analysis(series, tmp_path / name, chunk_bytes=1 << 12, **options)

    with pytest.raises(KeyboardInterrupt):
        analysis("model", "out", progress=stop).run()
    assert analysis("ema", "out").run()["drift"] == analysis("ema", "other").run()["drift"]


def test_paths_as_a_shell_leaves_them(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run[0].parent)
    assert call(capsys, "soup", "~/run", "--output=~/x.pt")[0] == 0
    assert call(capsys, "analyze", "~/run", "--output=~/out")[0] == 0
    _, out, _ = call(capsys, "analyze", "~/run", "--no-subspace", "--json", "--output=~/out")
    assert json.loads(out)["notes"][-1].endswith(
        "subspace.safetensors is that of an earlier analysis"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run", "x.pt", "out"}
    for command in ("soup", "analyze"):
        code, _, err = call(capsys, command, "", "-o", "y.pt")
        assert code == 1 and "expected paths, got an empty one: is a variable not set?" in err
    code, _, err = call(capsys, "soup", "run/0.pt:1.2.3", "run/1.pt:1", "-o", "y.pt")
    assert code == 2 and "a weight for each path" in words(err)


def test_two_at_once(run, tmp_path, capsys):
    out = tmp_path / "out"
    with alone_in(out):
        code, _, err = call(capsys, "analyze", str(run[0]), "-o", str(out))
    assert code == 1 and "another process is writing there" in err and list(out.iterdir()) == []


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite"])
@pytest.mark.parametrize("command", ["analyze", "soup"])
def test_a_full_disk(run, tmp_path, capsys, monkeypatch, where, command):
    folder, _, _ = run
    out = tmp_path / ("out" if command == "analyze" else "out.safetensors")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        code, printed, err = call(capsys, command, str(folder), "-o", str(out))
    assert (code, printed) == (1, "")
    assert "No space left on device" in err
    left = [path.name for path in (out if command == "analyze" else tmp_path).iterdir()]
    assert "subspace.safetensors" not in left and ".out.safetensors.part" not in left
    code, _, _ = call(capsys, command, str(folder), "-o", str(out))
    assert code == 0


def test_a_disk_that_is_too_small_is_noticed_first(run, tmp_path, capsys, monkeypatch):
    folder, _, _ = run
    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)._replace(free=183 * 4 + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    arguments = ["analyze", str(folder), "-o", str(out)]
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert "5 directions need 2,562 bytes, free are 1,732" in err
    assert list(out.iterdir()) == []
    assert call(capsys, *arguments, "--dim", "2")[0] == 0


@pytest.mark.parametrize("writer", [strided, legacy, safe])
def test_soup_is_the_uniform_soup(tmp_path, capsys, monkeypatch, writer):
    monkeypatch.setattr(soup_files, "_WINDOW", 50)
    _, found, _ = states(4)
    if writer is safe:
        found = [untied(state) for state in found]
    folder = write(tmp_path / "run", found, writer)
    out = tmp_path / "soup.safetensors"
    code, printed, _ = call(capsys, "soup", str(folder), "-o", str(out))
    assert code == 0
    assert "must be" in printed or "estimate them anew with" in printed
    result, expected = load_file(out), uniform_soup(found)
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name


def test_weighted_soup(run, tmp_path, capsys):
    folder, _, found = run
    out = tmp_path / "soup.safetensors"
    arguments = ["soup", str(folder), "-o", str(out)]
    assert call(capsys, *arguments, "--weights", "1,0,0,0,0,3")[0] == 0
    mean = found[0]["conv.weight"] * 0.25 + found[5]["conv.weight"] * 0.75
    assert torch.allclose(load_file(out)["conv.weight"], mean)
    code, _, err = call(capsys, *arguments, "--weights", "1,2")
    assert code == 1 and "weights: expected 6 numbers, one for each checkpoint, got 2" in err
    code, _, err = call(capsys, *arguments, "--weights", "1,x")
    assert code == 2 and "expected numbers joined by commas" in words(err)
    code, _, err = call(capsys, *arguments, "--weights", "1,-1,0,0,0,0")
    assert code == 1 and "whose sum is not 0" in err


def test_greedy_soup(run, tmp_path, capsys, monkeypatch):
    folder, _, found = run
    (tmp_path / "my_eval.py").write_text(
        "def score(state):\n    return -abs(float(state['norm.bias'].sum()) - 0.05)\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["soup", str(folder), "--json", "--metric"]
    code, printed, _ = call(capsys, *arguments, "my_eval:score")
    assert code == 0
    from importlib import import_module

    monkeypatch.syspath_prepend(str(tmp_path))
    expected = greedy_soup(found, import_module("my_eval").score)
    result = json.loads(printed)
    assert result["score"] == expected.score
    assert result["members"] == [str(folder / f"{8 + t}.pt") for t in expected.members]
    for name, tensor in load_file("soup.safetensors").items():
        assert torch.equal(tensor, expected.state_dict[name])
    for wrong in ("my_eval:nothing", "no_such_module:f", "my_eval"):
        code, _, err = call(capsys, *arguments, wrong)
        assert code == 2 and "--metric" in words(err)


def test_soup_of_checkpoints_that_differ(run, tmp_path):
    folder, _, _ = run
    series = Series(folder)
    state = torch.load(folder / "9.pt")
    state["norm.running_mean"][1] = float("inf")
    torch.save(state, folder / "9.pt")
    with pytest.raises(CheckpointError, match=r"\[1\].*norm.running_mean: expected finite"):
        soup_files.write_mean(series, tmp_path / "soup.safetensors")
    del state["norm.running_mean"]
    torch.save(state, folder / "9.pt")
    with pytest.raises(CheckpointError, match=r"\[1\].*differs in norm.running_mean"):
        soup_files.write_mean(Series(folder), tmp_path / "soup.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
