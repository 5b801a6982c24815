"""`dldr soup`: what goes into the average, what is written, and what the terminal says of it."""

from __future__ import annotations

import json

import pytest
import torch
from command import call, needs, words
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def _packages():
    needs("typer", "rich")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(3):
        state = {
            "enc.weight": torch.full((2,), float(i)),
            "dec.weight": torch.full((2,), -float(i)),
            "dec.mask": torch.full((2, 2), float("-inf")).triu(1),
            "freqs": torch.full((2,), complex(i, -i)),
            "ids": torch.arange(2).to(torch.uint16),
            "step": torch.tensor(i),
            "epoch": i,
        }
        torch.save(state, folder / f"{i}.pt")
    return folder


def test_constant_buffers_are_kept_and_all_is_said(run, tmp_path, capsys):
    for name, load in (("x.pt", torch.load), ("x.st", load_file)):
        code, out, _ = call(capsys, "soup", str(run), "-o", str(tmp_path / name))
        found = load(tmp_path / name)
        assert code == 0 and found["enc.weight"].tolist() == [1, 1]
        assert found["freqs"].tolist() == [1 - 1j] * 2 and found["ids"].tolist() == [0, 1]
        assert found["dec.mask"].isinf().sum() == 1 and found["step"] == 2
        said = words(out)
        assert "note: left out (not tensors): epoch" in said
        assert "note: not averaged, but as in the last one: step" in said
        assert "note: NaN or Inf, the same in every checkpoint, which are kept: dec.mask" in said
        assert "ids" not in said and "freqs" not in said


def test_include_and_exclude(run, tmp_path, capsys):
    options = ["--include", "dec.*", "--include", "step", "--exclude", "*.mask"]
    for metric in ([], ["--metric", "builtins:len"]):
        arguments = ["soup", str(run), "-o", str(tmp_path / "x.pt"), *options, *metric]
        code, out, _ = call(capsys, *arguments, "--json")
        assert code == 0 and list(torch.load(tmp_path / "x.pt")) == ["dec.weight", "step"]
        notes = json.loads(out)["notes"]
        assert "left out (by the patterns): enc.weight, dec.mask, freqs, ids" in notes
        code, out, _ = call(capsys, *arguments)
        assert "note: left out (by the patterns): enc.weight, dec.mask" in words(out)
    code, out, err = call(capsys, *arguments[:4], "--include", "no")
    assert (code, out) == (1, "")
    assert "include, exclude: expected patterns that let a tensor through" in err


def test_what_has_no_mean_is_named_with_the_way_out(run, tmp_path, capsys):
    for i in range(3):
        state = torch.load(run / f"{i}.pt") | {"adj": torch.eye(2).to_sparse()}
        torch.save(state, run / f"{i}.pt")
    out = tmp_path / "x.pt"
    code, printed, err = call(capsys, "soup", str(run), "-o", str(out), "--json")
    assert (code, printed) == (1, "") and not out.exists()
    assert "adj: expected numbers, found a sparse tensor (torch.sparse_coo); exclude leaves" in err
    assert call(capsys, "soup", str(run), "-o", str(out), "--exclude", "adj")[0] == 0


@pytest.mark.parametrize("metric", [[], ["--metric", "builtins:len"]])
def test_outputs_that_cannot_be_written(run, tmp_path, capsys, metric):
    """Said at once, with the option and the way out."""
    for output, message in (
        ("soup.tar", "expected a name that ends with one of .safetensors"),
        ("soup.npz", "or with / for a folder that transformers, PEFT or diffusers loads, got"),
        ("no/x.pt", "expected a path in a folder that is there, unlike"),
        ("run", "expected a new or an empty folder, not one with 3 entries"),
    ):
        arguments = ["soup", "nowhere.pt", "-o", str(tmp_path / output), *metric]
        code, printed, err = call(capsys, *arguments)
        assert (code, printed) == (2, "")
        assert "--output" in words(err) and message[:40] in words(err)
    code, printed, err = call(capsys, "soup", str(run), "-o", str(tmp_path / "soup"), *metric)
    assert (code, printed) == (1, "") and "expected a name that ends with one of" in err
    before = (run / "1.pt").read_bytes()
    code, printed, err = call(capsys, "soup", str(run), "-o", str(run / "1.pt"), *metric)
    assert (code, printed) == (1, "")
    assert "expected a path other than those of the checkpoints" in err
    assert (run / "1.pt").read_bytes() == before


def test_a_folder(tmp_path, capsys):
    for i in range(2):
        folder = tmp_path / f"checkpoint-{i}"
        folder.mkdir()
        save_file({"w": torch.ones(2) * i}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"heads": i, "dtype": str(i)}))
    code, out, _ = call(capsys, "soup", str(tmp_path), "-o", f"{tmp_path}/mean/")
    assert code == 0 and f"2 checkpoints: {tmp_path}/mean/" in words(out)
    assert "others differ in heads" in words(out)
    assert load_file(tmp_path / "mean" / "model.safetensors")["w"].tolist() == [0.5, 0.5]
    assert json.loads((tmp_path / "mean" / "config.json").read_text())["heads"] == 0
