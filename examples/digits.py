"""DLDR and P-BFGS on the 8 x 8 digits of scikit-learn: ten variables instead of 9,610."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from dldr_ext import PBFGS, Trajectory


def main(epochs=6, steps=20):
    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    train, test = slice(0, 1400), slice(1400, None)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def accuracy():
        with torch.no_grad():
            return (model(pixels[test]).argmax(1) == labels[test]).float().mean().item()

    trajectory = Trajectory(model.named_parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):  # a short stretch of ordinary training, recorded four times an epoch
        for i, batch in enumerate(torch.randperm(1400).split(50)):
            if i % 7 == 0:
                trajectory.record()
            sgd.zero_grad()
            cross_entropy(model(pixels[batch]), labels[batch]).backward()
            sgd.step()
    found = {"sgd": accuracy()}

    optimizer = PBFGS(model.parameters(), trajectory.subspace(dim=10))  # from the first weights
    for _ in range(steps):
        optimizer.step(lambda: cross_entropy(model(pixels[train]), labels[train]))
    return found | {"pbfgs": accuracy()}


if __name__ == "__main__":
    print(main())
