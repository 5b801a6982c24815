"""The experiments: label noise, the account of passes, resuming, CIFAR files, every command."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "experiments").is_dir():
    pytest.skip("the experiments are in the source tree only", allow_module_level=True)
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the plots need matplotlib")
sys.path.insert(0, str(ROOT))

from benchmarks.experiments import (  # noqa: E402
    cifar,
    coordinates,
    data,
    methods,
    networks,
    overhead,
    plans,
    report,
    settings,
    tune,
)
from benchmarks.experiments.__main__ import main  # noqa: E402
from benchmarks.experiments.cells import Cell, Store  # noqa: E402
from benchmarks.experiments.training import (  # noqa: E402
    Account,
    Task,
    load_lead,
    run_sgd,
    save_lead,
)


@pytest.fixture(autouse=True)
def one_thread(threads) -> None:
    """Networks this small only wait for further threads."""
    threads(1)


@pytest.fixture(scope="module")
def digits() -> data.Problem:
    return data.load("digits")


def first(count: int, problem: data.Problem) -> data.Problem:
    train = data.Part(problem.train.inputs[:count], problem.train.labels[:count])
    return replace(problem, train=train)


def quick(**options) -> settings.Settings:
    known = settings.settings("compare", "digits", "mlp", 4, Path("nowhere"))
    return replace(known, **({"dim": 6, "subspace_batch": 50, "last_batch": 50} | options))


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
    problem = data.load("text") if network == "chars" else digits
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
    for method in ("sgd", "swa", "pbfgs_last"):
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


# CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes as the real files were: protocol 2, str and bytes alike as the strings of Python 2."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def cifar_folder(
    folder: Path, name: str, items: int = 40, write: Callable[[object], bytes] = python2
) -> tuple[np.ndarray, np.ndarray]:
    """What torchvision leaves behind, with `items` images in each file."""
    inner, training, test, key = cifar._FILES[name]
    (folder / inner).mkdir(parents=True)
    random = np.random.default_rng(0)
    images, labels = [], []
    for file in [*training, test]:
        pixels = random.integers(0, 256, (items, 3072), dtype=np.uint8)
        found = random.permutation(np.arange(items) % (10 if name == "cifar10" else 100)).tolist()
        batch = {b"data": pixels, key: found, b"batch_label": b"some text"}
        (folder / inner / file).write_bytes(write(batch))
        images.append(pixels)
        labels.append(found)
    return np.stack(images), np.array(labels)


def test_the_files_of_the_tests_are_as_old_as_the_real_ones():
    text = python2({b"data": np.zeros(3, np.uint8)})
    assert text.startswith(b"\x80\x02") and b"cnumpy.core.multiarray\n_reconstruct\n" in text
    assert b"_codecs" not in text


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [python2, partial(pickle.dumps, protocol=4)], ids=["old", "new"])
def test_cifar_files_are_read(name, write, tmp_path):
    pixels, labels = cifar_folder(tmp_path, name, write=write)
    images, targets, test_images, test_targets = cifar.read(name, tmp_path)
    assert np.array_equal(images.numpy(), pixels[:-1].reshape(-1, 3, 32, 32))
    assert np.array_equal(test_images.numpy(), pixels[-1].reshape(-1, 3, 32, 32))
    assert np.array_equal(targets.numpy(), labels[:-1].reshape(-1))
    assert np.array_equal(test_targets.numpy(), labels[-1])
    problem = data.load(name, tmp_path)
    count = len(targets)
    assert (len(problem.train), len(problem.validation)) == (
        count * 9 // 10,
        count - count * 9 // 10,
    )
    assert problem.train.inputs.mean((0, 2, 3)).abs().max() < 1e-5


def test_cifar_pickles_cannot_run_anything(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    cifar_folder(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(ValueError, match=r"train: expected .*mkdir has no place in a CIFAR file"):
        cifar.read("cifar100", tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({b"data": 3})]
)
def test_other_files_are_refused(content, tmp_path):
    cifar_folder(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_3: expected a pickled batch of CIFAR images"):
        cifar.read("cifar10", tmp_path)


def test_cifar_wants_its_folder(tmp_path, capsys):
    with pytest.raises(
        ValueError, match="folder: expected the folder that holds its files for cif"
    ):
        data.load("cifar10")
    with pytest.raises(ValueError, match="folder: expected None for digits, got"):
        data.load("digits", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected it to hold cifar-10-batches-py/data_ba"):
        data.load("cifar10", tmp_path)
    command = ["compare", "--data", "cifar10", "--work", str(tmp_path / "w")]
    assert main(command) == 2
    assert "error: folder: expected the folder that holds its files" in capsys.readouterr().err


def test_augmentation_moves_and_mirrors():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8).repeat(40, 1, 1, 1)
    black = torch.tensor([-1.0, -2.0, -3.0]).view(3, 1, 1)
    moved = cifar.crop_and_flip(images, black, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images - black, (4, 4, 4, 4)) + black
    found = set()
    for image, large in zip(moved, padded, strict=True):
        options = {
            (y, x, flip): window.flip(2) if flip else window
            for y in range(9)
            for x in range(9)
            for window in [large[:, y : y + 8, x : x + 8]]
            for flip in (False, True)
        }
        places = [place for place, window in options.items() if torch.equal(window, image)]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 40 and {flip for _, _, flip in found} == {False, True}
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == set(range(9))


def test_cifar_from_the_command_line(tmp_path):
    cifar_folder(tmp_path / "data", "cifar10", items=20)
    where = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    command = ["zoo", "--data", "cifar10", "--network", "resnet8", "--seeds", "1", "--epochs", "2"]
    assert main([*command, "--folder", str(tmp_path / "data"), *where]) == 0
    runs = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert {run["data"] for run in runs} == {"cifar10"} and len(runs) == 5


# Commands


def table_rows(folder: Path, experiment: str) -> list[str]:
    parts = re.split(r"^### ", (folder / "tables.md").read_text(), flags=re.MULTILINE)
    (part,) = [part for part in parts if part.startswith(f"{experiment}:")]
    return [line for line in part.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize(
    ("experiment", "rows", "image"),
    [
        ("compare", 11, "compare-digits-mlp.png"),
        ("dims", 1 + 2 * 2, "dims-digits-mlp.png"),  # 16 snapshots: d = 5 and 10
        ("zoo", 5, "zoo.png"),
        ("noise", 5 * 4, "noise-digits-mlp.png"),
        ("finetune", 3, "finetune-digits-mlp.png"),
    ],
)
def test_commands_write_results_tables_and_plots(experiment, rows, image, tmp_path):
    command = [experiment, "--data", "digits", "--network", "mlp", "--epochs", "4"]
    command += ["--tuned", str(tmp_path / "none.json"), "--seeds", "2"]
    assert main([*command, "--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")]) == 0
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert len(results["runs"]) == 2 * rows
    for run in results["runs"]:
        assert 0 <= run["test_accuracy"] <= 1 and run["passes"] > 0 and run["cpu_seconds"] > 0
        assert run["experiment"] == experiment and run["noise"] in plans.NOISES
    assert len(table_rows(tmp_path / "o", experiment)) == rows
    assert (tmp_path / "o" / image).read_bytes().startswith(b"\x89PNG")


def test_table_figures_are_those_of_the_runs(tmp_path):
    store = Store(tmp_path)
    for seed, (sgd, other) in enumerate(((0.9, 0.91), (0.92, 0.95))):
        for method, dim, accuracy in (("sgd", None, sgd), ("pbfgs", 6, other)):
            result = {"test_accuracy": accuracy, "test_loss": 0.5, "passes": 4.0, "curve": []}
            result |= {"sampling_passes": 2.0 * (dim is not None), "cpu_seconds": 1.0}
            result |= {"numel": 1000}
            store.save(Cell("zoo", "digits", "mlp", method, dim, 0.0, seed), quick(), result)
    log = logging.getLogger("dldr_ext")
    before = log.level
    assert main(["report", "--work", str(tmp_path), "--output", str(tmp_path / "o")]) == 0
    assert log.level == before  # the caller's warnings go on
    sgd, pbfgs = table_rows(tmp_path / "o", "zoo")
    assert sgd == "| SGD |  | 91.00 ± 1.41 |  | 0.500 ± 0.000 | 4.0 | 0 | 1.0 |"
    assert pbfgs == "| P-BFGS | 6 | 93.00 ± 2.83 | 2.00 ± 1.41 | 0.500 ± 0.000 | 4.0 | 2 | 1.0 |"


def test_tables_mix_no_settings(tmp_path):
    store = Store(tmp_path)
    result = {"test_accuracy": 0.9, "test_loss": 0.5, "passes": 4.0, "curve": [], "numel": 9}
    result |= {"sampling_passes": 0.0, "cpu_seconds": 1.0}
    for seed, lr in ((0, 0.1), (1, 0.1), (0, 0.2), (2, 0.2)):
        store.save(Cell("zoo", "digits", "mlp", "sgd", None, 0.0, seed), quick(lr=lr), result)
    found = report.collect(store, tmp_path / "none.json")
    assert [run["seed"] for run in found["runs"]] == [0, 2]
    assert found["settings"]["zoo/digits/mlp"]["lr"] == 0.2


class Unreadable:
    """A test part that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError("the test part was read")


