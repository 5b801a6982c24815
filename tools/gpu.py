"""Everything that needs an NVIDIA GPU, in one run under seven minutes: `make gpu OUT=folder`.

Runs with the interpreter that runs this (no virtual environment, no download). `make gpu-build
ARCH=9.0`, on any machine with nvcc, builds beforehand what is to be taken along: the libraries
(which are built on the GPU's machine only where they do not load there), and in build/gpu-tools the
kernels in programs without torch. Then come a comparison of every op with float64, bandwidths of
the machine and of variants of the kernels, the roofline of every op and whole steps, NVIDIA's
checkers, a profile, the tests marked `cuda`, and training with what time is left (CIFAR-10 with
`--cifar FOLDER`, else the demo).

Each stage has its own time limit, all of them together are the total, and none stops the others.
Into the folder go report.md, gpu.json, sweep.json, bench.json (for benchmarks/results/cuda.json),
demo.json or cifar.json, and log.txt; the exit status is the number of stages that failed.
`--device cpu` tries all of it out without a GPU.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402

# Folders of tests/, those first that say most if time runs out.
TESTS = ("ops", "cuda", "subspace")
TOTAL = 420  # seconds for all stages
TOOLS = ROOT / "build" / "gpu-tools"
# The constants of `project` that are tried: benchmarks/gpu/sweep.cu, built with these.
VARIANTS = {
    "as it is": [],
    "tile 4096": ["-DDLDR_DOT_TILE=4096"],
    "2 blocks": ["-DDLDR_DOT_BLOCKS=2"],
    "4 blocks": ["-DDLDR_DOT_BLOCKS=4"],
    "4 packs": ["-DDLDR_DOT_PACKS=4"],
}
CHECKERS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # exit status of a checker that found something


@dataclass
class Stage:
    """What to run, for how long at most, and what to say of its output."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], tuple[bool, str]] | None = None
    missing: str = "compute-sanitizer, or build/gpu-tools, is not on this machine"


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
    pytest += ["-p", "xdist", "-n", "4", "--dist", "worksteal"] if _has("xdist") else []
    own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"DLDR_CUDA_TESTS_ON": "cpu"} if cpu else {})
    tests = [path for folder in TESTS for path in test_files(folder)]
    bench = [python, "-m", "benchmarks.gpu", "--device", options.device, "--seconds", "80"]
    bench += ["--ceilings", str(options.out / "sweep.json")]
    bench += ["--json", str(options.out / "bench.json"), "--table", str(scratch / "bench.md")]
    bench += ["--n", "20000", "--rounds", "3"] if cpu else []
    cases, sweep = TOOLS / "cases", TOOLS / variant_name("as it is")
    profiler, ncu = about.get("ncu"), []
    if profiler and sweep.is_file():
        metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,"
        metrics += "sm__inst_issued.avg.pct_of_peak_sustained_active"
        ncu = [profiler, "--metrics", metrics, "--kernel-name", "regex:dot_chunk|read_all"]
        ncu += ["--launch-count", "12", str(sweep), str(2 << 30)]
    return [
        libraries(about, cpu),
        Stage("float64", [*small, "--exact"], 30),
        Stage(
            "sweep",
            [python, str(ROOT / "tools" / "gpu.py"), "--sweep", str(options.out / "sweep.json")],
            40,
        ),
        Stage("benchmarks", bench, 110),
        *(checker(name, cases, about.get("compute-sanitizer")) for name in CHECKERS),
        planted(cases, about.get("compute-sanitizer")),
        initcheck(small, about.get("compute-sanitizer")),
        Stage("profile", ncu, 20, missing="ncu, or build/gpu-tools, is not on this machine"),
        Stage("tests", [*pytest, *tests], 80, own, pytest_note),
        training(options, scratch),
    ]


def libraries(about: dict, cpu: bool) -> Stage:
    """The libraries as they were brought along; else they are built for the GPU at hand."""
    if about["prebuilt"]:
        return Stage("libraries", [sys.executable, "-c", _BUILD_INFO], 20)
    environment = {
        "TORCH_CUDA_ARCH_LIST": about.get("capability", "9.0"),
        "DLDR_BUILD_CUDA": "auto" if cpu else "1",
        "MAX_JOBS": str(os.cpu_count()),
    }
    return Stage(
        "libraries", [sys.executable, "setup.py", "build_ext", "--inplace"], 170, environment
    )


