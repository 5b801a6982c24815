"""Everything that needs an NVIDIA GPU, in one run under nine minutes: `make gpu OUT=folder`.

Builds in place for the GPU at hand with the interpreter that runs this (no virtual environment, no
download), runs the tests marked `cuda`, the benchmarks, the demo and NVIDIA's memory checkers. Each
stage has its own time limit, and none stops the others. Into the folder go report.md, gpu.json,
bench.json (for benchmarks/results/cuda.json), demo.json and log.txt; the exit status is the number
of stages that failed. `--device cpu` tries all of it out without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402

# Folders of tests/.
TESTS = {
    "tests: ops": "ops",
    "tests: bits, streams, training": "cuda",
    "tests: subspaces": "subspace",
}
TOTAL = 525  # seconds for all stages
# memcheck and racecheck watch our kernels alone; initcheck must see who wrote what is read
CHECKERS = {"memcheck": ["--kernel-name", "kns=dldr"], "racecheck": ["--kernel-name", "kns=dldr"],
            "initcheck": ["--check-api-memory-access", "no"]}  # fmt: skip


@dataclass
class Stage:
    """What to run, for how long at most, and what to say of its output."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], tuple[bool, str]] | None = None


@dataclass
class Outcome:
    name: str
    result: str  # passed, failed, not run
    seconds: float
    note: str


def stages(options: argparse.Namespace, about: dict) -> list[Stage]:
    python, cpu = sys.executable, options.device == "cpu"
    scratch = ROOT / "build" / "gpu"
    small = [python, str(ROOT / "tests" / "support" / "small_ops.py"), "--device", options.device]
    # Warnings of other packages must not fail a test here, nor their pytest plugins.
    pytest = [python, "-m", "pytest", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider"]
    pytest += ["--durations=5", "--tb=short", "--maxfail=40"]
    own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"DLDR_CUDA_TESTS_ON": "cpu"} if cpu else {})
    bench = [python, "-m", "benchmarks.gpu", "--device", options.device]
    bench += ["--json", str(options.out / "bench.json"), "--table", str(scratch / "bench.md")]
    bench += ["--n", "20000", "--rounds", "3"] if cpu else []
    demo = [python, str(ROOT / "tools" / "gpu_demo.py"), options.device, str(scratch / "demo")]
    demo += [str(options.out / "demo.json")] + (["2"] if cpu else [])
    arch = about.get("capability", "9.0")
    return [
        Stage(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            170,
            {
                "TORCH_CUDA_ARCH_LIST": arch,
                "DLDR_BUILD_CUDA": "auto" if cpu else "1",
                "MAX_JOBS": str(os.cpu_count()),
            },
        ),
        *(
            Stage(name, [*pytest, *test_files(folder)], 130, own, pytest_note)
            for name, folder in TESTS.items()
        ),
        Stage("benchmarks", bench, 190),
        Stage("demo", demo, 60),
        *(checker(name, small, about.get("compute-sanitizer")) for name in CHECKERS),
    ]


def checker(name: str, small: list[str], program: str | None) -> Stage:
    """One of compute-sanitizer's tools over every op on small inputs."""
    if program is None:
        return Stage(name, [], 0)
    command = [program, "--tool", name, "--report-api-errors", "no", "--show-backtrace", "no"]
    command += [*CHECKERS[name], "--print-limit", "20", *small]
    # Every tensor in an allocation of its own: else the next one takes an out-of-bounds access in.
    return Stage(name, command, 60, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, checker_note)


def pytest_note(status: int, output: str) -> tuple[bool, str]:
    last = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return status == 0, last[-1].strip("= ") if last else f"exit status {status}"


def checker_note(status: int, output: str) -> tuple[bool, str]:
    """Passed if the ops ran through and no report names one of our kernels."""
    ours = [line for line in output.splitlines() if re.match(r"=+ +(at|in) .*dldr", line)]
    races = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", output)
    found = len(ours) + sum(map(int, races))
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    ran = output.count("every op ran") == 6
    note = "; ".join(line.strip("= ") for line in summary) or f"exit status {status}"
    return (
        ran and status == 0 and bool(summary) and found == 0,
        note + ("" if ran else "; the ops did not run through") + f"; {found} in these kernels",
    )


