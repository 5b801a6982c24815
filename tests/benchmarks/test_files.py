"""Fashion-MNIST and Shakespeare from files as others leave them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import data, fashion, networks
from benchmarks.experiments.__main__ import main


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def fashion_folder(folder: Path, items: int = 40, zipped: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    random, arrays = np.random.default_rng(0), {}
    for part in ("train", "t10k"):
        pixels = random.integers(0, 256, (items, 28, 28), dtype=np.uint8)
        labels = random.permutation(np.arange(items) % 10).astype(np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            arrays[f"{part}-{name}"] = array
            path, content = folder / f"{part}-{name}-ubyte", idx(array)
            if zipped:
                path, content = path.with_name(f"{path.name}.gz"), gzip.compress(content)
            path.write_bytes(content)
    return arrays


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw", "raw"])
def test_fashion_is_read_as_torchvision_and_debian_leave_it(inner, zipped, tmp_path):
    arrays = fashion_folder(tmp_path / inner, zipped=zipped)
    images, labels, test_images, test_labels = fashion.read(tmp_path)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images[:, 0].numpy(), arrays["train-images-idx3"])
    assert np.array_equal(labels.numpy(), arrays["train-labels-idx1"])
    assert np.array_equal(test_images[:, 0].numpy(), arrays["t10k-images-idx3"])
    assert np.array_equal(test_labels.numpy(), arrays["t10k-labels-idx1"])
    problem = data.load("fashion", tmp_path)
    sizes = [len(part) for part in (problem.train, problem.validation, problem.test)]
    assert sizes == [36, 4, 40]
    assert problem.train.inputs.mean().abs() < 1e-5 and problem.augment is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train-images-idx3-ubyte: expected an IDX file of bytes: it begins with"),
        (b"\x00\x00\x0d\x03" + 20 * b"\x00", "it begins with 00000d03"),
        (idx(np.zeros((4, 28, 28), np.uint8))[:-1], "cannot reshape array"),
        (idx(np.zeros((39, 28, 28), np.uint8)), r"got shapes \(40,\) and \(39, 28, 28\)"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    fashion_folder(tmp_path, zipped=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fashion.read(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hold train-images-idx3-ubyte or train-images"):
        data.load("fashion", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected it to hold tinyshakespeare.txt, got"):
        data.load("tinyshakespeare", tmp_path)


def test_shakespeare_is_cut_into_three_parts(tmp_path):
    text = "".join(f"line {i}: to be, or not to be\n" for i in range(1200))
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    problem = data.load("tinyshakespeare", tmp_path)
    assert problem.classes == len(set(text))
    sizes = [len(part) for part in (problem.train, problem.validation, problem.test)]
    assert sizes == [8 * sizes[1], sizes[1], sizes[1]] and sizes[1] % 8 == 0
    assert torch.equal(problem.train.inputs[:, 1:], problem.train.labels[:, :-1])
    alphabet = sorted(set(text))
    line = "".join(alphabet[code] for code in problem.test.inputs[0])
    assert len(line) == 128 and line in text
    logits = networks.build("gpt", problem, 0)(problem.train.inputs[:2])
    assert logits.shape == (2, 128, problem.classes)


def test_fashion_from_the_command_line(tmp_path):
    fashion_folder(tmp_path / "data", items=60)
    where = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    command = ["real", "--data", "fashion", "--seeds", "1", "--epochs", "4", "--threads", "1"]
    command += ["--methods", "sgd", "one_pass_mean", "mean_last"]
    assert main([*command, "--folder", str(tmp_path / "data"), *where]) == 0
    assert "### real: fashion, lenet" in (tmp_path / "out/tables.md").read_text()
    assert not list((tmp_path / "work").rglob("*.progress"))
