"""The bench itself: the choice of a path, clear errors, sanitizers, and the installed library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kernel_build import run, tool
from kernel_paths import EMULATED, MMA, PATHS
from kernel_reference import FORMATS, QUANTIZED, Sample


def python(code: str, kernels, **variables: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that finds the module."""
    environment = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parent), **variables}
    command = [sys.executable, "-c", f"import dldr_kernels\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_paths(kernels):
    assert kernels.paths()[0] == "portable"
    assert set(kernels.paths()) <= set(PATHS + MMA)
    emulated = [name for name in kernels.paths() if name.endswith(EMULATED)]
    assert len(emulated) == (3 if "avx2" in kernels.paths() else 0)


def test_the_environment_chooses_the_path(kernels):
    names = [name for name in kernels.paths() if not name.endswith(EMULATED) and name != "cuda"]
    code = "print(dldr_kernels.active_path())"
    for name in names:
        done = python(code, kernels, DLDR_CPU_CAPABILITY=name)
        assert done.stdout.strip() == name, done.stderr
    assert python(code, kernels, DLDR_CPU_CAPABILITY="").stdout.strip() == names[-1]
    done = python(code, kernels, DLDR_CPU_CAPABILITY="sse9")
    assert done.returncode != 0
    expected = f"DLDR_CPU_CAPABILITY: expected one of {', '.join(names)}"
    assert expected in done.stderr
    assert "got 'sse9'" in done.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "sse9"}, ValueError, "path: expected one of portable.*got 'sse9'"),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
        ({"basis": np.zeros(5, np.float32)}, ValueError, r"basis: expected shape \(rows, n\)"),
        ({"basis": np.zeros((0, 5), np.float32)}, ValueError, "at least one row"),
        ({"basis": np.zeros((2, 5), np.int64)}, TypeError, "basis: expected float32.*got int64"),
        ({"basis": np.zeros((5, 2), np.float32).T}, ValueError, "basis: expected contiguous rows"),
        ({"basis": np.zeros((2, 5), np.int8)}, ValueError, "scale: expected for int8"),
        ({"scale": np.zeros((2, 1), np.float32)}, ValueError, "scale: expected for int8"),
        ({"tensors": []}, ValueError, "tensors: expected 5 elements in all, got 0"),
        ({"tensors": [np.zeros(6, np.float32)]}, ValueError, "expected 5 elements in all, got 6"),
        ({"tensors": [[0.0] * 5]}, TypeError, r"tensors\[0\]: expected a NumPy array"),
        ({"tensors": [np.zeros(5, np.int8)]}, TypeError, r"tensors\[0\]: .*floating-point"),
        ({"tensors": [np.zeros(5, np.int32)]}, TypeError, r"tensors\[0\]: .*got int32"),
        ({"tensors": [np.zeros(10, np.float32)[::2]]}, ValueError, r"tensors\[0\].*contiguous"),
    ],
)
def test_bad_arguments_of_project(kernels, change, error, message):
    arguments = {"basis": np.zeros((2, 5), np.float32), "tensors": [np.zeros(5, np.float32)]}
    with pytest.raises(error, match=message):
        kernels.project(**{**arguments, **change})


def test_bad_scale(kernels):
    basis, tensors = np.zeros((2, 600), np.int8), [np.zeros(600, np.float32)]
    with pytest.raises(ValueError, match=r"scale: expected shape \(2,3,\), got \(2, 2\)"):
        kernels.project(basis, tensors, scale=np.zeros((2, 2), np.float32))
    with pytest.raises(TypeError, match="scale: wrong dtype float64"):
        kernels.project(basis, tensors, scale=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="scale: expected a contiguous array"):
        kernels.project(basis, tensors, scale=np.zeros((2, 6), np.float32)[:, ::2])


