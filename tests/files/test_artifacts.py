"""Saved artefacts are whole or refused, and an old file survives a failed save."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from dldr_ext.files import artifacts
from dldr_ext.tensors.formats import SAFETENSORS_NAMES

DTYPES = sorted(SAFETENSORS_NAMES, key=str)


def write(path, value=1.0, kind="thing", version=2):
    tensors = {"a": torch.full((3, 5), value), "b": torch.arange(4)}
    artifacts.save(path, kind, version, tensors, {"answer": 42, "names": ["ä", "b"], "none": None})


def read(path, kind="thing", version=2):
    with artifacts.Reader(path, kind, version) as file:
        return {name: file.read(name) for name in file.names()}, file.metadata


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (257,), (3, 5, 7)], ids=str)
def test_round_trip_of_every_dtype(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 10).to(dtype)
    artifacts.save(tmp_path / "file", "thing", 1, {"t": tensor, "other": torch.ones(3)}, {})
    with artifacts.Reader(tmp_path / "file", "thing", 1) as file:
        loaded = file.read("t")
        into = torch.empty(shape, dtype=dtype)
        file.read_into("t", into)
    for result in (loaded, into):
        assert result.dtype == dtype and result.shape == tensor.shape
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (result, tensor)))


def test_strided_tensors_are_saved_in_logical_order(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "_PIECE", 64)  # several pieces for each tensor
    base = torch.randn(6, 8, 10)
    tensors = {
        "transposed": base.permute(2, 0, 1),
        "every_other": base[::2, :, ::3],
        "expanded": torch.tensor(3.0).expand(4, 5),
        "view": base[2:4],
    }
    artifacts.save(tmp_path / "file", "thing", 1, tensors, {})
    with artifacts.Reader(tmp_path / "file", "thing", 1) as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor), name


def test_any_safetensors_reader_can_open_it(tmp_path):
    write(tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert torch.equal(loaded["a"], torch.ones(3, 5)) and torch.equal(loaded["b"], torch.arange(4))


def test_metadata_and_permissions(tmp_path):
    path = tmp_path / "file"
    write(path)
    tensors, metadata = read(path, version=3)
    assert metadata == {"answer": 42, "names": ["ä", "b"], "none": None}
    assert set(tensors) == {"a", "b"}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["file"]


def test_what_was_read_does_not_hang_on_the_file(tmp_path):
    path = tmp_path / "file"
    write(path)
    tensors, _ = read(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(tensors["a"], torch.ones(3, 5))


def test_a_link_keeps_pointing_to_the_file(tmp_path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "file"
    write(target, 1)
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert float(read(target)[0]["a"][0, 0]) == 2


def test_wrong_kind_version_and_origin(tmp_path):
    path = tmp_path / "file"
    write(path)
    with pytest.raises(ValueError, match=r"file: expected a subspace, found a thing"):
        read(path, kind="subspace")
    with pytest.raises(ValueError, match="format version 1 or older, found version 2; a newer"):
        read(path, version=1)
    save_file({"a": torch.ones(2)}, path, metadata={"by": "hand"})
    with pytest.raises(ValueError, match=r"saved by dldr_ext, found .* keys \['by'\]"):
        read(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"saved by dldr_ext, found .* keys \[\]"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")
    with pytest.raises(OSError):
        read(tmp_path)


def test_missing_and_different_tensors(tmp_path):
    write(tmp_path / "file")
    with artifacts.Reader(tmp_path / "file", "thing", 2) as file:
        with pytest.raises(ValueError, match=r"expected a tensor 'c', found \['a', 'b'\]"):
            file.read("c")
        out = torch.zeros(3, 4)
        with pytest.raises(ValueError, match=r"'a' of shape \(3, 4\) .* found \(3, 5\)"):
            file.read_into("a", out)
        with pytest.raises(ValueError, match=r"dtype float64, found \(3, 5\) and float32"):
            file.read_into("a", torch.zeros(3, 5, dtype=torch.float64))
        assert not out.any()


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "file"
    write(path)
    whole = path.read_bytes()
    for size in [*range(0, 20), *range(20, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}: "):
            read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"{path}: "):
        read(path)


def test_a_changed_byte_anywhere(tmp_path):
    path = tmp_path / "file"
    write(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for flip in (0x01, 0x80):
            changed = bytearray(whole)
            changed[place] ^= flip
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=f"{path}: "):
                read(path)
    path.write_bytes(whole)
    read(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"PK\x03\x04" * 100, b"\xff" * 4096])
def test_not_a_safetensors_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not a whole safetensors file"):
        read(path)


@pytest.mark.parametrize("step", ["_pieces", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write(path, 1)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    if step == "_pieces":
        pieces = artifacts._pieces

        def half(tensor):
            yield next(iter(pieces(tensor)))[:7]
            fail()

        monkeypatch.setattr(artifacts, "_pieces", half)
    else:
        monkeypatch.setattr(artifacts.os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        write(path, 2)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="a: cannot save a tensor of dtype complex128"):
        artifacts.save(path, "thing", 1, {"a": torch.ones(2, dtype=torch.complex128)}, {})
    with pytest.raises(TypeError):
        artifacts.save(path, "thing", 1, {}, {"a": object()})
    with pytest.raises(FileNotFoundError):
        artifacts.save(tmp_path / "no" / "folder", "thing", 1, {}, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file"]