def run(stage: Stage, limit: float, log: Path) -> Outcome:
    """Runs a stage with its whole process group under a limit; its output goes to the log."""
    if not stage.command:
        return Outcome(stage.name, "not run", 0.0, "compute-sanitizer is not on this machine")
    if limit < 10:
        return Outcome(stage.name, "not run", 0.0, "no time was left")
    start = time.perf_counter()
    with log.open("a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
    begin = log.stat().st_size
    late = False
    with log.open("a") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=os.environ | stage.environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        # An interrupt first: pytest then says how far it came.
        for patience, number in ((limit, signal.SIGINT), (5, signal.SIGKILL), (None, None)):
            try:
                status = process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                late = True
                os.killpg(process.pid, number)
    seconds = time.perf_counter() - start
    with log.open("rb") as file:
        file.seek(begin)
        output = file.read().decode(errors="replace")
    good, note = stage.judge(status, output) if stage.judge else (status == 0, "")
    if not good and not note:
        lines = [line for line in output.splitlines() if line.strip()]
        note = f"exit status {status}: {lines[-1][:150] if lines else 'no output'}"
    if late:
        good, note = False, f"stopped after {limit:.0f} s; {note}"
    return Outcome(stage.name, "passed" if good else "failed", round(seconds, 1), note)


def describe(device: str) -> dict:
    """Device, driver, releases and commit, from a process of its own."""
    code = (
        "import json, torch; from benchmarks.gpu.machine import machine;"
        f"print(json.dumps(machine(torch.device({device!r}), False)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"no {device} device to run on:\n{done.stderr}")
    about = json.loads(done.stdout.splitlines()[-1])
    about["python"] = sys.version.split()[0]
    try:
        toolkit = cuda_toolkit.ask(cuda_toolkit.find_nvcc())
    except cuda_toolkit.CannotBuild as reason:
        return about | {"nvcc": str(reason)}
    beside = Path(toolkit.home) / "bin" / "compute-sanitizer"
    found = shutil.which("compute-sanitizer") or (str(beside) if beside.is_file() else None)
    if device == "cuda" and found:
        about["compute-sanitizer"] = found
    return about | {"nvcc": f"{toolkit.nvcc}, CUDA {toolkit.version}"}


def report(about: dict, outcomes: list[Outcome]) -> str:
    lines = [f"# {about['device']}\n"]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "device"]
    lines += ["", "| stage | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.result} | {o.seconds:.0f} | {o.note} |" for o in outcomes]
    table = ROOT / "build" / "gpu" / "bench.md"
    if table.is_file():
        lines += ["", table.read_text()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the results; made where missing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", help="stages whose names begin so")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all stages together")
    options = parser.parse_args()
    start = time.perf_counter()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(ROOT / "build" / "gpu", ignore_errors=True)
    (ROOT / "build" / "gpu").mkdir(parents=True)
    missing = [name for name in ("ninja", "pytest", "setuptools") if not _has(name)]
    if missing:
        sys.exit(f"{sys.executable} has no {', '.join(missing)}")
    about = describe(options.device)
    log = options.out / "log.txt"
    log.write_text(json.dumps(about, indent=1) + "\n")
    outcomes: list[Outcome] = []
    for stage in stages(options, about):
        if options.only and not stage.name.startswith(tuple(options.only)):
            continue
        left = options.seconds - (time.perf_counter() - start)
        outcome = run(stage, min(stage.limit, left), log)
        outcomes.append(outcome)
        took = f"{outcome.seconds:6.1f} s"
        print(f"{outcome.result:8} {took}  {stage.name}: {outcome.note}", flush=True)
        # After each stage: what is stopped from outside has left what came before.
        results = about | {"stages": [asdict(one) for one in outcomes]}
        (options.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "report.md").write_text(report(about, outcomes))
    print("\n" + report(about, outcomes))
    print(f"{time.perf_counter() - start:.0f} s in all; results in {options.out}")
    return sum(outcome.result == "failed" for outcome in outcomes)


def test_files(folder: str, missing: Collection[str] = ()) -> list[str]:
    """Files of a folder of tests/ that import nothing that this machine lacks, or `missing`."""
    files = []
    for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
        names = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        lacks = [name for name in names if name in missing or not _importable(name)]
        files += [] if lacks else [str(path)]
    return files


def _importable(module: str) -> bool:
    ours = module == "dldr_ext" or (ROOT / "tests" / "support" / f"{module}.py").exists()
    return ours or importlib.util.find_spec(module) is not None


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None or shutil.which(module) is not None


if __name__ == "__main__":
    sys.exit(main())
