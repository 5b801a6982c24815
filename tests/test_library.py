"""Loading: the forced instruction-set path, the import's cost in modules, what errors say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import dldr_ext
from dldr_ext import _library


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


SHOW = "import dldr_ext, json; print(json.dumps(dldr_ext.build_info()))"


@pytest.mark.parametrize("name", dldr_ext.build_info()["cpu_capabilities"])
def test_the_environment_forces_a_path(name):
    done = run(SHOW, DLDR_CPU_CAPABILITY=name)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cpu_capability"] == name


def test_an_unknown_path_is_refused_with_the_known_ones():
    code = "import torch, dldr_ext; dldr_ext.ops.gram(torch.ones(1, 1))"
    done = run(code, DLDR_CPU_CAPABILITY="avx9")
    assert done.returncode != 0
    assert "DLDR_CPU_CAPABILITY: expected one of portable" in done.stderr
    assert "got 'avx9'" in done.stderr
    assert "ValueError" in done.stderr


def test_import_loads_nothing_heavy():
    """What only some functions need stays out of the import."""
    heavy = [
        "safetensors",
        "matplotlib",
        "rich",
        "typer",
        "sklearn",
        "mlxtend",
        "scipy",
        "pandas",
        "jinja2",
    ]
    code = (
        "import sys, torch; before = set(sys.modules); import dldr_ext;"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    done = run(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_CPU_LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(_library, "_registered", lambda: False)
    with pytest.raises(ImportError, match=r"_C\.so is missing.*pip install.*found: torch"):
        _library.load()


def test_a_broken_library_says_what_was_found(monkeypatch, tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_CPU_LIBRARY", broken)
    monkeypatch.setattr(_library, "_registered", lambda: False)
    with pytest.raises(ImportError, match=r"could not be loaded.*built with.*found: torch"):
        _library.load()


@pytest.mark.parametrize("version, good", [("2.9.1", False), ("2.10.0", True), ("3.0", True)])
def test_torch_versions_are_compared_as_numbers(monkeypatch, version, good):
    monkeypatch.setattr(_library.torch, "__version__", version)
    if good:
        _library.load()
    else:
        with pytest.raises(ImportError, match=r"needs torch >= 2\.10; found: torch 2\.9\.1"):
            _library.load()
