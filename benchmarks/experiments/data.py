"""The data of the experiments: digits and text at hand, more from a folder; label noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dldr_ext.demo import data

from . import cifar, fashion

#: Data that is at hand, and data that a folder is needed for.
AT_HAND = ("mnist5k", "digits", "text")
FROM_FOLDER = (*cifar.NAMES, "fashion", "tinyshakespeare")
NAMES = (*AT_HAND, *FROM_FOLDER)
#: Data whose items are sequences of characters.
TEXTS = ("text", "tinyshakespeare")

#: Changes a batch of inputs at random, e.g. moves images.
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Part:
    """Inputs, one item a row, and labels: (N,) for images, (N, length) for text."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Part:
        """The part on a device."""
        return Part(self.inputs.to(device), self.labels.to(device))


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

    def to(self, device: str) -> Problem:
        """The problem on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)


def load(name: str, folder: Path | None = None) -> Problem:
    """Load a dataset.

    Parameters
    ----------
    name : one of `NAMES`
    folder : what torchvision calls ``root`` for CIFAR and Fashion-MNIST; the folder of
        tinyshakespeare.txt; None for data at hand

    Raises
    ------
    ValueError
        The name is unknown; a folder is missing, or given for data at hand.
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
    if name == "tinyshakespeare":
        assert folder is not None
        return _tinyshakespeare(folder)
    if name == "fashion":
        assert folder is not None
        return _images(name, fashion.read(folder), classes=10)
    if folder is not None:
        classes = 100 if name == "cifar100" else 10
        return _images(name, cifar.read(name, folder), classes, moved=True)
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
    """The reference of the Python language that `help` shows, as sequences of characters."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    return _sequences("text", text, 64, (1200, 200, 200))


def _tinyshakespeare(folder: Path) -> Problem:
    """Plays of Shakespeare, 1.1 MB: eight tenths are trained on, a tenth each is for the rest."""
    path = folder / "tinyshakespeare.txt"
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected it to hold {path.name}, got {folder}")
    text, length = path.read_text(encoding="utf-8"), 129
    tenth = len(text) // length // 80 * 8  # sequences, in whole stretches
    return _sequences("tinyshakespeare", text, length, (8 * tenth, tenth, tenth))


def _sequences(name: str, text: str, length: int, sizes: tuple[int, int, int]) -> Problem:
    """Sequences of characters, each to be predicted from those before it.

    The parts, of so many sequences each, are cut from the whole text in stretches of eight
    sequences, so that each sees all topics.
    """
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[c] for c in text[: length * (len(text) // length)]])
    rows = codes.reshape(-1, length)
    rows = rows[: len(rows) // 8 * 8].reshape(-1, 8, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    cut = rows[order].reshape(-1, length)[: sum(sizes)].split(sizes)
    train, validation, test = (Part(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in cut)
    return Problem(name, train, validation, test, classes=len(alphabet))


def _images(
    name: str, read: tuple[Tensor, Tensor, Tensor, Tensor], classes: int, moved: bool = False
) -> Problem:
    """Images (N, C, H, W) of uint8, labels, and those for the test. A tenth of the first is for
    validation; ``moved``: training images are cropped and mirrored at random."""
    images, labels, test_images, test_labels = read
    sizes = (len(labels) * 9 // 10, len(labels) - len(labels) * 9 // 10)
    train, validation = data.stratified_split(labels, sizes, seed=0)
    pixels = images[train].float()
    mean, std = (f(pixels, dim=(0, 2, 3)).view(-1, 1, 1) for f in (torch.mean, torch.std))
    black = -mean / std

    def normalised(raw: Tensor, labels: Tensor) -> Part:
        scaled = (raw.float() - mean) / std
        return Part(scaled.contiguous(memory_format=torch.channels_last), labels)

    def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
        return cifar.crop_and_flip(batch, black.to(batch.device), generator)

    return Problem(
        name,
        normalised(images[train], labels[train]),
        normalised(images[validation], labels[validation]),
        normalised(test_images, test_labels),
        classes=classes,
        augment=augment if moved else None,
    )
