"""What runs on a machine with a GPU is tried out here: `make gpu` and its benchmarks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import gpu  # noqa: E402

from benchmarks.gpu.__main__ import measure  # noqa: E402
from benchmarks.gpu.cases import Case  # noqa: E402


def test_benchmarks_on_small_cpu_tensors(tmp_path):
    """Every case and every peer runs, and lands in the JSON file and in the table."""
    results, table = tmp_path / "bench.json", tmp_path / "bench.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--n", "3000"]
    command += ["--rounds", "2", "--d", "6", "--most", "300000"]
    subprocess.run([*command, "--json", results, "--table", table], check=True, cwd=ROOT)
    found = json.loads(results.read_text())
    rows = {row["case"]: row for row in found["results"]}
    assert not [name for name, row in rows.items() if "failed" in row or "not_run" in row]
    for part in ("project int8", "reconstruct_ bf", "residual", "line search", "8 right-hand",
                 "gram_append_", "in one block", "gram T=400", "2,000 tiny", "P-BFGS"):  # fmt: skip
        assert any(part.replace(" bf", " bfloat16") in name for name in rows), part
    assert rows["project bfloat16"]["of_ceiling"]["median"] > 0
    assert rows["project bfloat16"]["against"]["float32 mv(cat)"]["median"] > 0
    shown = table.read_text()
    assert all(f"| {name}" in shown for name in rows if name != "ceilings")


class Recorded:
    """A clock whose times are given."""

    cuda = False

    def __init__(self, times):
        self.times = times

    def rounds(self, works, count):
        return self.times[:count]


def test_fractions_and_speed_ups():
    case = Case("x", lambda: None, size=8e9, peers={"peer": lambda: None})
    clock = Recorded([[2.0, 5.0]] * 3)
    row = measure(case, clock, {"read": 5e9}, 3)
    assert row["of_ceiling"]["median"] == pytest.approx(0.8)  # 4 of 5 GB/s
    assert row["against"]["peer"]["median"] == pytest.approx(2.5)


def stage(code: str, limit: float = 60, **options) -> gpu.Stage:
    return gpu.Stage("s", [sys.executable, "-c", code], limit, **options)


def test_a_stage_passes_fails_or_is_stopped(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("")
    assert gpu.run(stage("print(1)"), 60, log).result == "passed"
    failed = gpu.run(stage("print('why'); raise SystemExit(3)"), 60, log)
    assert (failed.result, failed.note) == ("failed", "exit status 3: why")
    assert gpu.run(stage("print(1)"), 5, log).note == "no time was left"
    assert gpu.run(gpu.checker("memcheck", tmp_path / "none", None), 60, log).result == "not run"
    assert "why" in log.read_text()


def test_a_stage_past_its_limit_is_stopped(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("")
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    started = gpu.time.perf_counter()
    outcome = gpu.run(stage(deaf), 10, log)
    assert outcome.result == "failed" and outcome.note.startswith("stopped after 10 s")
    assert gpu.time.perf_counter() - started < 300  # it did not sleep on


MEMCHECK = """========= COMPUTE-SANITIZER
torch.float32: every op ran
========= Invalid __global__ read of size 4 bytes
=========     at void dldr::cuda::<unnamed>::dot_tile<float, (int)1>+0x90 in dot.cuh:1
========= ERROR SUMMARY: 1 error
"""


def test_reports_of_kernels_without_torch():
    clean = "gram: good\n" * 13 + "========= ERROR SUMMARY: 0 errors\n"
    assert gpu.cases_note(0, clean) == (True, "ERROR SUMMARY: 0 errors; 13 cases came through")
    assert gpu.cases_note(gpu.FOUND, clean)[0] is False
    assert gpu.cases_note(0, clean.replace("gram: good", "", 1))[0] is False
    assert gpu.cases_note(0, "gram: good\n" * 13)[0] is False  # no summary: it did not run
    assert gpu.planted_note(gpu.FOUND, MEMCHECK) == (True, "found")
    assert gpu.planted_note(0, MEMCHECK)[0] is False
    assert gpu.planted_note(gpu.FOUND, clean)[0] is False


def test_the_stages_fit_into_seven_minutes(tmp_path):
    """Each stage may take its whole time, and the next ones still have theirs."""
    about = {"prebuilt": True, "compute-sanitizer": "compute-sanitizer", "ncu": "ncu"}
    options = argparse.Namespace(device="cuda", out=tmp_path, cifar=None)
    stages = gpu.stages(options, about)
    assert sum(stage.limit for stage in stages) <= gpu.TOTAL == 420
    names = [stage.name for stage in stages]
    assert names.index("float64") < names.index("benchmarks") < names.index("tests")
    assert names[-1] == "training"
    options.cifar = "data"
    assert "--folder" in gpu.stages(options, about)[-1].command


@pytest.mark.parametrize("variant", gpu.VARIANTS)
def test_what_a_sweep_changes_is_in_the_sources(variant):
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").iterdir())
    for flag in gpu.VARIANTS[variant]:
        assert flag.removeprefix("-D").partition("=")[0] in text


def test_a_sweep_keeps_what_every_variant_gave(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TOOLS", tmp_path)
    for variant, script in (("as it is", "echo '{\"read\": 2}'"), ("4 packs", "exit 1")):
        program = tmp_path / gpu.variant_name(variant)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    assert gpu.sweep(tmp_path / "sweep.json") == 0
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"as it is": {"read": 2}}


def test_a_rehearsal_without_a_gpu(tmp_path):
    command = [sys.executable, ROOT / "tools" / "gpu.py", tmp_path, "--device", "cpu", "--only"]
    command += ["libraries", "float64", "sweep", "memcheck", "planted", "profile"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    results = {stage["name"]: stage["result"] for stage in found}
    assert results["libraries"] == results["float64"] == results["sweep"] == "passed"
    assert results["memcheck"] == results["planted"] == results["profile"] == "not run"
    assert len(list(tmp_path.iterdir())) <= 8


def test_reports_of_the_memory_checkers():
    clean = "========= COMPUTE-SANITIZER\n" + "dtype: every op ran\n" * 6
    good = clean + "========= ERROR SUMMARY: 0 errors\n"
    assert gpu.checker_note(0, good) == (True, "ERROR SUMMARY: 0 errors; 0 in these kernels")
    assert gpu.checker_note(0, good.replace("every op ran", "", 1))[0] is False
    assert gpu.checker_note(1, good)[0] is False
    assert gpu.checker_note(0, clean + MEMCHECK)[0] is False
    torchs = "=========     at void at::native::elementwise_kernel<...>+0x10\n"
    assert gpu.checker_note(0, clean + torchs + "========= ERROR SUMMARY: 1 error\n")[0] is True
    races = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert gpu.checker_note(0, clean + races)[0] is False
    races = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu.checker_note(0, clean + races)[0] is True
    assert gpu.checker_note(0, clean)[0] is False  # no summary: it did not run


def test_pytest_notes():
    output = "...\n=== short ===\n3 failed, 380 passed, 2 skipped in 50.1s\n"
    assert gpu.pytest_note(1, output) == (False, "3 failed, 380 passed, 2 skipped in 50.1s")
    assert gpu.pytest_note(4, "no such file") == (False, "exit status 4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu.py", tmp_path], capture_output=True, text=True
    )
    assert done.returncode != 0 and "no cuda device to run on" in done.stderr


def test_all_tests_for_the_gpu_are_in_the_files_that_are_run():
    """Also where a machine has no more than `make gpu` asks for."""
    command = [sys.executable, "-m", "pytest", "tests", "--collect-only", "-m", "cuda"]
    command += ["--ignore=tests/kernels"]  # torch-free
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    missing = ("expecttest", "hypothesis", "mlxtend", "rich", "scipy", "typer")
    listed = [path for folder in gpu.TESTS for path in gpu.test_files(folder, missing)]
    assert found <= {str(Path(path).relative_to(ROOT)) for path in listed}
