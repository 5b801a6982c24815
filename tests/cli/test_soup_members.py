"""Which files `dldr soup` averages, how often, and which weight is whose."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from command import call, json_of, needs, words
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dldr_ext.averaging.soup_files import verify_mean, write_mean
from dldr_ext.checkpoints import Series
from dldr_ext.checkpoints.errors import CheckpointError


@pytest.fixture(autouse=True)
def _packages():
    needs("typer", "rich")


def write(folder, **values):
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        torch.save({"w": torch.tensor([float(value)])}, folder / f"{name}.pt")
    return folder


def mean(capsys, tmp_path, *arguments):
    """The only number in the soup, and what the terminal said."""
    out = tmp_path / "out" / "soup.safetensors"
    out.parent.mkdir(exist_ok=True)
    code, printed, err = call(capsys, "soup", *map(str, arguments), "-o", str(out))
    assert code == 0, err
    return load_file(out)["w"].item(), printed


@pytest.mark.parametrize(
    ("files", "weights", "expected"),
    [
        (["best", "a_old"], "3,1", 6.0),
        (["a_old", "best"], "3,1", 2.0),
        (["m10", "m9", "best"], "1,2,1", 0.25 * 10 + 0.5 * 9 + 0.25 * 8),
        (["m9", "m9", "m10"], "1,2,1", 0.75 * 9 + 0.25 * 10),
        (["m10", "m9"], "-1,2", 8.0),
    ],
)
@pytest.mark.parametrize("order", [[], ["--as-given"]])
def test_weights_belong_to_the_paths_as_typed(tmp_path, capsys, files, weights, expected, order):
    run = write(tmp_path / "run", best=8, a_old=0, m9=9, m10=10)
    typed = [run / f"{name}.pt" for name in files]
    found, printed = mean(capsys, tmp_path, *typed, f"--weights={weights}", *order)
    assert found == expected
    total = sum(map(float, weights.split(",")))
    first = float(weights.split(",")[0]) / total
    assert f"{first:.4g} x {typed[0]}" in printed or files.count(files[0]) > 1
    assert ("counts once" in printed) == (len(set(files)) < len(files))


def test_weights_of_folders(tmp_path, capsys):
    """In a folder they are in the order of the steps, in the place where it was typed."""
    run = tmp_path / "run"
    run.mkdir()
    for name, step, value in (("a", 30, 4), ("b", 10, 1), ("c", 20, 2)):
        torch.save({"step": step, "net": {"w": torch.tensor([float(value)])}}, run / f"{name}.pt")
    other = write(tmp_path / "other", z=8) / "z.pt"
    assert mean(capsys, tmp_path, other, run, "--weights", "5,1,2,0")[0] == (40 + 1 + 4) / 8
    os.symlink(run / "a.pt", run / "last.pt")
    found = json_of(
        capsys, "soup", str(run), str(other), "--weights", "1,2,0,5", "-o", str(tmp_path / "o.pt")
    )
    members = dict(zip(map(os.path.basename, found["members"]), found["weights"], strict=True))
    assert members == {"b.pt": 0.125, "c.pt": 0.25, "a.pt": 0, "z.pt": 0.625}
    code, _, err = call(capsys, "soup", str(run), str(other), "--weights", "1,2")
    assert code == 1 and "expected 4 numbers, one for each checkpoint, got 2 for" in err


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_has_the_weight_of_both_names(tmp_path, capsys, link):
    run = write(tmp_path / "run", a=4, b=8)
    link(run / "a.pt", run / "again.pt")
    typed = [run / "again.pt", run / "b.pt", run / "a.pt"]
    assert mean(capsys, tmp_path, *typed, "--weights", "1,2,1")[0] == 6
    found, printed = mean(capsys, tmp_path, *typed)
    assert found == 6 and "a.pt is the same as" in printed


def test_an_earlier_soup_in_the_folder_does_not_count(tmp_path, capsys):
    run = write(tmp_path / "run", epoch_0=0, epoch_1=3, epoch_2=6)
    arguments = ["soup", str(run), "-o", str(run / "epoch_9.safetensors")]
    for _ in range(3):
        assert call(capsys, *arguments)[0] == 0
    write(run, epoch_3=9)
    code, printed, _ = call(capsys, *arguments)
    assert code == 0 and load_file(run / "epoch_9.safetensors")["w"].item() == 4.5
    assert "written by dldr: epoch_9.safetensors" in printed
    # Typed by name it counts, and that is said.
    found, printed = mean(capsys, tmp_path, run / "epoch_9.safetensors", run / "epoch_3.pt")
    assert found == 6.75 and "is an average itself" in printed


def test_copies_are_said(tmp_path, capsys):
    run = write(tmp_path / "run", e1=1, e2=2, e3=6)
    shutil.copy(run / "e3.pt", run / "e4.pt")
    torch.save({"model": {"w": torch.tensor([1.0])}}, run / "e5.pt")
    found, printed = mean(capsys, tmp_path, run)
    assert found == pytest.approx(16 / 5)
    assert f"{run / 'e4.pt'} holds the same numbers as {run / 'e3.pt'}: both count" in printed
    assert f"{run / 'e5.pt'} holds the same numbers as {run / 'e1.pt'}: both count" in printed


def test_large_tensors_that_begin_alike_are_no_copies(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for i in range(3):
        w = torch.zeros(40)
        w[-1] = min(i, 1)
        save_file({"w": w, "n": torch.tensor(3)}, run / f"{i}.safetensors")
    out = tmp_path / "o.safetensors"
    notes = json_of(capsys, "soup", str(run), "-o", str(out))["notes"]
    assert [note for note in notes if "same numbers" in note] == [
        f"{run / '2.safetensors'} holds the same numbers as {run / '1.safetensors'}: both count"
    ]


def test_best_and_last_do_not_count_in_a_folder(tmp_path, capsys):
    run = write(tmp_path / "run", epoch_2=2, epoch_10=10, best=100, last=200)
    found, printed = mean(capsys, tmp_path, run)
    assert found == 6 and "not among the steps of the run: best.pt, last.pt" in printed
    assert mean(capsys, tmp_path, run / "epoch_2.pt", run / "best.pt")[0] == 51


def test_a_greedy_soup_says_the_same(tmp_path, capsys, monkeypatch):
    run = write(tmp_path / "run", epoch_2=2, epoch_10=10, last=200)
    (tmp_path / "evaluation.py").write_text("def score(state):\n    return -float(state['w'])\n")
    monkeypatch.chdir(tmp_path)
    os.symlink(run / "epoch_10.pt", run / "epoch_11.pt")
    arguments = ["soup", str(run), "--metric", "evaluation:score", "--json", "-o", "s.safetensors"]
    code, printed, _ = call(capsys, *arguments)
    result = json.loads(printed)
    assert code == 0 and result["members"] == [str(run / "epoch_2.pt")]
    assert "last.pt" in "".join(result["notes"]) and "epoch_11.pt" in "".join(result["notes"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--schedule", "mean"], [1, 1, 1, 1, 1, 1]),
        (["--schedule", "linear"], [1, 1, 1, 1, 1, 1]),
        (["--schedule", "1-sqrt"], [(k**0.5 - (k - 1) ** 0.5) for k in range(1, 7)]),
        (["--schedule", "ema:0.5"], [1, 2, 4, 8, 16, 32]),
        (["--last", "2"], [0, 0, 0, 0, 1, 1]),
        (["--every", "2"], [0, 1, 0, 1, 0, 1]),
        (["--every", "10"], [0, 0, 0, 0, 0, 1]),
        (["--last", "5", "--every", "2", "--schedule", "ema:0.5"], [0, 1, 0, 2, 0, 4]),
    ],
)
def test_schedules_and_windows(tmp_path, capsys, options, expected):
    steps = {f"step_{t}": 2.0**t for t in range(8, 14)}
    run = write(tmp_path / "run", **steps)
    out = tmp_path / "o.safetensors"
    found = json_of(capsys, "soup", str(run), *options, "--verify", "-o", str(out))
    numbers = torch.tensor(expected, dtype=torch.float64) / sum(expected)
    values = torch.tensor([*steps.values()], dtype=torch.float64)
    assert load_file(out)["w"].item() == pytest.approx((numbers @ values).item(), rel=1e-6)
    names = [str(run / f"{s}.pt") for s, n in zip(steps, numbers, strict=True) if n]
    assert found["members"] == names and 0 <= found["verified"] <= 1
    if "--schedule" in options:
        assert found["weights"] == pytest.approx([n for n in numbers.tolist() if n])
    else:
        assert "weights" not in found


def test_weights_joined_to_paths(tmp_path, capsys):
    run = write(tmp_path / "run", a=8, b=2)
    write(tmp_path / "more", s1=1, s2=3)
    paths = f"{run / 'b.pt'}:-0.5", f"{run / 'a.pt'}:1.5", f"{tmp_path / 'more'}:1e0"
    found, printed = mean(capsys, tmp_path, *paths, "--verify")
    assert found == (-0.5 * 2 + 1.5 * 8 + 1 + 3) / 3
    assert f"{-0.5 / 3:.4g} x {run / 'b.pt'}" in printed and "read back: as computed" in printed
    odd = write(tmp_path, **{"x.pt:2": 5}) / "x.pt:2.pt"
    (odd.rename(tmp_path / "x.pt:2"))
    assert mean(capsys, tmp_path, tmp_path / "x.pt:2")[0] == 5  # a name, where there is such a file


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a.pt:1", "b.pt"], 2, "expected a weight for each path or for none, got 1 for 2"),
        (["a.pt:1", "b.pt:-1"], 1, "weights: expected finite numbers whose sum is not 0"),
        (["a.pt:1", "--schedule", "mean"], 2, "expected CKPT:WEIGHT or --schedule, got both"),
        (["a.pt", "--schedule", "mean", "--metric", "m:f"], 2, "--schedule or --metric, got both"),
        (["a.pt", "--weights", "1", "--last", "1"], 2, "expected --weights or a window, got both"),
        (["a.pt", "--schedule", "ema:2"], 2, "a number between 0 and 1, as ema:0.99, got ema:2"),
        (["a.pt", "--last", "3"], 1, "last: expected at most 1, the checkpoints, got 3"),
        (["a.pt", "--every", "0"], 2, "--every"),
    ],
)
def test_choices_that_do_not_go_together(tmp_path, capsys, monkeypatch, arguments, code, message):
    monkeypatch.chdir(write(tmp_path / "run", a=8, b=2))
    found, _, err = call(capsys, "soup", *arguments, "-o", "o.safetensors")
    assert found == code and message in words(err)
    assert not (tmp_path / "run" / "o.safetensors").exists()


@pytest.mark.parametrize("name", ["o.safetensors", "o.pt", "o/"])
def test_what_was_averaged_is_in_the_file(tmp_path, capsys, name):
    run = write(tmp_path / "run", e1=1, e2=3)
    call(capsys, "soup", str(run), "--schedule", "ema:0.5", "-o", f"{tmp_path}/{name}")
    text = b"".join(p.read_bytes() for p in tmp_path.glob("o*") if p.is_file())
    text += b"".join(p.read_bytes() for p in tmp_path.glob("o/*.safetensors"))
    for path in run.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest().encode() in text
        assert str(path).encode() in text
    if name == "o.safetensors":
        with safe_open(tmp_path / name, "pt") as file:
            facts = json.loads(file.metadata()["dldr_ext.metadata"])
        assert facts["weights"] == pytest.approx([1 / 3, 2 / 3])
        assert [*facts["sha256"]] == facts["checkpoints"] == [str(run / f"e{i}.pt") for i in (1, 2)]


def test_a_file_that_was_changed_is_found(tmp_path):
    run = write(tmp_path / "run", e1=1, e2=3)
    series, out = Series(run, rows=False), tmp_path / "o.safetensors"
    write_mean(series, out)
    assert verify_mean(series, out, [0, 1], [0.5, 0.5]) <= 1
    for wrong in (2.00001, float("nan")):
        save_file({"w": torch.tensor([wrong])}, out)
        with pytest.raises(
            CheckpointError, match="w: expected the mean of the checkpoints, read a"
        ):
            verify_mean(series, out, [0, 1], [0.5, 0.5])
    save_file({"v": torch.tensor([2.0])}, out)
    with pytest.raises(CheckpointError, match=r"w: expected it, of shape \(1,\), as written"):
        verify_mean(series, out, [0, 1], [0.5, 0.5])
