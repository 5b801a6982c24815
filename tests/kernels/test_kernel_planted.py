"""The CUDA kernels under sanitizers, without Python, and bugs planted there that must be found.

cuda_cases.cpp drives every kernel on the emulation. Built with the thread sanitizer, whose threads
are the operating system's, it finds missing barriers; built with the address sanitizer, tails that
are off by one and offsets that wrap at 2^31. Each bug is one change to a copy of csrc; only the
kernel that has it is compiled anew. With DLDR_EVERY_BUG=1 (`make sanitize`) every barrier of the
sources is dropped once, and all of the other bugs are planted; otherwise a few of each kind.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from kernel_build import ROOT, tool

CUDA = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++20", "-O0", "-g1", "-Wno-psabi", "-ffp-contract=off", "-DDLDR_EMULATED_CUDA"]
SANITIZERS = {
    "thread": ["-fsanitize=thread", "-DDLDR_EMULATED_THREADS"],
    "address": ["-fsanitize=address,signed-integer-overflow", "-fno-sanitize-recover=all"],
}
RACE = "WARNING: ThreadSanitizer: data race"
OUTSIDE = "AddressSanitizer: heap-buffer-overflow"
# A wrapped offset leaves the rows; a wrapped index of a tile may also find nothing there.
WRAPPED = r"AddressSanitizer: SEGV|signed integer overflow|wrong: "
# The kernel that a header's bug is looked for in; others are named like their file.
KERNEL_OF = {
    "dot.cuh": "project",
    "dot_mma.cuh": "project",
    "combine.cuh": "reconstruct",
    "list.cuh": "trial",
    "gram_mma.cuh": "gram",
    "lanes.cuh": "project",
}


class Bug(NamedTuple):
    file: str
    before: str
    after: str
    report: str
    size: str = "small"

    @property
    def kernel(self) -> str:
        return KERNEL_OF.get(self.file, self.file.split(".")[0])


TAILS = [
    Bug("dot.cuh", "int i = count + static_cast", "int i = count + 1 + static_cast",
        "wrong: .*nan"),
    Bug("dot_mma.cuh", "end - j - quad * kPack<T>", "end - j - quad * kPack<T> + 1", OUTSIDE),
    Bug("combine.cuh", "r += kCombineRows) {", "r += kCombineRows + 1) {", "wrong: "),
    Bug("combine.cuh", "min_of(kPack<T>, rows.numel - i)", "min_of(kPack<T>, rows.numel - i + 1)",
        OUTSIDE),
    Bug("gram.cu", "min_of(kPack<T>, end - i)", "min_of(kPack<T>, end - i + 1)", OUTSIDE),
    Bug("gram_mma.cuh", "min_of(room, kPack<T>)", "min_of(room + 1, kPack<T>)", OUTSIDE),
    Bug("lanes.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0xffffu", "some lanes of a warp only"),
    Bug("form_basis.cu", "if (first + r < dim && i < count)", "if (first + r < dim && i <= count)",
        OUTSIDE),
    Bug("trial.cu", "min_of(kTrialTile, numel - at)", "min_of(kTrialTile, numel - at + 1)",
        OUTSIDE),
    Bug("store_snapshot.cu", "min_of(kStoreTile, numel - at)", "min_of(kStoreTile, numel - at + 1)",
        OUTSIDE),
    Bug("reconstruct_residual.cu", "min_of(tile, rows.numel - at)",
        "min_of(tile, rows.numel - at + 1)", OUTSIDE),
    Bug("list.cu", "i < count; i += blockDim.x", "i + 1 < count; i += blockDim.x", "ERROR|wrong: "),
    Bug("quasi_newton.cu", "i < count; i += kTeamThreads) mine",
        "i + 1 < count; i += kTeamThreads) mine", "wrong: "),
]  # fmt: skip
AT = "const int64_t at = static_cast<int64_t>(blockIdx.x) * "
INT_AT = "const int at = static_cast<int>(blockIdx.x) * static_cast<int>"
INT32 = [
    Bug("dot.cuh", "const int64_t at = (blockIdx.x * part.tiles_per_chunk + tile) * kDotTile;",
        "const int at = static_cast<int>(blockIdx.x * part.tiles_per_chunk + tile) * "
        "static_cast<int>(kDotTile);", WRAPPED, "far"),
    Bug("dot.cuh", "rows_here - 1)) * rows.stride;",
        "rows_here - 1)) * static_cast<int>(rows.stride);", WRAPPED, "far"),
    Bug("dot_mma.cuh", "rows_here - 1)) * rows.stride;",
        "rows_here - 1)) * static_cast<int>(rows.stride);", WRAPPED, "far"),
    Bug("list.cuh", "static_cast<int64_t>(meta & (", "static_cast<int>(meta & (", WRAPPED, "far"),
    Bug("reconstruct.cu", f"{AT}tile;", f"{INT_AT}(tile);", WRAPPED, "far"),
    Bug("reconstruct_residual.cu", f"{AT}tile;", f"{INT_AT}(tile);", WRAPPED, "far"),
    Bug("trial.cu", f"{AT}kTrialTile;", f"{INT_AT}(kTrialTile);", WRAPPED, "far"),
    Bug("store_snapshot.cu", f"{AT}kStoreTile;", f"{INT_AT}(kStoreTile);", WRAPPED, "far"),
    Bug("gram.cu", "+ row * rows.stride + i;", "+ static_cast<int>(row * rows.stride) + i;",
        WRAPPED, "far"),
    Bug("gram_mma.cuh", "T* from = data + (upper + mine) * rows.stride + at;",
        "T* from = data + static_cast<int>((upper + mine) * rows.stride) + at;", WRAPPED, "far"),
    Bug("form_basis.cu", "to[(first + r) * out_stride + at + i]",
        "to[static_cast<int>((first + r) * out_stride + at + i)]", WRAPPED, "far"),
]  # fmt: skip
BARRIER = "__syncthreads();"
# What a block has written, before it says so to the others: here they run one after the other.
BETWEEN_BLOCKS = ("dot.cuh", 2)
BARRIERS = [
    (file.name, number)
    for file in sorted(CUDA.glob("*.cu*"))
    for number in range(file.read_text().count(BARRIER))
    if (file.name, number) != BETWEEN_BLOCKS
]
assert BARRIERS
if os.environ.get("DLDR_EVERY_BUG") != "1":
    TAILS, INT32 = [TAILS[0], TAILS[6]], [INT32[1], INT32[6]]
    BARRIERS = [pair for pair in BARRIERS if pair in [("combine.cuh", 1), ("trial.cu", 0)]]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Without the sanitizer that Python itself may run under (sanitize.sh)."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    environment |= {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


class Cases:
    """The program of cuda_cases.cpp with one sanitizer, and variants of it with another csrc."""

    def __init__(self, folder: Path, sanitizer: str):
        self.folder, self.flags = folder, [*FLAGS, *SANITIZERS[sanitizer]]
        self.compiler = tool(os.environ.get("CXX", "g++"))
        probe = folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        if run([self.compiler, *self.flags, str(probe), "-o", str(folder / "probe")]).returncode:
            pytest.skip(f"{self.compiler} has no {sanitizer} sanitizer here")
        sources = [ROOT / "tests" / "kernels" / "cuda_cases.cpp", *sorted(CUDA.glob("*.cu"))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.objects = list(pool.map(lambda source: self.compile(source, folder), sources))
        self.program = self.link([], folder)

    def compile(self, source: Path, folder: Path) -> Path:
        made = folder / f"{source.stem}.o"
        include = [f"-I{ROOT / 'tests' / 'kernels'}", f"-I{ROOT / 'csrc'}"]
        command = [self.compiler, *self.flags, *include, "-xc++", "-c", str(source)]
        done = run([*command, "-o", str(made)])
        assert done.returncode == 0, done.stdout
        return made

    def link(self, first: list[Path], folder: Path) -> Path:
        """Of inline functions the linker keeps the first definition, hence those of ``first``."""
        names = {made.name for made in first}
        objects = first + [made for made in self.objects if made.name not in names]
        done = run([self.compiler, *self.flags, *map(str, objects), "-o", str(folder / "cases")])
        assert done.returncode == 0, done.stdout
        return folder / "cases"

    def plant(self, file: str, text: str, unit: str, folder: Path) -> Path:
        """The program whose csrc/cuda/``file`` has this text, compiled into ``unit``.cu."""
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / "csrc" / "cuda" / file).write_text(text)
        made = self.compile(folder / "csrc" / "cuda" / f"{unit}.cu", folder)
        return self.link([made], folder)


@pytest.fixture(scope="module")
def thread(tmp_path_factory) -> Cases:
    return Cases(tmp_path_factory.mktemp("thread"), "thread")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Cases:
    return Cases(tmp_path_factory.mktemp("address"), "address")


@pytest.mark.parametrize(("sanitizer", "size"), [("thread", "small"), ("address", "small"),
                                                 ("address", "far")])  # fmt: skip
def test_the_kernels_are_clean(request, sanitizer, size):
    done = run([str(request.getfixturevalue(sanitizer).program), size])
    assert done.returncode == 0, done.stdout
    kernels = {unit.stem for unit in CUDA.glob("*.cu")} - {"list"} | {"step"}
    kernels -= {"quasi_newton", "step"} if size == "far" else set()
    assert set(re.findall(r"^(\w+): good$", done.stdout, re.M)) == kernels


@pytest.mark.parametrize(("file", "number"), BARRIERS)
def test_a_dropped_barrier_is_a_race(thread, tmp_path, file, number):
    pieces = (CUDA / file).read_text().split(BARRIER)
    text = BARRIER.join(pieces[: number + 1]) + ";" + BARRIER.join(pieces[number + 1 :])
    kernel = KERNEL_OF.get(file, file.split(".")[0])
    done = run([str(thread.plant(file, text, kernel, tmp_path)), "small", kernel])
    assert done.returncode != 0
    assert RACE in done.stdout, done.stdout


@pytest.mark.parametrize("bug", TAILS + INT32, ids=lambda bug: f"{bug.file}-{bug.size}")
def test_a_wrong_offset_is_seen(address, tmp_path, bug):
    text = (CUDA / bug.file).read_text()
    assert text.count(bug.before) == 1, f"{bug.file} has changed: plant the bug anew"
    # list.cu's kernel runs where a list is long.
    kernel = "trial" if bug.file == "list.cu" else bug.kernel
    unit = "list" if bug.file == "list.cu" else bug.kernel
    program = address.plant(bug.file, text.replace(bug.before, bug.after), unit, tmp_path)
    done = run([str(program), bug.size, kernel])
    assert done.returncode != 0
    assert re.search(bug.report, done.stdout), done.stdout
