"""The CPU kernels compiled for 64-bit ARM give the bits that they give on x86-64.

Needs Debian's packages g++-aarch64-linux-gnu and qemu-user.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_build import ROOT

CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
# As setup.py compiles the portable path.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
SOURCES = ["tests/kernels/cpu_cases.cpp", "csrc/cpu/isa_portable.cpp"]


def digests(compiler: str, folder: Path, *emulator: str) -> list[str]:
    program = folder / Path(compiler).name
    command = [compiler, *FLAGS, "-static", "-Icsrc", *SOURCES, "-o", str(program)]
    # Without the sanitizer that Python itself may run under (sanitize.sh).
    plain = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    subprocess.run(command, cwd=ROOT, env=plain, check=True)
    command = [*emulator, str(program)]
    done = subprocess.run(command, env=plain, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or CROSS is None or EMULATOR is None,
    reason="needs x86-64, aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_the_same_bits_as_on_x86_64(tmp_path):
    here = digests("g++", tmp_path)
    assert len(here) == len(set(here)) == 6 * 22
    assert digests(CROSS, tmp_path, EMULATOR) == here
