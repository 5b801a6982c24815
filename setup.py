"""Builds the op libraries on torch's stable ABI: one wheel for CPython >= 3.10, torch >= 2.10.

`_C` holds the schemas and the CPU kernels. `_C_cuda` holds the CUDA kernels and is built where nvcc
and a CUDA torch are found, never by asking for a device. torch must be importable while building:
`pip install --no-build-isolation .`

The switches, all in the environment, are explained in docs/building.md.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # build front ends leave this folder off the path
import cuda_toolkit  # noqa: E402
from source_version import source_version  # noqa: E402

PACKAGE = "dldr_ext"
VERSION = source_version(ROOT)
TORCH_TARGET = "0x020a000000000000"  # torch 2.10
DEFINES = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    # a*b+c is fused only where the source says so: one arithmetic whatever the compiler
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-psabi",
]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",  # as -ffp-contract=off above: one arithmetic, CPU and GPU alike
    "-Xcompiler=-fvisibility=hidden",
    "-Xptxas=-v",  # kept beside each object: tools/nvcc_keep_ptxas.sh
]
# No -fopenmp and so no libgomp of our own: threads come from torch_parallel_for in libtorch_cpu.
# torch brings its own libgomp, in some releases under another name; a second OpenMP runtime in the
# process would not obey torch.set_num_threads and would compete for the cores.
LINK_FLAGS = ["-Wl,--no-undefined", "-Wl,--exclude-libs,ALL", "-s"]

TOOLKIT, CPU_ONLY_REASON = cuda_toolkit.choose(torch)
ARCHS: list[str] = []


def sources(*patterns: str) -> list[str]:
    found = [path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def library(name: str, files: list[str], libraries: list[str], **options):
    extension = cpp_extension.CppExtension(
        f"{PACKAGE}.{name}", files, py_limited_api=True, **options
    )
    # Not torch's default list: naming fewer libraries keeps the file loadable under every build.
    extension.libraries = libraries
    return extension


def cpu_library():
    return library(
        "_C",
        sources("ops.cpp", "cpu/*.cpp"),
        ["torch_cpu"],
        extra_compile_args={"cxx": [*DEFINES, *CXX_FLAGS]},
        extra_link_args=LINK_FLAGS,
    )


def cuda_library(toolkit: cuda_toolkit.Toolkit):
    """csrc/cuda: *.cu are torch-free kernels for nvcc, *_cuda.cpp torch's ops for the host."""
    folder, cudart = toolkit.cudart()
    cpp_extension.CUDA_HOME = toolkit.home
    keep = ROOT / "tools" / "nvcc_keep_ptxas.sh"
    os.environ["PYTORCH_NVCC"] = f"sh {keep} {os.environ.get('PYTORCH_NVCC', toolkit.nvcc)}"
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.default_archs()
    arch_flags = cpp_extension._get_cuda_arch_flags()
    ARCHS[:] = cuda_toolkit.arch_names(arch_flags)
    if early := [arch for arch in ARCHS if int(arch.split(".")[0]) < 8]:
        raise SystemExit(
            "dldr_ext: TORCH_CUDA_ARCH_LIST: expected compute capability 8.0 or newer (Ampere),"
            f" got {', '.join(early)}"
        )
    compiler = os.environ.get("CXX", "")
    nvcc_flags = [
        *NVCC_FLAGS,
        *arch_flags,
        f"--threads={os.environ.get('NVCC_THREADS', '2')}",
        # nvcc takes one program here, so a CXX like "ccache g++" is left to the C++ files
        *([f"-ccbin={compiler}"] if compiler and " " not in compiler else []),
    ]
    return library(
        "_C_cuda",
        sources("cuda/*.cu", "cuda/*.cpp"),
        ["torch_cpu", "torch_cuda"],
        include_dirs=list(toolkit.include_dirs),
        library_dirs=[folder],
        define_macros=[("USE_CUDA", None)],
        extra_compile_args={"cxx": [*DEFINES, *CXX_FLAGS], "nvcc": nvcc_flags},
        extra_link_args=[f"-l:{cudart}", *LINK_FLAGS],
    )


class BuildLibraries(cpp_extension.BuildExtension):
    """Plain shared libraries `_C.so` (no CPython symbol, so no CPython tag) and a build note."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext):
        return []

    def build_extensions(self) -> None:
        # Python's own flags ask for debug information, which `-s` throws away again.
        self.compiler.compiler_so = [flag for flag in self.compiler.compiler_so if flag != "-g"]
        super().build_extensions()

    def run(self) -> None:
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        if TOOLKIT is None:
            print(f"dldr_ext: building without the CUDA kernels: {CPU_ONLY_REASON}", flush=True)
            # One left here by an earlier build would go into this wheel.
            (folder / "_C_cuda.so").unlink(missing_ok=True)
        else:
            print(
                f"dldr_ext: building the CUDA kernels with {TOOLKIT.nvcc} (CUDA "
                f"{TOOLKIT.version}) for {', '.join(ARCHS)}",
                flush=True,
            )
        super().run()
        note = {
            "version": VERSION,
            "torch": torch.__version__,
            "compiler": _compiler(),
            "machine": platform.machine(),
            "cuda": TOOLKIT.version if TOOLKIT else None,
            "cuda_archs": ARCHS,
            "without_cuda_because": CPU_ONLY_REASON or None,
        }
        (folder / "_build.json").write_text(json.dumps(note, indent=1) + "\n")


class PlainWheel(bdist_wheel):
    """py3-none-<platform>: the libraries know nothing of CPython."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _compiler() -> str:
    command = [*os.environ.get("CXX", "c++").split(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def version() -> str:
    """The package's version; a wheel with CUDA kernels adds +cuNNN, a source archive never does."""
    if TOOLKIT is None or "sdist" in sys.argv:
        return VERSION
    return f"{VERSION}+cu{TOOLKIT.version.replace('.', '')}"


setup(
    version=version(),
    ext_modules=[cpu_library(), *([cuda_library(TOOLKIT)] if TOOLKIT else [])],
    cmdclass={
        "build_ext": BuildLibraries.with_options(no_python_abi_suffix=True, use_ninja=True),
        "bdist_wheel": PlainWheel,
    },
)
