"""CIFAR files as their authors wrote them, old and new."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from benchmarks.experiments import (
    cifar,
    data,
)
from benchmarks.experiments.__main__ import main


class Python2Pickler(pickle._Pickler):
    """Writes as the real files were: protocol 2, str and bytes alike as the strings of Python 2."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def cifar_folder(
    folder: Path, name: str, items: int = 40, write: Callable[[object], bytes] = python2
) -> tuple[np.ndarray, np.ndarray]:
    """What torchvision leaves behind, with `items` images in each file."""
    inner, training, test, key = cifar._FILES[name]
    (folder / inner).mkdir(parents=True)
    random = np.random.default_rng(0)
    images, labels = [], []
    for file in [*training, test]:
        pixels = random.integers(0, 256, (items, 3072), dtype=np.uint8)
        found = random.permutation(np.arange(items) % (10 if name == "cifar10" else 100)).tolist()
        batch = {b"data": pixels, key: found, b"batch_label": b"some text"}
        (folder / inner / file).write_bytes(write(batch))
        images.append(pixels)
        labels.append(found)
    return np.stack(images), np.array(labels)


def test_the_files_of_the_tests_are_as_old_as_the_real_ones():
    text = python2({b"data": np.zeros(3, np.uint8)})
    assert text.startswith(b"\x80\x02") and b"cnumpy.core.multiarray\n_reconstruct\n" in text
    assert b"_codecs" not in text


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [python2, partial(pickle.dumps, protocol=4)], ids=["old", "new"])
def test_cifar_files_are_read(name, write, tmp_path):
    pixels, labels = cifar_folder(tmp_path, name, write=write)
    images, targets, test_images, test_targets = cifar.read(name, tmp_path)
    assert np.array_equal(images.numpy(), pixels[:-1].reshape(-1, 3, 32, 32))
    assert np.array_equal(test_images.numpy(), pixels[-1].reshape(-1, 3, 32, 32))
    assert np.array_equal(targets.numpy(), labels[:-1].reshape(-1))
    assert np.array_equal(test_targets.numpy(), labels[-1])
    problem = data.load(name, tmp_path)
    count = len(targets)
    assert (len(problem.train), len(problem.validation)) == (
        count * 9 // 10,
        count - count * 9 // 10,
    )
    assert problem.train.inputs.mean((0, 2, 3)).abs().max() < 1e-5


def test_cifar_pickles_cannot_run_anything(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    cifar_folder(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(ValueError, match=r"train: expected .*mkdir has no place in a CIFAR file"):
        cifar.read("cifar100", tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({b"data": 3})]
)
def test_other_files_are_refused(content, tmp_path):
    cifar_folder(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_3: expected a pickled batch of CIFAR images"):
        cifar.read("cifar10", tmp_path)


def test_cifar_wants_its_folder(tmp_path, capsys):
    with pytest.raises(
        ValueError, match="folder: expected the folder that holds its files for cif"
    ):
        data.load("cifar10")
    with pytest.raises(ValueError, match="folder: expected None for digits, got"):
        data.load("digits", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected it to hold cifar-10-batches-py/data_ba"):
        data.load("cifar10", tmp_path)
    command = ["compare", "--data", "cifar10", "--work", str(tmp_path / "w")]
    assert main(command) == 2
    assert "error: folder: expected the folder that holds its files" in capsys.readouterr().err


def test_augmentation_moves_and_mirrors():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8).repeat(40, 1, 1, 1)
    black = torch.tensor([-1.0, -2.0, -3.0]).view(3, 1, 1)
    moved = cifar.crop_and_flip(images, black, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images - black, (4, 4, 4, 4)) + black
    found = set()
    for image, large in zip(moved, padded, strict=True):
        options = {
            (y, x, flip): window.flip(2) if flip else window
            for y in range(9)
            for x in range(9)
            for window in [large[:, y : y + 8, x : x + 8]]
            for flip in (False, True)
        }
        places = [place for place, window in options.items() if torch.equal(window, image)]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 40 and {flip for _, _, flip in found} == {False, True}
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == set(range(9))


def test_cifar_from_the_command_line(tmp_path):
    cifar_folder(tmp_path / "data", "cifar10", items=20)
    where = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    command = ["zoo", "--data", "cifar10", "--network", "resnet8", "--seeds", "1", "--epochs", "2"]
    assert main([*command, "--folder", str(tmp_path / "data"), *where]) == 0
    runs = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert {run["data"] for run in runs} == {"cifar10"} and len(runs) == 5