def test_bad_arguments_write_nothing(kernels):
    """The last argument is wrong each time; the outputs are as they were."""
    basis, vector = np.ones((2, 5), np.float32), np.ones(5, np.float32)
    out = [np.full(5, 7, np.float32)]
    with pytest.raises(ValueError, match=r"theta: expected shape \(2,\), got \(3,\)"):
        kernels.reconstruct_(out, None, basis, np.ones(3, np.float32))
    with pytest.raises(TypeError, match="theta: wrong dtype float64"):
        kernels.reconstruct_(out, None, basis, np.ones(2))
    with pytest.raises(ValueError, match=r"origin: expected shape \(5,\), got \(4,\)"):
        kernels.reconstruct_(out, np.ones(4, np.float32), basis, np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"direction: expected shape \(5,\), got \(6,\)"):
        kernels.trial_(out, vector, np.ones(6, np.float32), 0.5)
    with pytest.raises(TypeError, match="point: expected float32 or float64"):
        kernels.trial_(out, vector.astype(np.float16), vector, 0.5)
    assert (out[0] == 7).all()
    with pytest.raises(ValueError, match=r"params\[0\]: expected a contiguous array"):
        kernels.trial_([np.broadcast_to(np.float32(0), (5,))], vector, vector, 0.5)
    frozen = np.zeros(5, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[0\]: expected a writeable array"):
        kernels.trial_([frozen], vector, vector, 0.5)

    rows = np.full((3, 5), 7, np.float32)
    for index in (-1, 3):
        with pytest.raises(ValueError, match=f"index: expected 0 <= index < 3, got {index}"):
            kernels.gram_append_(rows, index, [vector], vector)
    with pytest.raises(ValueError, match=r"anchor: expected shape \(5,\)"):
        kernels.gram_append_(rows, 0, [vector], np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"coefficients: expected shape \(2,3,\), got \(2, 4\)"):
        kernels.form_basis_(rows[:2], rows, np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"out: expected shape \(2,5,\), got \(3, 5\)"):
        kernels.form_basis_(rows, rows, np.ones((2, 3)))
    with pytest.raises(TypeError, match="out: expected a floating-point array"):
        kernels.form_basis_(np.zeros((2, 5), np.int8), rows, np.ones((2, 3)))
    assert (rows == 7).all()


@pytest.mark.parametrize("name", FORMATS)
def test_no_elements(kernels, path, name):
    """n = 0: sums are zero, nothing is written."""
    sample = Sample(3, 0, name)
    scale = np.zeros((3, 0), np.float32) if name in QUANTIZED else None
    assert kernels.project(sample.array, [], scale=scale, path=path).tolist() == [0, 0, 0]
    assert (kernels.gram(sample.array, scale=scale, path=path) == np.zeros((3, 3))).all()
    empty = np.zeros(0, sample.wide)
    kernels.reconstruct_([], empty, sample.array, sample.theta, scale=scale, path=path)
    kernels.trial_([], empty, empty, 1.0, path=path)
    products = kernels.gram_append_(sample.array, 1, [], empty, scale=scale, path=path)
    assert products.tolist() == [0, 0]
    kernels.form_basis_(
        np.zeros((2, 0)), sample.array, np.zeros((2, 3)), scale=scale, path=path, threads=4
    )


@pytest.mark.parametrize(
    ("sanitizer", "call", "message"),
    [
        ("address", "read_past_the_end", "heap-buffer-overflow"),
        ("undefined", "overflow", "signed integer overflow"),
    ],
)
def test_the_sanitizers_are_awake(kernels, sanitizer, call, message):
    if sanitizer not in kernels.SANITIZERS.split(","):
        pytest.skip(f"built without the {sanitizer} sanitizer")
    done = python(f"dldr_kernels.{call}()", kernels)
    assert done.returncode != 0
    assert message in done.stderr


CONSUMER = """
#include <cstdio>
#include "cpu/capability.h"
int main() {
  const float basis[3] = {1, 2, 3}, gradient[3] = {4, 5, 6};
  double partial = 0;
  const dldr::Entry entry{const_cast<float*>(gradient), 0, 3, dldr::DType::f32, false};
  const dldr::Rows rows{basis, dldr::DType::f32, 1, 3, 3, nullptr};
  const dldr::EntryList list{&entry, 1};
  dldr::active_kernels().project({dldr::make_plan(3), rows, &list, 1, &partial}, 0, 1);
  std::printf("%g", partial);
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES CXX)
find_package(dldr_kernels CONFIG REQUIRED)
add_executable(consumer consumer.cpp)
target_link_libraries(consumer PRIVATE dldr::kernels)
"""


def test_the_installed_library_serves_a_cpp_program(kernels, kernels_folder, tmp_path):
    if kernels.SANITIZERS:
        pytest.skip("a program would have to be built with the sanitizers as well")
    if not (kernels_folder / "CMakeCache.txt").exists():
        pytest.skip("DLDR_KERNELS_DIR is no build folder")
    cmake, ninja = tool("cmake"), tool("ninja")
    run([cmake, "--install", str(kernels_folder), "--prefix", str(tmp_path / "installed")])
    (tmp_path / "consumer.cpp").write_text(CONSUMER)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    folder = tmp_path / "build"
    configure = [cmake, "-S", str(tmp_path), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run([*configure, f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"])
    run([cmake, "--build", str(folder)])
    done = subprocess.run([folder / "consumer"], capture_output=True, text=True, check=True)
    assert done.stdout == "32"
    shutil.rmtree(folder)
