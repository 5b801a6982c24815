"""The account of passes, and experiments that are killed and go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experiment_runs import first, quick

from benchmarks.experiments import (
    coordinates,
    methods,
    networks,
    plans,
)
from benchmarks.experiments.cells import Cell, Store
from benchmarks.experiments.progress import Progress
from benchmarks.experiments.sgd import load_lead, run_sgd, save_lead
from benchmarks.experiments.training import Account, Batches, Task

# The account


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many items go through any network while an account's clock runs."""
    found, inside = [0], [False]
    enter, leave, build = Account.__enter__, Account.__exit__, networks.build

    def entered(self):
        inside[0] = True
        return enter(self)

    def left(self, *rest):
        inside[0] = False
        leave(self, *rest)

    def count(module, inputs):
        found[0] += len(inputs[0]) if inside[0] else 0

    def watched(*arguments, **keywords):
        model = build(*arguments, **keywords)
        model.register_forward_pre_hook(count)
        return model

    monkeypatch.setattr(Account, "__enter__", entered)
    monkeypatch.setattr(Account, "__exit__", left)
    monkeypatch.setattr(networks, "build", watched)
    return found


@pytest.mark.parametrize("network", ["mlp", "cnn"])  # without and with batch norm
@pytest.mark.parametrize("method", [m for m in methods.METHODS if m not in ("sgd", "sgd_half")])
def test_everything_that_is_read_is_on_the_account(method, network, digits, counted):
    task = Task(first(300, digits), network, quick(), seed=0)
    lead = run_sgd(task)
    assert counted[0] == lead.accounts["final"].images == 4 * 300
    outcome = methods.METHODS[method](task, lead)
    assert outcome.account.seconds > 0 and outcome.account.cpu_seconds > 0
    before = {
        "trained": lead.accounts["final"].images,
        "swa": lead.accounts["half"].images,
        "sgd_sampled": 2 * 300,
        "ema": lead.accounts["final"].images,
        "mean_last": lead.accounts["final"].images,
        "tuned_pbfgs": -round(300 * (outcome.sampling - 4)),
    }.get(method, 0)
    if method == "twa":
        before = -2 * 300  # the checkpoints, which are in outcome.sampling
        assert outcome.sampling == 4
    assert outcome.account.images == counted[0] - 1200 + before


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_subspace_methods_stay_within_half_of_the_passes(network, digits):
    s = quick(epochs=8, subspace_batch=100, last_batch=100)
    task = Task(first(300, digits), network, s, seed=0)
    lead = run_sgd(task)
    for method in ("psgd", "pbfgs", "pbfgs_last", "random"):
        outcome = methods.METHODS[method](task, lead)
        assert 2 < outcome.account.passes <= 4
    early = methods.METHODS["pbfgs_early"](task, lead)
    assert early.sampling == 2 and early.sampling + early.account.passes <= 5


def test_averaged_coordinates_are_the_mean_of_the_last_ones(digits, monkeypatch):
    task = Task(first(300, digits), "cnn", quick(averages=0.5), seed=0)
    lead, thetas = run_sgd(task), []
    step = coordinates.PBFGS.step

    def kept(self, closure):
        loss = step(self, closure)
        thetas.append((run.done, self.theta))
        return loss

    monkeypatch.setattr(coordinates.PBFGS, "step", kept)
    subspace = coordinates.principal(lead.weights(2), 6)
    run = coordinates.Run(task, subspace, 5, 2, decay=0.0, averages=0.5)
    outcome = coordinates.run_pbfgs(run, 50)
    last = torch.stack([theta for done, theta in thetas if done >= 0.5])
    assert 2 <= len(last) < len(thetas)
    found = subspace.coordinates(outcome.model.parameters())
    torch.testing.assert_close(found, last.mean(0), rtol=1e-4, atol=1e-4)


def test_batches_hold_every_item_once(digits):
    task = Task(first(301, digits), "mlp", quick(), seed=0)
    stream = task.batches(64, 0)
    passed = [next(stream) for _ in range(5)]
    assert sum(len(labels) for _, labels in passed) == 301
    seen = torch.cat([inputs for inputs, _ in passed]).flatten(1)
    sums, expected = seen.sum(1).sort().values, task.problem.train.inputs.flatten(1).sum(1)
    assert torch.equal(sums, expected.sort().values)
    whole = next(task.batches(0, 0))
    assert whole[1] is task.problem.train.labels


def test_the_lead_survives_its_files(digits, tmp_path):
    task = Task(first(200, digits), "cnn", quick(), seed=0)
    lead = run_sgd(task)
    assert load_lead(task, tmp_path / "lead") is None
    save_lead(lead, tmp_path / "lead")
    other = load_lead(task, tmp_path / "lead")
    for method in ("sgd", "swa", "ema", "mean_last", "pbfgs_last"):
        a, b = (methods.METHODS[method](task, found) for found in (lead, other))
        assert a.account.images == b.account.images
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)


