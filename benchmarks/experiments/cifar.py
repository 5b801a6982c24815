"""CIFAR-10 and CIFAR-100 from the folder that torchvision leaves behind, without torchvision."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_FILES = {
    "cifar10": (
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        b"labels",
    ),
    "cifar100": ("cifar-100-python", ["train"], "test", b"fine_labels"),
}
# The copy of CIFAR-10 whose images went through JPEG once has the same files.
_FILES["cifar10_jpeg"] = _FILES["cifar10"]
NAMES = tuple(_FILES)
_PAD = 4  # pixels that training images move by, at most

# What the pickled arrays need, under the names of old and of new NumPy; nothing else is unpickled.
_rebuild = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _rebuild,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Unpickler(pickle.Unpickler):
    """Knows NumPy arrays and what needs no import; a pickle cannot make it run anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR file")
        return _ALLOWED[module, name]


def read(name: str, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read all images of a dataset.

    Parameters
    ----------
    name : one of `NAMES`; "cifar100" has its 100 fine labels
    folder : what torchvision calls ``root``: it holds cifar-10-batches-py or cifar-100-python

    Returns
    -------
    images, labels, test_images, test_labels
        uint8 (N, 3, 32, 32) and int64 (N,).

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        A file is no pickled batch of CIFAR images.
    """
    inner, training, test, key = _FILES[name]
    batches = [_batch(folder / inner / file, key) for file in training]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels, *_batch(folder / inner / test, key)


def _batch(path: Path, key: bytes) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected it to hold {path.parent.name}/{path.name}, as torchvision's "
            f"download leaves it, got {path.parent.parent}"
        )
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        data = np.asarray(batch[b"data"])
        labels = np.asarray(batch[key], dtype=np.int64)
        images = data.reshape(len(labels), 3, 32, 32)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a pickled batch of CIFAR images: {error}") from error
    if data.dtype != np.uint8:
        raise ValueError(f"{path}: expected pixels of uint8, got {data.dtype}")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


def crop_and_flip(images: Tensor, black: Tensor, generator: torch.Generator) -> Tensor:
    """The published augmentation: moved by up to 4 pixels each way, mirrored at random.

    Parameters
    ----------
    images : (N, 3, H, W), normalised
    black : (3, 1, 1), the value of a black pixel, which is what moves in

    Returns
    -------
    Tensor, shape (N, 3, H, W), in channels_last order
    """
    count, _, height, width = images.shape
    padded = functional.pad(images - black, (_PAD,) * 4) + black
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, 3, 9, 9, H, W)
    # Drawn on the CPU: the same images on every device.
    y, x = torch.randint(2 * _PAD + 1, (2, count), generator=generator).to(images.device)
    moved = windows[torch.arange(count, device=images.device), :, y, x]
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    moved[mirrored] = moved[mirrored].flip(3)
    return moved.contiguous(memory_format=torch.channels_last)