def test_tuning_chooses_by_validation_and_never_reads_the_test_part(tmp_path, monkeypatch, digits):
    hidden = replace(first(200, digits), test=Unreadable())
    monkeypatch.setattr(tune.data, "load", lambda name, folder: hidden)
    path = tmp_path / "tuned.json"
    plan = plans.Plan("finetune", "digits", "mlp", epochs=2, tuned=path)
    lines = []
    tune.tune(plan, Store(tmp_path), lines.append)
    entry = json.loads(path.read_text())["plain/digits/mlp"]
    assert min(tune.SEEDS) >= 100
    assert [t["seeds"] for t in entry["tried"]] == [1] * 3 + [3] * 18
    assert len(lines) == len(entry["tried"]) == 3 + 6 + 6 + 6
    for method in ("sgd", "pbfgs", "tuned_pbfgs"):
        tried = [t for t in entry["tried"] if t["method"] == method]
        best = max(tried, key=lambda t: (t["validation_accuracy"], -t["validation_loss"]))
        assert best["options"].items() <= entry["chosen"].items()
    used = settings.settings("compare", "digits", "mlp", tuned=path)
    assert used.lr == entry["chosen"]["lr"]
    assert used.subspace_batch == entry["chosen"]["subspace_batch"]
    assert settings.settings("noise", "digits", "mlp", tuned=path).dim == 5  # tuned on its own
    tune.tune(plan, Store(tmp_path), lines.append)
    assert len(lines) == 21  # nothing was left to try


