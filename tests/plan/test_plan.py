"""`dldr_ext.plan`: the formulas against counts by hand, and against the memory of a real run."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dldr_ext.plan.costs import Job, plan
from dldr_ext.plan.devices import TABLE, Device, measure
from dldr_ext.plan.remedies import changes, remedies

ROOT = Path(__file__).resolve().parents[2]
EVERY = os.environ.get("DLDR_EVERY_CASE") == "1"
# One byte and one operation a second: seconds are bytes, or operations.
UNIT = Device("unit", 1e12, 1.0, 1.0, 1e12, 1e12, 1.0, 1.0, 1.0, "none")


def named(items, key="name"):
    return {getattr(item, key): item for item in items}


def test_bytes_by_hand():
    n, d, t, b = 1000, 4, 10, 2
    steps = named(plan(Job(n, d, t, trials=3), UNIT).steps)
    rows_read = sum(range(1, t + 1))  # row t reads those before it, and is written
    assert steps["record"].bytes * t == n * b * rows_read + 8 * n * t
    assert steps["gram"].bytes == n * t * b
    assert steps["gram"].flops == n * t * (t + 1)
    assert steps["form_basis"].bytes == n * b * (t + d)
    assert steps["project"].bytes == n * (d * b + 4)
    assert steps["reconstruct_"].bytes == n * (d * b + 8)
    assert steps["line-search trial"].bytes == 12 * n
    anchor = n * (d * b + 8 + 12) / 32
    assert steps["P-BFGS step"].bytes == n * (2 * d * b + 40 + 12 * 3) + anchor
    for step in steps.values():
        assert step.floor == step.bytes and step.expected is None


def test_products_bind_where_they_take_longer():
    slow = replace(UNIT, float64=1.0)
    steps = named(plan(Job(1000, 4, 10), slow).steps)
    assert steps["gram"].floor == 1000 * 10 * 11
    assert steps["form_basis"].floor == 2 * 1000 * 4 * 10


@pytest.mark.parametrize(("dtype", "size"), [("int8", 1 + 4 / 256), ("float32", 4), ("float64", 8)])
def test_formats(dtype, size):
    n, flat = 256, 8 if dtype == "float64" else 4
    steps = named(plan(Job(n, 4, 10, dtype), UNIT).steps)
    assert steps["project"].bytes == n * (4 * size + flat)


def test_memory_by_hand():
    n, d, t = 10**9, 40, 81
    found = named(plan(Job(n, d, t), UNIT).memory, "phase")
    model = 8 * n
    assert found["recording"].device == model + 4 * n + t * 2 * n
    basis = d * 2 * n
    chunk = 1 << 29
    assert found["P-BFGS"].device == model + basis + 16 * n + chunk
    assert found["forming the basis"].device == pytest.approx(
        model + 8 * n + t * 2 * n + basis + chunk
    )
    assert {m.host for m in found.values()} == {m.disk for m in found.values()} == {0.0}


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_snapshots_off_the_device(storage):
    n, t = 10**8, 81
    near = plan(Job(n, 40, t), UNIT)
    far = plan(Job(n, 40, t, storage=storage), UNIT)
    assert getattr(far.memory[0], storage) == t * 2 * n
    assert far.memory[0].device == near.memory[0].device - t * 2 * n + 9 * 2 * n
    # each row is written once, the earlier ones read once for eight
    slow = replace(UNIT, link=0.01, disk=0.01)
    record = named(plan(far.job, slow).steps)["record"]
    assert record.floor == pytest.approx(2 * n * (1 + (t + 1) / 16) / 0.01)


def test_ranks():
    job = Job(8 * 10**9, 40, 81, ranks=8)
    one = plan(Job(10**9, 40, 81), UNIT)
    shared = plan(replace(job, shard="all"), UNIT)
    basis = plan(replace(job, shard="basis"), UNIT)
    assert shared.memory == one.memory and shared.steps == one.steps
    assert basis.steps == one.steps
    assert basis.peak == one.peak + 8 * 7 * 10**9  # whole weights and gradients
    assert plan(job, UNIT).peak > 7 * one.peak
    messages = [(m.numbers, m.bytes) for m in shared.messages]
    n, share = job.numel, 7 / 8
    assert messages == [
        (n, 2 * share * n * 4),
        (41, 2 * share * 41 * 8),
        (1, 2 * share * 8),
        (82, 2 * share * 82 * 8),
        (n, share * n * 4),
        (n, share * n * 4),
        (41, 2 * share * 41 * 8),
    ]
    assert one.messages == []


def test_run_adds_up():
    found = plan(Job(1000, 4, 10, steps=7, trials=4, closure_seconds=2.0), UNIT)
    steps = named(found.steps)
    assert found.run["recording"] == 10 * steps["record"].floor
    assert found.run["P-BFGS steps"] == 7 * steps["P-BFGS step"].floor
    assert found.run["closures"] == 7 * 2.0 * 3
    assert found.run["all"] == sum(v for k, v in found.run.items() if k != "all")


def test_expected_only_where_steps_were_measured():
    some = replace(UNIT, shares={"project": 0.5, "gram": 0.25})
    steps = named(plan(Job(1000, 4, 10), some).steps)
    assert steps["project"].expected == 2 * steps["project"].floor == steps["project"].seconds
    assert steps["gram"].expected == 4 * steps["gram"].floor
    assert steps["record"].expected is None
    for device in TABLE.values():
        assert all(step.expected is None for step in plan(Job(1000, 4, 10), device).steps)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8"])
def test_shares_of_this_machine(monkeypatch, dtype):
    from dldr_ext.plan import calibration

    monkeypatch.setattr(calibration, "_ROWS", 1 << 20)
    job = Job(10**12, 4, 10, dtype, ranks=8, shard="all", storage="disk")
    found = calibration.with_shares(UNIT, job)
    steps = named(plan(job, found).steps)
    assert all(step.expected is not None for step in steps.values())
    assert min(found.shares.values()) > 0 and replace(found, shares={}) == UNIT
    assert calibration._fitting(replace(job, numel=7), "cpu") == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"numel": 0}, "numel: expected at least 1, got 0"),
        ({"dim": 81}, "dim: expected at most 80 .*, got 81"),
        ({"snapshots": 2000, "dim": 1025}, "dim: expected at most 1024 .*, got 1025"),
        ({"dtype": "bf17"}, "dtype: expected one of float64, .*, got 'bf17'"),
        ({"param_dtype": "int8"}, "param_dtype: expected one of .*, got 'int8'"),
        ({"storage": "tape"}, "storage: expected one of device, host, disk, got 'tape'"),
        ({"shard": "some"}, "shard: expected one of none, basis, all, got 'some'"),
        ({"ranks": 0}, "ranks: expected at least 1, got 0"),
        ({"trials": 0.5}, "trials: expected at least 1, got 0.5"),
        ({"closure_seconds": -1}, "closure_seconds: expected at least 0, got -1"),
    ],
)
def test_bad_jobs(changed, message):
    with pytest.raises(ValueError, match=message):
        Job(**({"numel": 1000} | changed))


def test_measured_device_is_this_machine(monkeypatch):
    from dldr_ext.performance import timing
    from dldr_ext.plan import devices

    monkeypatch.setattr(devices, "_BUFFER", 1 << 20)
    monkeypatch.setattr(timing, "_MULTIPLY", 64)
    found = measure("cpu")
    assert found.measured and found.link is None and found.memory > 1 << 20
    assert min(found.read, found.copy, found.float32, found.float64) > 1e6


def benchmark(name):
    if not (ROOT / "benchmarks").exists():
        pytest.skip("needs the folder benchmarks/ of a source checkout")
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.scaling.{name}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "job", [Job(4_000_000, 20, 41)] + EVERY * [Job(4_000_000, 24, 30, "float32")]
)
def test_peak_memory_of_a_run_is_as_planned(job):
    for phase, found in benchmark("plan_check").memory(job)["phases"].items():
        assert found["within"], (phase, found)


def test_projection_in_the_documentation_is_what_plan_says():
    projection = benchmark("projection")
    rows = projection.rows()
    assert json.loads(projection.RESULT.read_text())["rows"] == json.loads(json.dumps(rows))
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(projection.table(rows)) in page


@pytest.mark.parametrize(
    ("job", "named"),
    [
        (Job(7 * 10**9, 40, 80, ranks=8, shard="all"), ["storage", "dtype", "dim", "ranks"]),
        (Job(10**9, 40, 81, "float32"), ["dtype", "dim", "ranks"]),
        (Job(2 * 10**9, 40, 200), ["storage", "dim", "ranks"]),  # and the dtype
        (Job(3 * 10**9), ["storage", "dim", "ranks"]),  # and the dtype, and fewer directions
        (Job(70 * 10**9), ["ranks"]),
        (Job(10**9, 10, 80), ["storage", "dtype", "snapshots", "ranks"]),
        (Job(10**15), []),
        (Job(10**6), []),
    ],
)
def test_remedies_fit_and_are_the_nearest(job, named):
    device = TABLE["h200"]
    found = {}
    for planned in remedies(job, device):
        assert planned.peak <= device.memory < plan(job, device).peak
        one, changed = planned.job, changes(planned.job, job)
        kind = next(k for k in ("ranks", "storage", "dtype", "dim", "snapshots") if k in changed)
        found[kind] = one
        nearer = {
            "ranks": lambda one=one: replace(one, ranks=one.ranks - 1),
            "snapshots": lambda one=one: replace(one, snapshots=one.snapshots + 1),
            "dim": lambda one=one: replace(
                one,
                dim=one.dim + 1,
                snapshots=max(one.dim + 2, job.snapshots * (one.dim + 1) // job.dim),
            ),
        }
        if kind in nearer and len(changed) <= 2 and nearer[kind]() != job:
            assert plan(nearer[kind](), device).peak > device.memory
    assert set(found) == set(named)
