#!/bin/sh
# Runs the CUDA kernels alone under the thread and the address sanitizer, and with every planted bug
# (test_kernel_planted.py); then the kernel bench and its tests under AddressSanitizer and
# UndefinedBehaviorSanitizer. PYTHON names the interpreter (pytest, NumPy, pybind11); further
# arguments go to the second pytest.
set -eu
cd "$(dirname "$0")/../.."
python=$(command -v "${PYTHON:-python3}")
planted=tests/kernels/test_kernel_planted.py
DLDR_EVERY_BUG=1 "$python" -m pytest "$planted" --confcutdir=tests/kernels

folder=build/kernels-sanitize
cmake -S . -B "$folder" -G Ninja -DDLDR_SANITIZE=address,undefined -DPython_EXECUTABLE="$python"
cmake --build "$folder"

# The interpreter is not instrumented: its leaks are not ours, and the runtime must come first.
# libstdc++ beside it, so that exceptions are intercepted. Every allocation gets its red zones.
cxx=${CXX:-g++}
export LD_PRELOAD="$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
export DLDR_KERNELS_DIR="$PWD/$folder"
# A report goes straight to the terminal: the process ends with it, and pytest-xdist names its test.
exec "$python" -m pytest tests/kernels --confcutdir=tests/kernels --capture=sys \
  -n auto --maxprocesses 4 --dist worksteal \
  --ignore="$planted" "$@"