def test_tuning_from_the_command_line(tmp_path):
    path = tmp_path / "tuned.json"
    command = ["tune", "noise", "--data", "digits", "--network", "mlp", "--epochs", "2"]
    assert main([*command, "--tuned", str(path), "--work", str(tmp_path / "w")]) == 0
    assert "sampled" in json.loads(path.read_text())["noise/digits/mlp"]["chosen"]


def test_committed_options_are_known():
    for entry, content in tune.read(settings.TUNED).items():
        kind, name, network = entry.split("/")
        experiment = "noise" if kind == "noise" else "compare"
        used = settings.settings(experiment, name, network)
        for option, value in content["chosen"].items():
            assert getattr(used, option) == value
        assert set(content["chosen"]) <= settings.names()


def test_sgd_rate_falls_at_the_milestones():
    s = quick(lr=0.1, milestones=(0.5, 0.75))
    rates = [s.rate(done) for done in (0, 0.49, 0.5, 0.74, 0.75, 0.99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_published_recipes():
    for name, network, epochs, sampled, passes in (
        ("cifar10", "resnet20", 150, 80, 20),
        ("cifar100", "resnet32", 200, 100, 20),
    ):
        assert plans.Plan("compare", name).problems() == [(name, network)]
        s = settings.settings("compare", name, network)
        assert (s.epochs, s.sampled_epochs, s.passes) == (epochs, sampled, passes)
        assert (s.batch, s.lr, s.weight_decay, s.dim) == (128, 0.1, 1e-4, 40)
        assert s.subspace_batch == 1024


def test_overhead_takes_the_closure_off(tmp_path, monkeypatch):
    command = ["overhead", "--network", "resnet8", "--batch", "8", "--size", "8", "--dim", "5"]
    command += ["--rounds", "3", "--work", str(tmp_path), "--output", str(tmp_path / "o")]
    assert main(command) == 0
    found = json.loads((tmp_path / "o/results.json").read_text())["overhead"]
    assert len(found["ratios"]) == 3 and all(ratio > 0 for ratio in found["ratios"])
    assert all(calls >= 2 for calls in found["closure_calls"])
    assert "### overhead: resnet8" in (tmp_path / "o/tables.md").read_text()


def test_overhead_is_the_steps_time_less_the_closures(monkeypatch):
    """A clock that moves in forward and backward passes alone finds no overhead."""
    now = [0.0]
    forward = overhead.functional.cross_entropy

    def slow(*arguments):
        now[0] += 1.0
        return forward(*arguments)

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(overhead.functional, "cross_entropy", slow)
    found = overhead.measure("resnet8", batch=4, size=8, dim=3, rounds=2, threads=1)
    assert found["ratios"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["zoo", "--epochs", "-1"], "epochs: expected at least 1, got -1"),
        (["compare", "--epochs", "3"], "epochs: expected at least 4, got 3"),
        (["compare", "--data", "text", "--network", "mlp"], "network: expected one for text"),
        (["overhead", "--rounds", "0"], "rounds: expected at least 1, got 0"),
    ],
)
def test_commands_refuse(arguments, message, tmp_path, capsys):
    where = ["--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")]
    assert main([*arguments, *where]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
