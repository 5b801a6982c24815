"""Hyperparameters of the demo's training runs, their batches and the account of reads."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .data import Part


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters, chosen on the validation part; the test part had no say."""

    epochs: int = 40  # of the full SGD run
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    snapshots_per_epoch: int = 4
    pbfgs_batch_size: int = 500
    norm_batch_size: int = 500  # for batch-norm statistics
    shift: int = 2  # pixels, at most, by which every training image is moved at random

    def steps_per_epoch(self, images: int) -> int:
        """Return the steps of SGD in one pass over so many training images."""
        return batch_count(images, self.batch_size)

    def first_half(self, images: int) -> int:
        """Return the steps of SGD in the half of the run that is recorded: one at least."""
        return max(1, self.steps_per_epoch(images) * self.epochs // 2)

    @property
    def budget(self) -> int:
        """Passes over the training images that a run in a subspace may spend: half of SGD's."""
        return max(3, self.epochs // 2)  # fewer leave no room for a step of P-BFGS


RECIPES = {
    "mnist5k": Recipe(),
    "digits": Recipe(batch_size=24, pbfgs_batch_size=150, shift=1),
}


class Account:
    """How many training images a method has read, and how long it took.

    Every image that goes through the network counts once, whether for a gradient, for a trial of a
    line search or for batch-norm statistics; a backward pass belongs to the forward pass that it
    differentiates. Time counts only inside ``with account:``, hence not while curves are drawn; on
    a GPU it stops when the queued work is done.

    Parameters
    ----------
    size : int
        Images in the training part.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images = 0
        self.seconds = 0.0
        self._since = 0.0

    @property
    def passes(self) -> float:
        """Passes over the training part so far."""
        return self.images / self.size

    def read(self, images: int) -> None:
        """Add training images to the account."""
        self.images += images

    def __enter__(self) -> Account:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._since


def batch_count(images: int, size: int) -> int:
    """Return how many batches of about ``size`` images make one pass over so many images."""
    return max(1, round(images / size))


def batches(
    part: Part, size: int, shift: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches of about ``size`` images endlessly, in a new order for each pass.

    The batches of one pass are equally large up to one image and hold every image exactly once,
    moved anew by `shifted`.
    """
    count = batch_count(len(part), size)
    device = part.images.device
    while True:
        # Drawn on the CPU: the same batches on every device.
        order = torch.randperm(len(part), generator=generator).to(device)
        for index in order.tensor_split(count):
            yield shifted(part.images[index], shift, generator), part.labels[index]


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move images by whole pixels at random, one draw an image.

    What moves in is as dark as the darkest pixel of the batch.

    Parameters
    ----------
    images : Tensor, shape (N, 1, H, W)
    most : int
        Pixels each way at most; 0 leaves the images as they are.
    generator : torch.Generator

    Returns
    -------
    Tensor, shape (N, 1, H, W), in channels_last order
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (most,) * 4, value=float(images.min()))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, 1, 2 most + 1, ..., H, W)
    y, x = torch.randint(2 * most + 1, (2, count), generator=generator).to(images.device)
    moved = windows[torch.arange(count, device=images.device), :, y, x]
    return moved.contiguous(memory_format=torch.channels_last)


def learning_rate(recipe: Recipe, done: float) -> float:
    """Return the learning rate at a share of the run: a tenth from 1/2 on, 1 % from 3/4 on."""
    return recipe.lr * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)


def snapshot_steps(steps: int, count: int) -> frozenset[int]:
    """Choose the steps after which to take a snapshot: evenly, the last step included."""
    count = min(count, steps)
    return frozenset(math.ceil(steps * (i + 1) / count) for i in range(count))
