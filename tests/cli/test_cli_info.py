"""`dldr info`, `plan` and `bench`, `demo --json` and shell completion, as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import call, json_of, needs, words

import dldr_ext

pytest.importorskip("typer", reason="the commands need typer")
pytest.importorskip("rich", reason="the commands need rich")


ROOT = Path(dldr_ext.__file__).parents[1]


def test_info_says_what_is_missing_and_how_to_get_it(capsys, monkeypatch):
    from dldr_ext.cli import requirements

    found, hidden = requirements.find_spec, ("sklearn", "tensorboard")
    monkeypatch.setattr(requirements, "find_spec", lambda n: None if n in hidden else found(n))
    extras = json_of(capsys, "info")["extras"]
    expected = {"missing": ["tensorboard"], "command": "pip install tensorboard"}
    assert extras["tensorboard"] == expected
    assert "scikit-learn" in extras["demo"]["missing"]
    assert "scikit-learn" in extras["demo"]["command"].split()
    assert extras["cli"] == {"missing": [], "command": None}
    code, out, _ = call(capsys, "info")
    assert code == 0
    assert "tensorboard: pip install tensorboard" in words(out)


def test_info_names_the_extras_of_the_project():
    from dldr_ext.cli.info import _EXTRAS

    text = (ROOT / "pyproject.toml").read_text()
    for name in _EXTRAS:
        assert f"\n{name} = [" in text


def test_info_tells_why_there_is_no_cuda(capsys):
    found = json_of(capsys, "info")
    if found["cuda"]:
        assert found["cuda_library"] == "loaded"
    else:
        assert found["cuda_library"].startswith("not loaded: ")
        assert "DLDR_BUILD_CUDA=1" in found["cuda_library"]
    assert len(found["devices"]) == torch.cuda.device_count()
    assert found["packages"]["torch"] == torch.__version__
    assert found["machine"]["free_memory"] > 0


PLAN = ["plan", "--params", "7e9", "--dim", "40", "--snapshots", "80", "--dtype", "bf16"]


def test_plan_as_json(capsys):
    found = json_of(capsys, *PLAN, "--device", "h200", "--ranks", "8")
    assert found["job"]["numel"] == 7_000_000_000
    assert found["job"]["dtype"] == "bfloat16" and found["job"]["shard"] == "all"
    assert found["device"]["name"] == "NVIDIA H200 SXM" and not found["device"]["measured"]
    project = next(s for s in found["steps"] if s["name"] == "project")
    assert project["bytes"] == 7e9 / 8 * (40 * 2 + 4)
    assert project["floor"] == pytest.approx(project["bytes"] / 4.8e12)
    assert found["fits"] is False
    assert [one["changes"] for one in found["remedies"]] == [
        {"storage": "host"},
        {"dtype": "int8"},
        {"snapshots": 48, "dim": 24},
        {"ranks": 13},
    ]
    assert found["remedies"][0]["host"] == 80 * 7e9 / 8 * 2 and found["remedies"][1]["host"] == 0
    whole = json_of(capsys, *PLAN, "--device", "h200", "--ranks", "32")
    assert whole["fits"] is True and whole["remedies"] == []


@pytest.mark.parametrize("width", ["80", "120"])
def test_plan_as_tables(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    code, out, _ = call(capsys, *PLAN, "--device", "H200", "--ranks", "8")
    assert code == 0
    for word in (
        "recording",
        "form_basis",
        "P-BFGS step",
        "DDP",
        "nominal",
        "Does not fit",
        "Fits with --",
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= int(width)
    assert "…" not in out


def test_plan_measures_this_machine(capsys, monkeypatch):
    from dldr_ext.performance import timing
    from dldr_ext.plan import calibration, devices

    monkeypatch.setattr(devices, "_BUFFER", 1 << 20)
    monkeypatch.setattr(timing, "_MULTIPLY", 64)
    monkeypatch.setattr(calibration, "_ROWS", 1 << 20)
    found = json_of(capsys, "plan", "--params", "1e6", "--device", "cpu")
    assert found["device"]["measured"]
    for step in found["steps"]:
        share = found["device"]["shares"][step["name"]]
        assert step["expected"] == pytest.approx(step["floor"] / share) and share > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--params", "1.5"), "'--params': expected a whole number of at least 1, as 7e9, got 1.5"),
        (("--params", "many"), "expected a whole number of at least 1, as 7e9, got many"),
        (("--params", "inf"), "expected a whole number of at least 1, as 7e9, got inf"),
        ((), "Missing option '--params'"),
        (("--params", "9", "--dtype", "bf17"), "--dtype: expected one of float64"),
        (("--params", "9", "--dim", "81"), "--dim: expected at most 80"),
        (("--params", "9", "--storage", "tape"), "--storage"),
        (("--params", "9", "--device", "z80"), "--device: expected one of h200, h100, a100"),
        (("--params", "9", "--closure-seconds", "-1"), "--closure-seconds: expected at least 0"),
    ],
)
def test_bad_plans(capsys, arguments, message):
    code, out, err = call(capsys, "plan", *arguments)
    assert code == 2
    assert message in words(err)
    assert out == ""


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "xpu"])
def test_bench_on_devices_that_are_not_there(capsys, device):
    code, out, err = call(capsys, "bench", "--device", device)
    assert code == 2
    assert "--device: expected" in words(err) and device in words(err)
    assert out == ""


@pytest.fixture
def small_products(monkeypatch):
    from dldr_ext.performance import timing

    monkeypatch.setattr(timing, "_MULTIPLY", 64)


def test_bench_measures_every_op_in_every_format(capsys, small_products):
    before = torch.get_num_threads()
    arguments = ("bench", "--numel", "2e4", "--dim", "5", "--rounds", "2", "--threads", "1")
    found = json_of(capsys, *arguments)
    assert torch.get_num_threads() == before
    assert found["numel"] == 20_000 and found["threads"] == 1
    rows = {row["case"]: row for row in found["results"]}
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / 256)):
        for op in ("project", "reconstruct_", "gram_append_", "gram", "form_basis"):
            row = rows[f"{op} {dtype}"]
            assert row["gb_per_second"]["median"] > 0 and row["of_ceiling"]["median"] > 0
            assert row["against_torch"]["median"] > 0 and row["peer"]
        assert rows[f"gram {dtype}"]["bytes"] == pytest.approx(20_000 * 5 * size, rel=0.01)
    assert rows["read"]["gb_per_second"]["median"] > 0
    assert rows["form_basis int8"]["of_multiply"]["median"] > 0


def test_bench_as_a_table(capsys, monkeypatch, small_products):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(capsys, "bench", "--numel", "1e4", "--dim", "4", "--rounds", "2")
    assert code == 0
    assert "project bfloat16" in out and "these are not the memory's figures" in out
    assert "[quartiles]" in out and "…" not in out


def test_cases_do_what_the_peers_do():
    """What is compared is the same work."""
    from dldr_ext.performance.roofline import Problem, cases

    problem = Problem([3000, 7, 400], 6)
    todo = {case.name: case for case in cases(problem, torch.float32)}
    project = todo["project float32"]
    torch.testing.assert_close(project.work(), project.peer(), rtol=1e-4, atol=1e-3)
    for name in ("gram float32", "form_basis float32"):
        case = todo[name]
        torch.testing.assert_close(case.work().float(), case.peer(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(
        todo["gram64 float32"].work().float(), problem.torch_gram(), rtol=1e-4, atol=1e-2
    )
    reconstruct, written = todo["reconstruct_ float32"], []
    for work in (reconstruct.work, reconstruct.peer):
        work()
        written.append(torch.cat(problem.params))
        for param in problem.params:
            param.zero_()
    torch.testing.assert_close(*written)
    append, rows = todo["gram_append_ float32"], []
    for work in (append.work, append.peer):
        problem.basis[-1] = 0
        work()
        rows.append(problem.basis[-1].clone())
    torch.testing.assert_close(*rows)


def test_demo_as_json(capsys, tmp_path):
    needs("sklearn", "matplotlib")
    arguments = ["demo", "--data", "digits", "--dim", "1", "--epochs", "1", "--threads", "1"]
    found = json_of(capsys, *arguments, "--output", str(tmp_path))
    assert found == json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(capsys, monkeypatch, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = call(capsys, "--show-completion", shell)
    assert code == 0
    assert "_DLDR_COMPLETE=complete_" + shell in out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_completion_completes():
    environment = dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        _DLDR_COMPLETE="complete_bash",
        COMP_WORDS="dldr pl",
        COMP_CWORD="1",
    )
    done = subprocess.run(
        [sys.executable, "-m", "dldr_ext"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plan"]


@pytest.mark.parametrize("command", ["info", "plan", "bench", "demo"])
def test_help_has_examples(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert "Examples:" in out and f"dldr {command}" in out.split("Examples:")[1]
    assert "--json" in out


def test_root_help_tells_exit_codes(capsys):
    _, out, _ = call(capsys, "--help")
    assert "Exit codes: 0 done, 1 failed" in words(out)
    assert dldr_ext.__version__ not in out
