"""Every command of the experiments: results, tables, plots, tuning."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from accessibility import problems
from experiment_runs import first, quick, table_rows

from benchmarks.experiments import (
    overhead,
    plans,
    report,
    settings,
    tune,
)
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.cells import Cell, Store


@pytest.mark.parametrize(
    ("experiment", "rows", "image"),
    [
        ("compare", 11, "compare-digits-mlp.png"),
        ("dims", 1 + 2 * 2, "dims-digits-mlp.png"),  # 16 snapshots: d = 5 and 10
        ("zoo", 5, "zoo.png"),
        ("noise", 5 * 4, "noise-digits-mlp.png"),
        ("finetune", 3, "finetune-digits-mlp.png"),
        ("real", 12, "real-digits-mlp.png"),
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
    page = (tmp_path / "o/report.html").read_text()
    assert problems(page) == [] and f'<a href="{image}">' in page
    assert str(len(results["runs"])) in page


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
        (["real", "--methods", "adam"], "methods: expected some of sgd, sgd_half"),
        (["zoo", "--threads", "0"], "threads: expected at least 1, got 0"),
        (["overhead", "--rounds", "0"], "rounds: expected at least 1, got 0"),
    ],
)
def test_commands_refuse(arguments, message, tmp_path, capsys):
    where = ["--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")]
    assert main([*arguments, *where]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
