"""Loading: the forced instruction-set path, the import's cost in modules, what errors say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import dldr_ext
from dldr_ext.ops import errors
from dldr_ext.ops import library as library_module


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


def test_public_names():
    code = (
        "import sys, dldr_ext; assert 'torch.distributed.tensor' not in sys.modules;"
        "assert 'torch.distributed.checkpoint' not in sys.modules;"  # half a second
        "assert set(dldr_ext.__all__) <= set(dir(dldr_ext));"
        "found = [getattr(dldr_ext, name) for name in dldr_ext.__all__];"
        "assert dldr_ext.PBFGS is dldr_ext.optim.PBFGS is found[0];"
        "assert dldr_ext.uniform_soup is dldr_ext.averaging.uniform_soup;"
        "from dldr_ext.callbacks import progress; from dldr_ext.dcp import stateful;"
        "from dldr_ext.plan import plan; from dldr_ext import *; PSGD;"
        "print(len(found))"
    )
    done = run(code)
    assert done.stdout.strip() == str(len(dldr_ext.__all__)), done.stderr
    with pytest.raises(AttributeError, match="module 'dldr_ext' has no attribute 'PBFG'"):
        _ = dldr_ext.PBFG


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
    monkeypatch.setattr(library_module, "_CPU_LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(library_module, "_registered", lambda: False)
    with pytest.raises(ImportError, match=r"_C\.so is missing.*pip install.*found: torch"):
        library_module.load()


def test_a_broken_library_says_what_was_found(monkeypatch, tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library_module, "_CPU_LIBRARY", broken)
    monkeypatch.setattr(library_module, "_registered", lambda: False)
    with pytest.raises(ImportError, match=r"could not be loaded.*It was built.*found: torch"):
        library_module.load()


@pytest.mark.parametrize("version, good", [("2.9.1", False), ("2.10.0", True), ("3.0", True)])
def test_torch_versions_are_compared_as_numbers(monkeypatch, version, good):
    monkeypatch.setattr(library_module.torch, "__version__", version)
    if good:
        library_module.load()
    else:
        with pytest.raises(ImportError, match=r"needs torch >= 2\.10; found: torch 2\.9\.1"):
            library_module.load()


NOTE = {
    "torch": "2.14.1+cu130",
    "compiler": "c++ 12.2",
    "machine": "x86_64",
    "cuda": "13.0",
    "cuda_archs": ["8.0", "9.0", "12.0+PTX"],
    "without_cuda_because": None,
}
CPU_NOTE = NOTE | {"cuda": None, "cuda_archs": [], "without_cuda_because": "nvcc was not found"}


@pytest.fixture
def cuda_torch(monkeypatch, tmp_path):
    """A torch for CUDA 12 and a `_C_cuda.so`, as far as the loader looks."""
    library = tmp_path / "_C_cuda.so"
    library.write_bytes(b"not a library")
    loaded = []
    monkeypatch.setattr(library_module, "_CUDA_LIBRARY", library)
    monkeypatch.setattr(library_module, "_registered", lambda: False)
    monkeypatch.setattr(library_module.torch.version, "cuda", "12.8")
    monkeypatch.setattr(library_module.torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(library_module, "build_metadata", lambda: NOTE | {"cuda": "12.4"})
    return loaded


@pytest.fixture
def call_on_cuda(monkeypatch):
    """Calls an op that fails as torch's dispatcher or a kernel launch does, on a made-up device."""

    def call(metadata, capability=None):
        monkeypatch.setattr(library_module, "build_metadata", lambda: metadata)
        monkeypatch.setattr(library_module, "cuda_loaded", lambda: metadata["cuda"] is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        with FakeTensorMode():
            basis, gradient = torch.empty(2, 3, device="cuda"), torch.empty(3, device="cuda")
        errors.call("project", fail, basis, [gradient], scale=None)

    def fail(*args, **kwargs):
        raise NotImplementedError("no kernel")

    fail._schema = torch.ops.dldr_ext.project.default._schema
    return call


def test_the_cuda_library_is_loaded_where_torch_has_cuda(cuda_torch):
    library_module.load()
    assert [path.rsplit("/", 1)[1] for path in cuda_torch] == ["_C.so", "_C_cuda.so"]


def test_the_cuda_library_is_left_alone_under_a_cpu_torch(cuda_torch, monkeypatch):
    monkeypatch.setattr(library_module.torch.version, "cuda", None)
    library_module.load()
    assert [path.rsplit("/", 1)[1] for path in cuda_torch] == ["_C.so"]


def test_another_cuda_major_is_refused_before_anything_is_loaded(cuda_torch, monkeypatch):
    monkeypatch.setattr(library_module, "build_metadata", lambda: NOTE)
    with pytest.raises(
        ImportError,
        match=r"wheel is for CUDA 13 \(built CUDA 13\.0 for 8\.0, .*torch is for CUDA 12; found: "
        r"torch .*DLDR_BUILD_CUDA=1 pip install",
    ):
        library_module.load()
    assert cuda_torch == []


def test_cuda_tensors_without_cuda_kernels_are_explained(call_on_cuda):
    with pytest.raises(
        ValueError,
        match=r"project: basis: got a tensor on cuda:0, but .* has no CUDA kernels \(built without "
        r"CUDA, .*: nvcc was not found\); found: torch .*DLDR_BUILD_CUDA=1 pip install",
    ):
        call_on_cuda(CPU_NOTE)


def test_a_device_outside_the_wheels_architectures_is_explained(call_on_cuda):
    with pytest.raises(
        ValueError,
        match=r"basis: Tesla T4 \(cuda:0\) has compute capability 7\.5, but dldr_ext was built "
        r"CUDA 13\.0 for 8\.0, 9\.0, 12\.0\+PTX.*TORCH_CUDA_ARCH_LIST=7\.5",
    ):
        call_on_cuda(NOTE, (7, 5))


def test_an_error_on_a_fitting_device_is_passed_on(call_on_cuda):
    with pytest.raises(RuntimeError, match="no kernel"):
        call_on_cuda(NOTE, (9, 0))


def test_a_device_without_kernels_for_it_is_named():
    problem = library_module.device_problem(torch.device("mps"))
    assert problem == "the ops run on cpu and cuda, got a tensor on mps"


@pytest.mark.parametrize(
    "arch, capability, runs",
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0", (12, 0), False),
        ("12.0+PTX", (12, 1), True),
        ("9.0+PTX", (10, 0), True),
        ("12.0+PTX", (10, 3), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
    ],
)
def test_which_code_runs_where(arch, capability, runs):
    assert library_module._runs(arch, capability) is runs
