"""What to make of checkpoints: the last, a greedy soup, their mean, or a trained average."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from dldr_ext import InSubspace, greedy_soup, layer_groups, uniform_soup, weight_averaging_subspace
from dldr_ext.batch_norm import reestimated


def main(epochs=12, steps=60):
    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    train, held_out, test = slice(0, 1100), slice(1100, 1400), slice(1400, None)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def accuracy(part, state):
        model.load_state_dict(state)
        # Statistics of an average are no average.
        with reestimated(model, [pixels[train]]), torch.no_grad():
            return (model(pixels[part]).argmax(1) == labels[part]).float().mean().item()

    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    checkpoints = []
    for _ in range(epochs):
        for batch in torch.randperm(1100).split(25):
            sgd.zero_grad()
            cross_entropy(model(pixels[batch]), labels[batch]).backward()
            sgd.step()
        checkpoints.append({name: value.clone() for name, value in model.state_dict().items()})

    found = {"last": accuracy(test, checkpoints[-1])}
    soup = greedy_soup(checkpoints, lambda state: accuracy(held_out, state))
    found["greedy soup"] = accuracy(test, soup.state_dict)
    found["uniform soup"] = accuracy(test, uniform_soup(checkpoints))

    # Weights of their own for each layer, trained with Adam, from the mean on.
    space = weight_averaging_subspace(checkpoints, model, groups=layer_groups(model))
    optimizer = InSubspace(model.parameters(), space, torch.optim.Adam, lr=0.05)
    for _ in range(steps):
        batch = torch.randint(1100, (100,))
        optimizer.step(lambda: cross_entropy(model(pixels[batch]), labels[batch]))  # noqa: B023
    return found | {"trained average": accuracy(test, model.state_dict())}


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name}: {share:.3f}")
