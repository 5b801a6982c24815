"""How the kernel bench is built: CMake, ninja and pybind11; tests are skipped without them."""

import fcntl
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> str:
    """A program beside this Python (pip installs cmake and ninja there) or on the search path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"the kernel bench needs {name}: pip install {name}")
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}", pytrace=False)


def build(folder: Path) -> None:
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("the kernel bench needs pybind11: pip install pybind11")
    cmake, ninja = tool("cmake"), tool("ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # of several workers of pytest-xdist, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        run([*configure, f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"])
        run([cmake, "--build", str(folder)])
