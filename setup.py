"""Builds the op library on torch's stable ABI: one wheel for every CPython >= 3.10, torch >= 2.10.

Switches (environment): CXX, MAX_JOBS, CXXFLAGS as usual. torch must be importable while building:
`pip install --no-build-isolation .`
"""

import json
import platform
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
PACKAGE = "dldr_ext"
TORCH_TARGET = "0x020a000000000000"  # torch 2.10
DEFINES = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    # a*b+c is fused only where the source says so: one arithmetic whatever the compiler
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",  # GCC 12's own AVX-512 header
    "-Wno-psabi",
]


def sources(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob("*.cpp"))


class BuildLibraries(BuildExtension):
    """Plain shared libraries `_C.so` (no CPython symbol, so no CPython tag) and a build note."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext):
        return []

    def run(self) -> None:
        super().run()
        note = {
            "torch": torch.__version__,
            "compiler": platform.python_compiler() if platform.system() != "Linux" else _compiler(),
            "machine": platform.machine(),
            "cuda": None,
            "cuda_archs": [],
        }
        folder = ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(note, indent=1) + "\n")


def _compiler() -> str:
    import os
    import subprocess

    command = [*os.environ.get("CXX", "c++").split(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


class PlainWheel(bdist_wheel):
    """py3-none-<platform>: the libraries know nothing of CPython."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def cpu_library() -> CppExtension:
    extension = CppExtension(
        f"{PACKAGE}._C",
        ["csrc/ops.cpp", *sources("cpu")],
        extra_compile_args={"cxx": [*DEFINES, *CXX_FLAGS]},
        extra_link_args=["-fopenmp", "-Wl,--no-undefined", "-Wl,--exclude-libs,ALL", "-s"],
        py_limited_api=True,
    )
    # The stable ABI is all in libtorch_cpu; naming fewer libraries keeps the file loadable under
    # every torch build.
    extension.libraries = ["torch_cpu"]
    return extension


setup(
    ext_modules=[cpu_library()],
    cmdclass={
        "build_ext": BuildLibraries.with_options(no_python_abi_suffix=True, use_ninja=True),
        "bdist_wheel": PlainWheel,
    },
)
