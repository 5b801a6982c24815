"""The demo's training runs: batches, schedules, and an account of every image that is read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from dldr_ext import PBFGS, Subspace
from dldr_ext.demo import data, methods, recipe, run
from dldr_ext.demo.model import build


class Reader(nn.Module):
    """Counts the images that go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build(8, 0)
        self.images = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        return self.inner(x)


def test_closure_counts_every_evaluation(digits):
    """Gradients, trials (refused ones too) and curvature: what the model saw is on the account."""
    model = Reader()
    subspace = Subspace.random(model.parameters(), 5, generator=torch.Generator().manual_seed(0))
    # A first trial so long that the search has to backtrack.
    optimizer = PBFGS(model.parameters(), subspace, lr=1e3, buffers=model)
    account = recipe.Account(len(digits.train))
    images, labels = digits.train.images[:100], digits.train.labels[:100]
    for _ in range(3):
        optimizer.step(methods.counted_closure(model, images, labels, 1e-3, account))
    assert account.images == model.images == 100 * optimizer.closure_calls
    assert any(record.trials > 1 for record in optimizer.history)  # some were refused
    assert account.passes == model.images / 1197


@pytest.mark.parametrize("method", ["psgd", "pbfgs", "one_pass", "random"])
def test_run_in_a_subspace_accounts_for_all_it_reads(digits, method, monkeypatch):
    """Within the budget, batch-norm statistics included; drawing the curve is not training."""
    settings = run.Config("digits", dim=4, epochs=8).recipe
    task = methods.Task(digits, settings, 0, 8, lambda *_: None)
    readers: list[Reader] = []

    def model(self):
        readers.append(Reader())
        return readers[-1]

    monkeypatch.setattr(methods.Task, "model", model)
    monkeypatch.setattr(methods.Task, "validate", lambda self, model: 0.5)
    monkeypatch.setattr(methods, "reestimate_", lambda model, parts: [model(x) for x in parts])
    if method == "random":
        result = methods.random(task, 4)
    else:
        subspace = Subspace.random(
            Reader().parameters(), 4, generator=torch.Generator().manual_seed(0)
        )
        result = getattr(methods, method)(task, subspace)
    assert isinstance(result.model, Reader)
    assert result.passes * 1197 == pytest.approx(result.model.images, abs=1e-6)
    budget = 2 if method == "one_pass" else settings.budget
    assert budget - 1 < result.passes <= budget
    assert result.curve[-1] == (result.passes, 0.5)


def test_sgd_reads_each_image_once_an_epoch_and_records_the_first_half(digits, monkeypatch):
    settings = run.Config("digits", epochs=3, dim=4).recipe
    task = methods.Task(digits, settings, 0, 7, lambda *_: None)
    reader = Reader()
    monkeypatch.setattr(methods.Task, "model", lambda self: reader)
    monkeypatch.setattr(methods.Task, "validate", lambda self, model: 0.5)
    full, half, trajectory = methods.sgd(task)
    assert full.passes * 1197 == reader.images == 3 * 1197
    assert half.passes == pytest.approx(1.5, abs=0.01)
    assert len(trajectory) == 8
    weights = torch.cat([p.detach().reshape(-1) for p in half.model.parameters()])
    torch.testing.assert_close(trajectory.anchor + trajectory.snapshots[-1], weights)


def test_sgd_and_psgd_step_by_the_scheduled_learning_rate(digits, monkeypatch):
    """With a schedule of zeros nothing moves."""
    settings = run.Config("digits", epochs=6, dim=4).recipe
    task = methods.Task(digits, settings, 0, 4, lambda *_: None)
    monkeypatch.setattr(methods, "learning_rate", lambda recipe, done: 0.0)
    full, _, _ = methods.sgd(task)
    pairs = zip(full.model.parameters(), task.model().parameters(), strict=True)
    assert all(torch.equal(after, start) for after, start in pairs)
    parameters = task.model().parameters()
    subspace = Subspace.random(parameters, 4, generator=torch.Generator().manual_seed(0))
    assert set(methods.psgd(task, subspace).path) == {(0.0, 0.0)}


@pytest.mark.parametrize(("images", "size", "count"), [(1197, 24, 50), (1197, 400, 3), (5, 9, 1)])
def test_batches_make_whole_passes(images, size, count):
    part = data.Part(torch.zeros(images, 1, 2, 2), torch.arange(images), torch.arange(images))
    stream = recipe.batches(part, size, 0, torch.Generator().manual_seed(0))
    orders = []
    for _ in range(2):
        labels = [next(stream)[1] for _ in range(count)]
        assert max(map(len, labels)) - min(map(len, labels)) <= 1
        orders.append(torch.cat(labels))
        assert orders[-1].sort().values.tolist() == list(range(images))
    assert not torch.equal(*orders)


def test_shifted_images_are_moved_whole():
    images = torch.rand(200, 1, 6, 6) + 1
    images[:, :, :2] = images[:, :, 4:] = images[..., :2] = images[..., 4:] = 1  # a frame
    moved = recipe.shifted(images, 2, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    seen = set()
    for before, after in zip(images, moved, strict=True):
        steps = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
        found = [s for s in steps if torch.equal(before.roll(s, (1, 2)), after)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 25
    again = recipe.shifted(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)
    still = recipe.shifted(images, 0, torch.Generator().manual_seed(0))
    assert torch.equal(still, images)


@pytest.mark.parametrize(
    ("done", "share"), [(0, 1), (0.499, 1), (0.5, 0.1), (0.749, 0.1), (0.75, 0.01), (1, 0.01)]
)
def test_learning_rate(done, share):
    settings = recipe.RECIPES["digits"]
    assert recipe.learning_rate(settings, done) == pytest.approx(share * settings.lr)


@pytest.mark.parametrize(
    ("steps", "count", "expected"), [(8, 4, {2, 4, 6, 8}), (7, 3, {3, 5, 7}), (2, 9, {1, 2})]
)
def test_snapshot_steps(steps, count, expected):
    assert recipe.snapshot_steps(steps, count) == expected
