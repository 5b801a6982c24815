"""Interrupts a run and resumes it from files: the same steps, bit for bit.

What a checkpoint needs: the subspace (once), the model with its buffers, the optimizer, and torch's
random state if batches or dropout draw from it.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss

from dldr_ext import PBFGS, Subspace


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 1))


def train(model, optimizer, steps):
    for _ in range(steps):
        inputs = torch.randn(128, 6)  # a new batch each step
        optimizer.step(lambda: mse_loss(model(inputs), inputs.prod(1, keepdim=True)))  # noqa: B023


def main(before=5, after=5):
    torch.manual_seed(0)
    model = network()
    subspace = Subspace.random(model.named_parameters(), dim=20)
    optimizer = PBFGS(model.parameters(), subspace, buffers=model)
    train(model, optimizer, before)

    with tempfile.TemporaryDirectory() as folder:
        subspace.save(Path(folder, "subspace.safetensors"))
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(checkpoint, Path(folder, "checkpoint.pt"))
        train(model, optimizer, after)  # goes on without an interruption

        resumed = network()
        loaded = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
        resumed.load_state_dict(loaded["model"])
        subspace = Subspace.load(Path(folder, "subspace.safetensors"))
    optimizer = PBFGS(resumed.parameters(), subspace, buffers=resumed, theta0="current")
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    train(resumed, optimizer, after)
    return model.state_dict(), resumed.state_dict()


if __name__ == "__main__":
    one, other = main()
    print("the same to the bit:", all(torch.equal(one[name], other[name]) for name in one))
