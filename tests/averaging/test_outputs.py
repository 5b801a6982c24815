"""Where an average is written: what can be said before the work is, and no checkpoint is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dldr_ext.averaging import folders, soup_files
from dldr_ext.averaging.outputs import parse_output
from dldr_ext.averaging.soup_files import verify_mean, write_greedy_soup, write_mean
from dldr_ext.checkpoints import CheckpointError, Series


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(3):
        torch.save({"w": torch.full((4, 3), float(i)), "b": torch.ones(2) * i}, folder / f"{i}.pt")
    return folder


def series(folder: Path, **options) -> Series:
    return Series(folder, rows=False, **options)


def write_both(folder: Path, output, monkeypatch) -> list[str]:
    """The messages of the errors that a mean and a greedy soup raise before they read anything."""
    messages = []

    def never(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("dldr_ext.checkpoints.reader.CheckpointReader.read", never)
    for write in (write_mean, lambda *a: write_greedy_soup(*a, score=never)):
        with pytest.raises((ValueError, OSError)) as caught:
            write(series(folder), output)
        messages.append(str(caught.value))
    monkeypatch.undo()
    assert messages[0] == messages[1] and messages[0].startswith("output: ")
    return messages


@pytest.mark.parametrize("name", ["x", "x.npz", "x.txt", "x.pt.zip", "x.gguf", ".pt2", "x.tar"])
def test_an_unknown_suffix(run, tmp_path, monkeypatch, name):
    (message, _) = write_both(run, tmp_path / name, monkeypatch)
    assert "expected a name that ends with one of .safetensors, .st (safetensors); .pt, " in message
    assert "or with / for a folder that transformers, PEFT or diffusers loads, got" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_places_that_cannot_be_written_to(run, tmp_path, monkeypatch):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.pt")
    full = tmp_path / "full"
    full.mkdir()
    (full / "old.txt").touch()
    for output, message in (
        ("no/x.pt", "expected a path in a folder that is there, unlike"),
        ("file/x.pt", "expected a path in a folder that is there, unlike"),
        ("folder.pt", "expected a file, where a folder is; a / at its end writes into a folder"),
        ("pipe.pt", "expected a file that may be written to"),
        ("full", "expected a new or an empty folder, not one with 1 entries"),
        ("full/", "expected a new or an empty folder, not one with 1 entries"),
        ("file/", "expected a folder, where a file is"),
        ("no/folder/", "expected a path in a folder that is there, unlike"),
        ("run/", "expected a new or an empty folder, not one with 3 entries"),
    ):
        (found, _) = write_both(run, f"{tmp_path}/{output}", monkeypatch)
        assert message in found, output


def test_no_permission(run, tmp_path, monkeypatch):
    """A folder, or an earlier file, that must not be written to."""
    old = tmp_path / "old.pt"
    old.touch()
    access = os.access
    for locked, message in ((tmp_path, "that may be written to, unlike"), (old, "may be written")):

        def answer(path, mode, locked=locked):
            return access(path, mode) and not (mode & os.W_OK and Path(path) == locked)

        with monkeypatch.context() as patch:
            patch.setattr(os, "access", answer)
            with pytest.raises(ValueError, match=message):
                write_mean(series(run), old)
    assert old.read_bytes() == b""


def test_a_full_disk_is_noticed_first(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    for name in ("x.pt", "x.safetensors", "x/"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            patch.setattr(soup_files._Mean, "window", None)
            with pytest.raises(OSError, match="No space left on device; the file needs"):
                write_mean(series(run), f"{tmp_path}/{name}")
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage)
            with pytest.raises(OSError, match="needs 56 bytes, free are 10"):
                write_greedy_soup(series(run), f"{tmp_path}/{name}", None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("form", ["itself", "relative", "link", "hard link", "linked folder"])
@pytest.mark.parametrize("bad", [False, True])
def test_no_checkpoint_is_overwritten(run, tmp_path, monkeypatch, form, bad):
    """Not even a bad one that is left out."""
    if bad:
        (run / "1.pt").write_bytes(b"")
    output = run / "1.pt"
    if form == "relative":
        monkeypatch.chdir(tmp_path)
        output = Path("run/../run/./1.pt")
    elif form == "link":
        (tmp_path / "x.pt").symlink_to(output)
        output = tmp_path / "x.pt"
    elif form == "hard link":
        (tmp_path / "x.pt").hardlink_to(output)
        output = tmp_path / "x.pt"
    elif form == "linked folder":
        (tmp_path / "linked").symlink_to(run)
        output = tmp_path / "linked" / "1.pt"
    before = (run / "1.pt").read_bytes()
    for write in (write_mean, lambda *a: write_greedy_soup(*a, lambda _: 0.0)):
        with pytest.raises(ValueError, match=r"output: expected a path other than those of the ch"):
            write(series(run, skip_bad=bad), output)
    assert (run / "1.pt").read_bytes() == before and output.samefile(run / "1.pt")


def test_a_file_beside_the_checkpoints_is_no_less_safe(run, tmp_path):
    """One that is passed over, or lies beside those that are named."""
    torch.save({"w": torch.zeros(4, 3), "b": torch.zeros(2)}, run / "best.pt")
    model_folder(tmp_path / "steps" / "checkpoint-1", 1.0)
    model_folder(tmp_path / "steps" / "checkpoint-2", 2.0)
    save_file({"w": torch.ones(2)}, tmp_path / "steps" / "model.safetensors")
    for paths, output in (
        (run, run / "best.pt"),
        ([run / "0.pt", run / "1.pt"], run / "2.pt"),
        (tmp_path / "steps", tmp_path / "steps" / "model.safetensors"),
        (tmp_path / "steps", tmp_path / "steps" / "checkpoint-1" / "optimizer.pt"),
    ):
        before = output.read_bytes()
        with pytest.raises(ValueError, match="expected a new file, or an average that dldr wrote"):
            write_mean(series(paths), output)
        assert output.read_bytes() == before
    for _ in range(2):
        write_mean(series(run), run / "mean.pt")
    assert torch.load(run / "mean.pt")["b"].tolist() == [1, 1]


def test_shards_are_checkpoints_too(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a path other than those of the checkpoints"):
        write_mean(series(folder), folder / "model-1.safetensors")


def test_an_earlier_average_is_replaced(run, tmp_path):
    """Through a link as well; until all is written the old file stays."""
    output = tmp_path / "x.pt"
    write_mean(series(run), output)
    old = output.read_bytes()
    (tmp_path / "latest.pt").symlink_to(output)
    with pytest.raises(CheckpointError):
        torch.save({"w": torch.full((4, 3), float("nan")), "b": torch.ones(2)}, run / "2.pt")
        write_mean(series(run), tmp_path / "latest.pt")
    assert output.read_bytes() == old
    torch.save({"w": torch.full((4, 3), 5.0), "b": torch.ones(2)}, run / "2.pt")
    write_mean(series(run), tmp_path / "latest.pt")
    assert (tmp_path / "latest.pt").is_symlink()
    assert torch.load(output)["w"].unique().tolist() == [2.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.pt", "run", "x.pt"]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "folder/"])
def test_an_interrupted_average_leaves_nothing(run, tmp_path, name):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mean(series(run), f"{tmp_path}/{name}", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "folder/"])
def test_two_at_once(run, tmp_path, name):
    """The second one is refused, and harms the first as little as what a killed one left does."""
    left = tmp_path / f".{name.rstrip('/')}.part"
    (left / "old").parent.mkdir() if name == "folder/" else left.write_bytes(b"old" * 9999)
    refused = []

    def again(done, total):
        with pytest.raises(OSError, match="another process is writing there"):
            write_mean(series(run), f"{tmp_path}/{name}", [1, 0, 0])
        refused.append(done)

    write_mean(series(run), f"{tmp_path}/{name}", progress=again)
    assert (
        len(refused) == 2 and verify_mean(series(run), tmp_path / name, range(3), [1 / 3] * 3) < 1
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run", name.rstrip("/")}


@pytest.mark.parametrize("spoil", [Path.touch, Path.unlink])
def test_a_checkpoint_that_changes_meanwhile(run, tmp_path, spoil):
    """A run that goes on overwrites its files: half of one and half of another is no checkpoint."""

    def change(done, total):
        if done < total:
            spoil(run / "1.pt")

    with pytest.raises(CheckpointError, match=r"\[1\].*1.pt: (.*it changed while|not found)"):
        write_mean(series(run), tmp_path / "x.pt", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def model_folder(path: Path, value: float, shards: int = 1, **others: str) -> Path:
    """What transformers writes, without transformers."""
    path.mkdir(parents=True)
    state = {f"layers.{i}.weight": torch.full((64, 64), float(value + i)) for i in range(4)}
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        names = {name: files[i % shards] for i, name in enumerate(state)}
        for file in files:
            save_file({n: t for n, t in state.items() if names[n] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = {"config.json": '{"model_type": "x"}', "tokenizer.json": "{}", "merges.txt": "a b"}
    found |= {"trainer_state.json": "{}", "optimizer.pt": "x", "spiece.model": "s", "code.py": "1"}
    for name, text in (found | others).items():
        (path / name).write_text(text)
    return path


def test_a_folder_has_what_its_model_needs(tmp_path):
    paths = [model_folder(tmp_path / f"checkpoint-{i}", i) for i in range(3)]
    notes = write_mean(series(paths), f"{tmp_path}/mean/")
    assert notes == []
    copied = {"config.json", "tokenizer.json", "merges.txt", "spiece.model", "code.py"}
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {"model.safetensors", *copied}
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert found["layers.2.weight"].unique().tolist() == [3.0]
    with safe_open(tmp_path / "mean" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert series(tmp_path / "mean").contents[0].kind == "soup"


@pytest.mark.parametrize("shards", [1, 2])
def test_an_average_does_not_count_in_the_run_it_is_of(tmp_path, shards):
    """Written among the checkpoints; it counts where it is named."""
    for i, name in enumerate("abc"):
        model_folder(tmp_path / name, 3 * i, shards)
    for name in ("mean/", "mean/other.pt", "mean.pt", "mean.safetensors"):
        found = series(tmp_path)
        assert [path.parent.name for path in found.paths] == ["a", "b", "c"]
        write_mean(found, f"{tmp_path}/{name}")
    for name in ("mean", "mean.pt"):
        found = series([tmp_path / "a", tmp_path / name])
        assert len(found) == 2 and any("is an average itself" in n for n in found.decisions)


def test_an_empty_folder_is_filled(tmp_path):
    paths = [model_folder(tmp_path / f"checkpoint-{i}", i) for i in range(2)]
    (tmp_path / "mean").mkdir()
    write_greedy_soup(series(paths), tmp_path / "mean", lambda state: 0.0)
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert found["layers.0.weight"].unique().tolist() == [0.5]


@pytest.mark.parametrize("shards", [1, 2])
def test_shards(tmp_path, monkeypatch, shards):
    """As the checkpoints have them; or because the file would be too large."""
    if shards == 1:
        monkeypatch.setattr(folders, "_SHARD", 2 * 64 * 64 * 4)
    paths = [model_folder(tmp_path / f"c-{i}", i, shards) for i in range(2)]
    write_mean(series(paths), tmp_path / "mean")  # of folders of a model it is one
    index = json.loads((tmp_path / "mean" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 64 * 64 * 4}
    files = sorted(path.name for path in (tmp_path / "mean").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert count > 1 and sorted(set(index["weight_map"].values())) == files
    again = series(tmp_path / "mean")
    assert len(again) == 1 and sorted(again.tensors(0)) == [f"layers.{i}.weight" for i in range(4)]
    for name, file in index["weight_map"].items():
        expected = 0.5 + int(name[7])
        assert load_file(tmp_path / "mean" / file)[name].unique().tolist() == [expected]


def test_names_of_weights(tmp_path):
    """As the library calls them that has written the checkpoint."""
    diffusion, adapter = "diffusion_pytorch_model.safetensors", "adapter_model.safetensors"
    for source, name, config in (
        (adapter, adapter, "adapter_config.json"),
        (diffusion, diffusion, "config.json"),
        ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors", None),
        ("pytorch_model.bin", "model.safetensors", "config.json"),
    ):
        for i in range(2):
            folder = tmp_path / name / str(i)
            folder.mkdir(parents=True)
            state = {"a.lora_A.weight": torch.ones(2) * i, "a.lora_B.weight": torch.ones(2) * i}
            save = torch.save if source.endswith(".bin") else save_file
            save(state, folder / source)
            if config:
                facts = {"lora_alpha": 8 * i, "peft_version": str(i)}
                (folder / config).write_text(json.dumps(facts))
        files = [tmp_path / name / str(i) / source for i in range(2)]
        output = tmp_path / f"of {name}"
        notes = write_mean(series(files), f"{output}/")
        assert {path.name for path in output.iterdir()} == {name, config} - {None}
        differ = f"{config} is that of {files[0].parent}; others differ in lora_alpha"
        assert notes == [
            "lora_A and lora_B were averaged each: their product is not the mean of the products",
            *([differ] if config else []),
        ]
        shutil.rmtree(tmp_path / name)


def test_a_folder_without_a_configuration(run, tmp_path):
    (note,) = write_mean(series(run), f"{tmp_path}/mean/")
    assert note == f"no config.json beside {run / '0.pt'}: the folder has the weights alone"
    assert [path.name for path in (tmp_path / "mean").iterdir()] == ["model.safetensors"]


def test_forms():
    for form, names in {
        "torch.save": ("a.pt", "A.PTH", "m.pth.tar", "a.ckpt", "a.bin"),
        "safetensors": ("a.st", "a.safetensors"),
        "folder": ("new/",),
    }.items():
        assert {parse_output(name).form for name in names} == {form}