def training(options: argparse.Namespace, scratch: Path) -> Stage:
    """CIFAR-10 where its folder is named, each finished run kept; else the demo."""
    python, cpu = sys.executable, options.device == "cpu"
    if options.cifar:
        command = [python, "-m", "benchmarks.experiments", "compare", "--data", "cifar10"]
        command += ["--folder", options.cifar, "--seeds", "1", "--device", options.device]
        return Stage("training", [*command, "--output", str(scratch / "cifar")], 35)
    command = [python, str(ROOT / "tools" / "gpu_demo.py"), options.device, str(scratch / "demo")]
    command += [str(options.out / "demo.json")] + (["2"] if cpu else [])
    return Stage("training", command, 35)


def checker(name: str, cases: Path, program: str | None) -> Stage:
    """One of compute-sanitizer's tools over every kernel on small inputs, without torch."""
    if program is None or not cases.is_file():
        return Stage(name, [], 15)
    command = [program, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    return Stage(name, [*command, str(cases), "small"], 15, judge=cases_note)


def planted(cases: Path, program: str | None) -> Stage:
    """That a read behind the last row is found."""
    if program is None or not cases.is_file():
        return Stage("planted", [], 10)
    command = [program, "--tool", "memcheck", "--error-exitcode", str(FOUND), str(cases), "planted"]
    return Stage("planted", command, 10, judge=planted_note)


def initcheck(small: list[str], program: str | None) -> Stage:
    """Reads of memory that nobody wrote; that of the program without torch is not watched."""
    if program is None:
        return Stage("initcheck", [], 30)
    command = [
        program,
        "--tool",
        "initcheck",
        "--report-api-errors",
        "no",
        "--show-backtrace",
        "no",
    ]
    command += ["--check-api-memory-access", "no", "--print-limit", "20", *small]
    # Every tensor in an allocation of its own: else the next one takes a wrong access in.
    return Stage("initcheck", command, 30, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, checker_note)


def pytest_note(status: int, output: str) -> tuple[bool, str]:
    last = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return status == 0, last[-1].strip("= ") if last else f"exit status {status}"


def cases_note(status: int, output: str) -> tuple[bool, str]:
    """Passed if nothing was reported and every kernel came to the right numbers."""
    summary = "; ".join(x.strip("= ") for x in output.splitlines() if "SUMMARY" in x)
    good = len(re.findall(r"^\w+: good$", output, re.MULTILINE))
    note = f"{summary or f'exit status {status}'}; {good} cases came through"
    return status == 0 and bool(summary) and good >= 13, note


def planted_note(status: int, output: str) -> tuple[bool, str]:
    found = status == FOUND and re.search("Invalid __global__ read.*", output) is not None
    return found, "found" if found else f"the planted error was not found: exit status {status}"


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
        return Outcome(stage.name, "not run", 0.0, stage.missing)
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
    about["prebuilt"] = prebuilt(device, about.get("capability", ""))
    if device == "cuda" and (profiler := shutil.which("ncu")):
        about["ncu"] = profiler
    try:
        toolkit = cuda_toolkit.ask(cuda_toolkit.find_nvcc())
    except cuda_toolkit.CannotBuild as reason:
        return about | {"nvcc": str(reason)}
    beside = Path(toolkit.home) / "bin" / "compute-sanitizer"
    found = shutil.which("compute-sanitizer") or (str(beside) if beside.is_file() else None)
    if device == "cuda" and found:
        about["compute-sanitizer"] = found
    return about | {"nvcc": f"{toolkit.nvcc}, CUDA {toolkit.version}"}


_BUILD_INFO = "import json, dldr_ext; print(json.dumps(dldr_ext.build_info()))"


def prebuilt(device: str, capability: str) -> bool:
    """Whether the libraries load here and have code for this GPU."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD_INFO], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        return False
    info = json.loads(done.stdout.splitlines()[-1])
    major, _, minor = capability.partition(".")
    return device == "cpu" or (
        info["cuda"]
        and any(
            arch.split(".")[0] == major and int(arch.split(".")[1].split("+")[0]) <= int(minor)
            for arch in info["cuda_archs"]
        )
    )


def variant_name(variant: str) -> str:
    return "sweep-" + variant.replace(" ", "-")


def build(arch: str) -> None:
    """The libraries, and the programs without torch, for one architecture."""
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": arch, "DLDR_BUILD_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    build_tools(arch, VARIANTS)


def build_tools(arch: str, variants: Collection[str]) -> None:
    TOOLS.mkdir(parents=True, exist_ok=True)
    code = arch.replace(".", "")
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc", "-Itests/kernels"]
    flags += ["-gencode", f"arch=compute_{code},code=sm_{code}"]

    def nvcc(*arguments: str) -> None:
        subprocess.run([cuda_toolkit.find_nvcc(), *flags, *arguments], cwd=ROOT, check=True)

    def compile_kernels(path: Path) -> str:
        nvcc("-c", str(path), "-o", made := str(TOOLS / f"{path.stem}.o"))
        return made

    def build_sweep(variant: str) -> None:
        sources = ["benchmarks/gpu/sweep.cu", "csrc/cuda/project.cu", "csrc/cuda/list.cu"]
        nvcc(*VARIANTS[variant], *sources, "-o", str(TOOLS / variant_name(variant)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(compile_kernels, sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
        list(pool.map(build_sweep, variants))
        nvcc("-DDLDR_ON_GPU", "tests/kernels/cuda_cases.cpp", *objects, "-o", str(TOOLS / "cases"))


def sweep(path: Path) -> int:
    """Runs every variant that was built; the JSON is written after each."""
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        program = TOOLS / variant_name(variant)
        if not program.is_file():
            continue
        done = subprocess.run([program], capture_output=True, text=True, timeout=30)
        print(f"{variant}: {done.stdout.strip()} {done.stderr.strip()}", flush=True)
        if done.returncode == 0:
            found[variant] = json.loads(done.stdout)
            path.write_text(json.dumps(found, indent=1) + "\n")
    if not found:
        print("no variant was built: make gpu-build ARCH=9.0, on any machine with nvcc")
    return 0


def keep_cifar(out: Path) -> None:
    """All finished runs in one file."""
    folder = ROOT / "build" / "gpu" / "cifar"
    runs = {p.stem: json.loads(p.read_text()) for p in sorted(folder.rglob("*.json"))}
    if runs:
        (out / "cifar.json").write_text(json.dumps(runs, indent=1) + "\n")


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
    parser.add_argument("out", type=Path, nargs="?", help="folder for the results")
    parser.add_argument("--build", metavar="ARCH", help="build what is to be taken along, for 9.0")
    parser.add_argument("--sweep", type=Path, metavar="JSON", help="this stage alone")
    parser.add_argument("--cifar", help="torchvision's folder of CIFAR-10")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", help="stages whose names begin so")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all stages together")
    options = parser.parse_args()
    if options.build:
        build(options.build)
        return 0
    if options.sweep:
        return sweep(options.sweep)
    if options.out is None:
        parser.error("a folder for the results is missing")
    start = time.perf_counter()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(ROOT / "build" / "gpu", ignore_errors=True)
    (ROOT / "build" / "gpu").mkdir(parents=True)
    about = describe(options.device)
    needed = ["pytest"] if about["prebuilt"] else ["ninja", "pytest", "setuptools"]
    if missing := [name for name in needed if not _has(name)]:
        sys.exit(f"{sys.executable} has no {', '.join(missing)}")
    log = options.out / "log.txt"
    log.write_text(json.dumps(about, indent=1) + "\n")
    outcomes: list[Outcome] = []
    for stage in stages(options, about):
        if options.only and not stage.name.startswith(tuple(options.only)):
            continue
        left = options.seconds - (time.perf_counter() - start)
        # What the others leave is for training.
        outcome = run(stage, left if stage.name == "training" else min(stage.limit, left), log)
        outcomes.append(outcome)
        took = f"{outcome.seconds:6.1f} s"
        print(f"{outcome.result:8} {took}  {stage.name}: {outcome.note}", flush=True)
        # After each stage: what is stopped from outside has left what came before.
        results = about | {"stages": [asdict(one) for one in outcomes]}
        (options.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "report.md").write_text(report(about, outcomes))
    keep_cifar(options.out)
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
