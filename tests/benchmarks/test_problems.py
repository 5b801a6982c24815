"""Label noise, data and networks of the experiments."""

from __future__ import annotations

import re

import pytest
import torch
from experiment_runs import quick

from benchmarks.experiments import (
    data,
    networks,
)
from benchmarks.experiments.training import Task

# Label noise


@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
def test_noise_takes_an_exact_share_and_never_the_true_label(share):
    labels = torch.arange(10).repeat(300)
    kept = labels.clone()
    noisy = data.corrupt(labels, share, 10, torch.Generator().manual_seed(0))
    assert torch.equal(labels, kept)
    assert int((noisy != labels).sum()) == round(share * 3000)
    assert noisy.min() >= 0 and noisy.max() <= 9


def test_noise_is_symmetric_over_all_classes():
    classes = 100
    labels = torch.arange(classes).repeat(2000)
    noisy = data.corrupt(labels, 0.5, classes, torch.Generator().manual_seed(0))
    counts = torch.zeros(classes, classes)
    counts.index_put_((labels, noisy), torch.ones(len(labels)), accumulate=True)
    wrong = counts[~torch.eye(classes, dtype=torch.bool)]
    # binomial, 2000 draws of 0.5 / 99 each: mean 10.1, and no pair is left out or preferred
    assert float(wrong.mean()) == pytest.approx(1000 / 99)
    assert float(wrong.var()) == pytest.approx(1000 / 99, rel=0.1)
    assert counts.diag().min() > 850
    # not the first items only
    changed = (noisy != labels).float()
    assert abs(float(changed[: len(labels) // 2].mean()) - 0.5) < 0.01


def test_noise_is_seeded():
    labels = torch.arange(10).repeat(30)
    a, b, c = (data.corrupt(labels, 0.4, 10, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_noise_refuses_bad_input():
    with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\], got 1.2"):
        data.corrupt(torch.zeros(3, dtype=torch.int64), 1.2, 10, torch.Generator())
    with pytest.raises(ValueError, match=r"labels: expected shape \(N,\), got \(3, 2\)"):
        data.corrupt(torch.zeros(3, 2, dtype=torch.int64), 0.2, 10, torch.Generator())


def test_only_the_training_part_gets_wrong_labels(digits):
    task = Task(digits, "mlp", quick(), seed=3, noise=0.4)
    wrong = (task.problem.train.labels != digits.train.labels).float().mean()
    assert float(wrong) == pytest.approx(0.4, abs=1e-3)
    assert task.problem.validation is digits.validation and task.problem.test is digits.test


# Data and networks


def test_text_predicts_the_next_character_and_parts_are_disjoint():
    text = data.load("text")
    for part in (text.train, text.validation, text.test):
        assert torch.equal(part.inputs[:, 1:], part.labels[:, :-1])
        assert int(part.labels.max()) < text.classes
    rows = [row for part in (text.train, text.validation, text.test) for row in part.inputs]
    assert len({tuple(row.tolist()) for row in rows}) > 0.98 * len(rows)  # tables repeat


@pytest.mark.parametrize(
    ("network", "channels", "classes", "numel"),
    [("resnet20", 3, 10, 269_722), ("resnet32", 3, 100, 470_004), ("lenet", 1, 10, 61_706)],
)
def test_networks_have_the_published_sizes(network, channels, classes, numel):
    size = 28 if network == "lenet" else 32
    part = data.Part(torch.zeros(2, channels, size, size), torch.zeros(2, dtype=torch.int64))
    problem = data.Problem("images", part, part, part, classes)
    model = networks.build(network, problem, seed=0)
    assert sum(p.numel() for p in model.parameters()) == numel
    assert model(part.inputs).shape == (2, classes)


@pytest.mark.parametrize("network", networks.NAMES)
def test_networks_are_seeded_and_leave_the_random_state_alone(network, digits):
    problem = data.load("text") if network in ("chars", "gpt") else digits
    state = torch.get_rng_state()
    a, b, c = (
        torch.cat([p.reshape(-1) for p in networks.build(network, problem, s).parameters()])
        for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b) and not torch.equal(a, c)
    logits = networks.build(network, problem, 0)(problem.train.inputs[:3])
    assert logits.shape == (*problem.train.labels[:3].shape, problem.classes)


def test_characters_do_not_see_what_comes_after():
    text = data.load("text")
    model = networks.build("chars", text, 0).eval()
    inputs = text.train.inputs[:1].clone()
    before = model(inputs)
    inputs[0, 40:] = 0
    after = model(inputs)
    torch.testing.assert_close(after[0, :40], before[0, :40])
    assert not torch.allclose(after[0, 40:], before[0, 40:])


@pytest.mark.parametrize(
    ("network", "name", "message"),
    [
        ("alexnet", "digits", "network: expected one of cnn, mlp"),
        ("chars", "digits", "network: expected one for images, as in digits, got 'chars'"),
        ("mlp", "text", "network: expected one for text, as in text, got 'mlp'"),
    ],
)
def test_networks_refuse(network, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        networks.build(network, data.load(name), 0)
