"""A small run of the demo from end to end: its numbers, and the configurations that it refuses."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from dldr_ext import Subspace
from dldr_ext.demo import methods, run, summary
from dldr_ext.demo.model import accuracy


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
        sampled = entry["method"] in ("psgd", "pbfgs", "one_pass")
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


def test_numbers_are_those_of_the_models(outcome, digits, config):
    """The first seed again by hand: what the test part says, and the loss on the plane."""
    results, plane = outcome
    settings = config.recipe
    task = methods.Task(digits, settings, 0, config.snapshots, lambda *_: None)
    full, _, trajectory = methods.sgd(task)
    subspace = trajectory.subspace(dim=config.dim)
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
        for method in ("sgd", "psgd", "pbfgs", "one_pass", "random", "landscape"):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "cifar"}, "data: expected mnist5k or digits, got 'cifar'"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"dim": "most"}, "dim: expected a number or 'auto', got 'most'"),
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"device": "tpu"}, "device: expected cpu or cuda, also as cuda:N, got 'tpu'"),
        ({"device": "mps"}, "device: expected cpu or cuda, also as cuda:N, got 'mps'"),
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
