"""Adversarial training in a subspace (Li et al., "Subspace Adversarial Training", CVPR 2022).

The closure holds the inner attack: it returns the loss on inputs that projected gradient descent
has made as bad as it can for the weights of that moment. P-BFGS calls it several times a step, and
replays torch's random numbers each time, so that every trial of a step starts its attack from the
same random point: the line search sees one function of the weights.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from dldr_ext import PBFGS, Trajectory


def attacked(model, inputs, labels, radius=0.1, steps=5):
    """Inputs within ``radius`` of each pixel that raise the loss."""
    start = (inputs + radius * (2 * torch.rand_like(inputs) - 1)).clamp(0, 1)
    found = start
    for _ in range(steps):
        with torch.enable_grad():  # a trial may run under torch.no_grad()
            found = found.detach().requires_grad_()
            (slope,) = torch.autograd.grad(cross_entropy(model(found), labels), found)
        found = found.detach() + 2.5 * radius / steps * slope.sign()
        found = torch.clamp(found, inputs - radius, inputs + radius).clamp(0, 1)
    return found


def robust_loss(model, inputs, labels):
    return cross_entropy(model(attacked(model, inputs, labels)), labels)


def main(epochs=6, steps=20, examples=1400):
    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    train, test = slice(0, examples), slice(1400, None)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def robust_accuracy():
        bad = attacked(model, pixels[test], labels[test], steps=20)
        return (model(bad).argmax(1) == labels[test]).float().mean().item()

    trajectory = Trajectory(model.named_parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for i, batch in enumerate(torch.randperm(examples).split(50)):
            if i % 3 == 0:
                trajectory.record()
            sgd.zero_grad()
            robust_loss(model, pixels[batch], labels[batch]).backward()
            sgd.step()
    found = {"sgd": robust_accuracy()}
    optimizer = PBFGS(model.parameters(), trajectory.subspace(dim=10))
    found["start"] = robust_accuracy()
    for _ in range(steps):
        optimizer.step(lambda: robust_loss(model, pixels[train], labels[train]))
    return found | {"pbfgs": robust_accuracy()}


if __name__ == "__main__":
    print("accuracy under attack:", main())
