#!/bin/sh
# Builds the kernel bench with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests
# under them. PYTHON names the interpreter (pytest, NumPy, pybind11); further arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
python=$(command -v "${PYTHON:-python3}")
folder=build/kernels-sanitize
cmake -S . -B "$folder" -G Ninja -DDLDR_SANITIZE=address,undefined -DPython_EXECUTABLE="$python"
cmake --build "$folder"

# The interpreter is not instrumented: its leaks are not ours, and the runtime must come first.
# libstdc++ beside it, so that exceptions are intercepted. Every allocation gets its red zones.
cxx=${CXX:-g++}
export LD_PRELOAD="$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
export DLDR_KERNELS_DIR="$PWD/$folder"
# A report goes straight to the terminal: the process ends with it.
exec "$python" -m pytest tests/kernels --confcutdir=tests/kernels --capture=sys "$@"
