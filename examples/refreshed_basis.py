"""DLDR with its basis refreshed: leave the first subspace once it has given what it has.

Two further rounds of a few recorded SGD steps each, from where P-BFGS stands; then theta and H are
transferred into the subspace of the new directions. Against it: as many steps of P-BFGS in the
first subspace alone.
"""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dldr_ext import PBFGS, Trajectory


def recorded(model, inputs, labels, steps=40):
    """The trajectory of a stretch of SGD."""
    trajectory = Trajectory(model.named_parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in torch.randint(len(labels), (steps, 64)):
        trajectory.record()
        sgd.zero_grad()
        cross_entropy(model(inputs[batch]), labels[batch]).backward()
        sgd.step()
    trajectory.record()
    return trajectory


def main(steps=15, dim=10):
    torch.manual_seed(0)
    inputs = torch.randn(1000, 20)
    teacher = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    labels = teacher(4 * inputs).argmax(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(lambda: cross_entropy(model(inputs), labels))
        return cross_entropy(model(inputs), labels).item()

    subspace = recorded(model, inputs, labels).subspace(dim)
    optimizer = PBFGS(model.parameters(), subspace, theta0="current")
    train(model, optimizer, steps)

    control, twin = copy.deepcopy((model, optimizer))
    found = {"first subspace": train(control, twin, 2 * steps)}
    for _ in range(2):
        trajectory = recorded(model, inputs, labels)
        # Through the weights as they are, so that nothing jumps.
        optimizer.change_subspace(trajectory.subspace(dim).with_origin(model.parameters()))
        found["refreshed twice"] = train(model, optimizer, steps)
    return found


if __name__ == "__main__":
    print("training loss:", main())