# Resuming


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    plan = plans.Plan("zoo", "digits", "mlp", seeds=2, epochs=2)
    whole = Store(tmp_path / "whole")
    plans.run(plan, whole, lambda line: None)

    store, lines = Store(tmp_path / "killed"), []

    def kill(line):
        lines.append(line)
        if len(lines) == 3:
            raise Killed

    with pytest.raises(Killed):
        plans.run(plan, store, kill)
    done = {path.name: path.read_text() for path in (tmp_path / "killed/cells").iterdir()}
    assert len(done) == 3
    # what a kill in the middle of a write leaves behind
    (tmp_path / "killed/cells/zoo-digits-mlp-pbfgs-d8-n0-s1.part").write_text('{"cell": ')
    calls = []
    original = plans.run_sgd
    monkeypatch.setattr(plans, "run_sgd", lambda task: calls.append(task.seed) or original(task))
    plans.run(plan, store, lines.append)
    assert calls == [1]  # the run of SGD of the first seed was kept
    assert len(lines) == len(list(plan.cells())) == 10
    for name, text in done.items():
        assert (tmp_path / "killed/cells" / name).read_text() == text
    found = {str(one["cell"]): one for one in store.all()}
    for a in whole.all():
        b = found.pop(str(a["cell"]))
        for key in ("test_accuracy", "test_loss", "passes", "curve"):
            assert a["result"][key] == b["result"][key]
    assert not found
    plans.run(plan, store, lines.append)
    assert len(lines) == 10  # nothing was left to do


def test_other_settings_are_run_anew(tmp_path):
    cell = Cell("compare", "digits", "mlp", "pbfgs", 6, 0.0, 0)
    store = Store(tmp_path)
    store.save(cell, quick(), {"test_accuracy": 0.5})
    assert store.load(cell, quick()) == {"test_accuracy": 0.5}
    assert store.load(cell, quick(lr=0.3)) is None
    assert store.load(replace(cell, seed=1), quick()) is None
    assert store.lead(cell, quick()) == store.lead(cell, quick(subspace_batch=9))
    assert store.lead(cell, quick()) != store.lead(cell, quick(lr=0.3))


class Dying(Progress):
    """Writes at every occasion; the process ends at one of them."""

    def __init__(self, path, die_at=0):
        super().__init__(path, seconds=0.0)
        self.left = die_at

    def save(self, stage, state):
        super().save(stage, state)
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize(
    "method",
    [
        "lead",
        "sgd_cosine",
        "swa",
        "twa",
        "psgd",
        "one_pass",
        "pbfgs",
        "pbfgs_published",
        "tuned_sgd",
    ],
)
@pytest.mark.parametrize("die_at", [1, 2])
def test_a_run_killed_in_its_middle_goes_on_there(method, die_at, digits, tmp_path):
    """With batch norm, moved images and averaged coordinates: to the bit."""

    def moved(batch, generator):
        return batch.roll(int(torch.randint(3, (), generator=generator)), 3)

    problem = replace(first(200, digits), augment=moved)
    settings = quick(subspace_batch=50, epochs=10, batch=25, bfloat16=True)
    lead = run_sgd(Task(problem, "cnn", settings, seed=0))

    def states(progress):
        task = Task(problem, "cnn", settings, seed=0)
        task.progress = progress
        if method == "lead":
            found = run_sgd(task)
            rest = {"rows": found.rows, "ends": found.ends, **found.momenta}
            rest |= {f"{key:g}": average for key, average in found.averages.items()}
            return found.curve, found.accounts["half"].images, found.states["final"] | rest
        found = methods.METHODS[method](task, lead)
        return found.curve, found.account.images, found.model.state_dict()

    curve, images, weights = states(Progress())
    path = tmp_path / "run"
    if method == "one_pass" and die_at == 2:  # it is validated once
        return
    with pytest.raises(Killed):
        states(Dying(path, die_at))
    assert list(tmp_path.iterdir())
    again = states(Dying(path))
    assert (curve, images) == again[:2]
    for name, value in weights.items():
        assert torch.equal(value, again[2][name]), name


def test_progress_of_other_settings_is_not_taken_up(tmp_path):
    path = tmp_path / "run-n0"
    Progress(path, {"lr": 0.1}, seconds=0.0).save("sgd", lambda: {"step": 3})
    assert Progress(path, {"lr": 0.1}).load("sgd") == {"step": 3}
    assert Progress(path, {"lr": 0.1}).load("coordinates") is None
    assert Progress(path, {"lr": 0.2}).load("sgd") is None
    Progress(path).clear()
    assert Progress(path, {"lr": 0.1}).load("sgd") is None
    Progress(path, seconds=60.0).save("sgd", lambda: {"step": 3})
    assert not list(tmp_path.iterdir())


def test_batches_go_on_from_any_place(digits):
    def noisy(batch, generator):
        return batch + torch.randn(batch.shape, generator=generator)

    problem = replace(first(90, digits), augment=noisy)
    whole = Batches(problem, 30, seed=1)
    drawn = [next(whole) for _ in range(7)]
    for taken in (2, 3, 5):
        later = Batches(problem, 30, seed=1)
        later.taken = taken
        for inputs, labels in drawn[taken:]:
            found = next(later)
            assert torch.equal(found[0], inputs) and torch.equal(found[1], labels)


def test_averages_are_the_best_on_the_validation_part(digits):
    task = Task(first(300, digits), "cnn", quick(epochs=8), seed=0)
    lead = run_sgd(task)
    assert len(lead.ends) == 4
    found = methods.mean_last(task, lead)
    assert found.notes == {"epochs": 3}
    weights = torch.cat([p.detach().reshape(-1) for p in found.model.parameters()])
    torch.testing.assert_close(weights, lead.ends[-3:].mean(0))
    assert methods.ema(task, lead).notes["decay"] in lead.averages
