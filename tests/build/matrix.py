"""Runs the tests of one built wheel under several releases of torch, each in its own environment.

The wheel is installed as it is (`--no-deps`), so the very same library file runs everywhere; the
tests are copied out of the source tree, so that the installed package is what they import. Which
folders of them run is in tests/wheel_folders.txt, for cibuildwheel too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("2.10.0", "2.13.0", "2.14.1", "2.15.0")
NEEDS = [
    "numpy",
    "setuptools",
    "pytest>=8.2",
    "hypothesis",
    "scipy",
    "scikit-learn",
    "safetensors",
    "expecttest",
    "typer",
    "rich",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, default=ROOT / "dist", help="wheel or its folder")
    parser.add_argument("--torch", nargs="+", default=RELEASES, help="releases")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="passed on")
    options = parser.parse_args()
    wheel = options.wheel
    if wheel.is_dir():
        wheel = max(wheel.glob("dldr_ext-*.whl"), key=lambda path: path.stat().st_mtime)
    with zipfile.ZipFile(wheel) as archive:
        library = hashlib.sha256(archive.read("dldr_ext/_C.so")).hexdigest()
    print(f"{wheel.name}, _C.so {library[:12]}")
    options.work = options.work.resolve()  # the tests run in it
    tests = options.work / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", options.work)
    failed = []
    for release in options.torch:
        folder = options.work / f"torch-{release}"
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
            _run(python, "-m", "pip", "install", "-q", f"torch=={release}", *NEEDS)
        _run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", str(wheel))
        found = _torch_version(python)
        print(f"torch {found}", flush=True)
        if found.split("+")[0] != release:
            sys.exit(f"{folder}: expected torch {release}, found {found}; remove the folder")
        done = subprocess.run(
            [
                python,
                "-m",
                "pytest",
                "@tests/wheel_folders.txt",
                "-p",
                "no:cacheprovider",
                *options.pytest,
            ],
            cwd=options.work,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        if done.returncode != 0:
            failed.append(release)
    if failed:
        sys.exit(f"failed under torch {', '.join(failed)}")
    print(f"passed under torch {', '.join(options.torch)}")


def _torch_version(python: Path) -> str:
    command = [python, "-c", "import torch; print(torch.__version__)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
