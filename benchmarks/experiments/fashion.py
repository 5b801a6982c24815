"""Fashion-MNIST from its four IDX files, as torchvision or Debian's package leaves them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_UNSIGNED_BYTE = 8  # its code in the third byte of an IDX file


def read(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read all images.

    Parameters
    ----------
    folder : what torchvision calls ``root``, or the folder of the files themselves (Debian:
        /usr/share/datasets/fashion-mnist); compressed by gzip or not

    Returns
    -------
    images, labels, test_images, test_labels
        uint8 (N, 1, 28, 28) and int64 (N,).

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        A file is no IDX file of bytes, or images and labels are of different number.
    """
    parts = []
    for part in ("train", "t10k"):
        images = _idx(_find(folder, f"{part}-images-idx3-ubyte"))
        labels = _idx(_find(folder, f"{part}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"folder: expected as many labels as images, got shapes {labels.shape} and "
                f"{images.shape} in the files {part}-* of {folder}"
            )
        parts += [torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()]
    return parts[0], parts[1], parts[2], parts[3]


def _find(folder: Path, name: str) -> Path:
    for inner in (folder, folder / "FashionMNIST" / "raw", folder / "raw"):
        for path in (inner / name, inner / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"folder: expected it to hold {name} or {name}.gz, itself or in FashionMNIST/raw as "
        f"torchvision's download leaves it, got {folder}"
    )


def _idx(path: Path) -> np.ndarray:
    """The array in an IDX file: 0, 0, type, rank, big-endian sizes, the elements."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
            raise ValueError(f"it begins with {content[:4].hex()}")
        rank = content[3]
        shape = np.frombuffer(content, ">u4", count=rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (ValueError, IndexError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected an IDX file of bytes: {error}") from error
