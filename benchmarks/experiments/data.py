"""The data of the experiments: digits, text that comes with Python, CIFAR from a folder; noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dldr_ext.demo import data

from . import cifar

#: Data that is at hand, and data that a folder is needed for.
AT_HAND = ("mnist5k", "digits", "text")
FROM_FOLDER = ("cifar10", "cifar100")
NAMES = (*AT_HAND, *FROM_FOLDER)

_LENGTH = 64  # characters in a sequence
_SEQUENCES = (1200, 200, 200)  # train, validation, test

#: Changes a batch of inputs at random, e.g. moves images.
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Part:
    """Inputs, one item a row, and labels: (N,) for images, (N, length) for text."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Problem:
    """A dataset in three parts. Training sees the first alone; choices are made on the second; the
    third is read once, when all is over."""

    name: str
    train: Part
    validation: Part
    test: Part
    classes: int
    augment: Augment | None = None

    def with_noise(self, share: float, generator: torch.Generator) -> Problem:
        """The same problem with wrong labels in a share of the training part alone."""
        labels = corrupt(self.train.labels, share, self.classes, generator)
        return replace(self, train=Part(self.train.inputs, labels))


def load(name: str, folder: Path | None = None) -> Problem:
    """Load a dataset.

    Parameters
    ----------
    name : one of `NAMES`
    folder : where ``cifar-10-batches-py`` or ``cifar-100-python`` is; for CIFAR only

    Raises
    ------
    ValueError
        The name is unknown; CIFAR without a folder, other data with one.
    FileNotFoundError
        The folder does not hold the files.
    """
    if name not in NAMES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    if (folder is not None) != (name in FROM_FOLDER):
        expected = "the folder that holds its files" if name in FROM_FOLDER else "None"
        raise ValueError(f"folder: expected {expected} for {name}, got {folder!r}")
    if name == "text":
        return _text()
    if folder is not None:
        return _cifar(name, folder)
    digits = data.load(name)
    train, validation, test = (
        Part(p.images, p.labels) for p in (digits.train, digits.validation, digits.test)
    )
    return Problem(name, train, validation, test, classes=10)


def corrupt(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Symmetric label noise: exactly a share of the labels become one of the wrong ones.

    Parameters
    ----------
    labels : Tensor, shape (N,), int64
    share : in [0, 1]; round(share * N) items, drawn from all of them, get a wrong label
    classes : number of classes; each wrong one is equally likely, the true one never comes
    generator : the same state gives the same noise

    Returns
    -------
    Tensor, shape (N,), int64
        A new tensor.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share!r}")
    if labels.dim() != 1:
        raise ValueError(f"labels: expected shape (N,), got {tuple(labels.shape)}")
    count = round(share * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    result = labels.clone()
    offset = torch.randint(1, classes, (count,), generator=generator)
    result[chosen] = (labels[chosen] + offset) % classes
    return result


def _text() -> Problem:
    """The reference of the Python language that `help` shows, as sequences of characters.

    The parts are cut from the whole text in turns, so that each sees all topics.
    """
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in text[: _LENGTH * (len(text) // _LENGTH)]])
    rows = codes.reshape(-1, _LENGTH)
    rows = rows[: len(rows) // 8 * 8].reshape(-1, 8, _LENGTH)  # stretches of 512 characters
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows = rows[order].reshape(-1, _LENGTH)
    cut = rows[: sum(_SEQUENCES)].split(_SEQUENCES)
    train, validation, test = (Part(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in cut)
    return Problem("text", train, validation, test, classes=len(alphabet))


def _cifar(name: str, folder: Path) -> Problem:
    images, labels, test_images, test_labels = cifar.read(name, folder)
    sizes = (len(labels) * 9 // 10, len(labels) - len(labels) * 9 // 10)
    train, validation = data.stratified_split(labels, sizes, seed=0)
    pixels = images[train].float()
    mean, std = (f(pixels, dim=(0, 2, 3)).view(3, 1, 1) for f in (torch.mean, torch.std))
    black = -mean / std

    def normalised(raw: Tensor, labels: Tensor) -> Part:
        scaled = (raw.float() - mean) / std
        return Part(scaled.contiguous(memory_format=torch.channels_last), labels)

    def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
        return cifar.crop_and_flip(batch, black, generator)

    return Problem(
        name,
        normalised(images[train], labels[train]),
        normalised(images[validation], labels[validation]),
        normalised(test_images, test_labels),
        classes=10 if name == "cifar10" else 100,
        augment=augment,
    )
