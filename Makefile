# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
#
#   PYTHON  the interpreter that the environment is made from (3.10 or newer)
#   VENV    where the environment goes
#   TORCH   the torch to install; an installed one that satisfies it is kept
#   ARGS    passed on to `dldr demo`, pytest, mkdocs and tools/gpu.py
#   OUT     folder for the results of `make gpu`
#   ARCH    architecture that `make gpu-build` builds for
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
OUT ?= build/gpu-results
ARCH ?= 9.0
COMMIT ?= $(shell git describe --always --dirty 2>/dev/null)
BIN := $(VENV)/bin
# Idle OpenMP threads sleep: on few cores spinning ones slow the many small tests down.
export OMP_WAIT_POLICY ?= passive
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES := $(shell find csrc tools -type f) setup.py pyproject.toml

.PHONY: demo test test-kernels test-matrix sanitize bench gpu gpu-build wheel sdist ptxas sass lint lint-release \
  docs format clean

demo: $(VENV)/.built
	$(BIN)/dldr demo $(ARGS)

test: $(VENV)/.built $(VENV)/.examples
	$(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# The torch-free kernels alone, driven from NumPy.
test-kernels: $(VENV)/.built
	$(BIN)/python -m pytest tests/kernels --confcutdir=tests/kernels $(ARGS)

# One wheel, several releases of torch.
test-matrix: wheel
	$(PYTHON) tests/build/matrix.py --wheel dist $(ARGS)

# The same kernel tests under the address and undefined-behaviour sanitizers; the CUDA kernels also
# under the thread sanitizer, and with every planted bug.
sanitize: $(VENV)/.built
	PYTHON=$(abspath $(BIN))/python bash tests/kernels/sanitize.sh

bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks/micro -c benchmarks/micro/pytest.ini $(ARGS)

# Everything that needs a GPU, in one run with the interpreter at hand: OUT is where results go.
gpu:
	DLDR_COMMIT="$(COMMIT)" $(PYTHON) tools/gpu.py "$(OUT)" $(ARGS)

# What `make gpu` takes along, built on any machine with nvcc.
gpu-build:
	$(PYTHON) tools/gpu.py --build "$(ARCH)"

# A wheel for others: torch's and CUDA's libraries stay outside, the tag says which systems it
# needs. With CUDA kernels where nvcc is there and TORCH is a CUDA build (docs/building.md).
wheel: $(VENV)/.release-tools
	rm -rf build/lib* build/raw
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/raw .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --exclude 'libcuda*' --exclude 'libcudart*' --wheel-dir dist build/raw/*.whl

sdist: $(VENV)/.release-tools
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

# Registers and spills of the CUDA kernels that the last build compiled; fails if one spills.
ptxas:
	$(PYTHON) tools/ptxas_report.py build $(ARGS)

# Loads under way in the machine code of those kernels; fails if a loop has too few.
sass: $(VENV)/.release-tools
	$(BIN)/python tools/sass_report.py build $(ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format --dry-run --Werror

# What only other machines can run: the release workflows and their settings.
lint-release: $(VENV)/.release-tools
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/yamllint --strict .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[bfp]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/cibuildwheel --platform linux --archs x86_64,aarch64 --print-build-identifiers

# The site, in build/site; fails on a broken link or a name that is not there.
docs: $(VENV)/.built $(VENV)/.docs-tools
	$(BIN)/python -m mkdocs build --strict $(ARGS)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.examples: requirements-examples.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-examples.txt
	touch $@

$(VENV)/.release-tools: requirements-release.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-release.txt
	touch $@

$(VENV)/.docs-tools: requirements-docs.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	touch $@

# Built in place, without build isolation: an isolated build would fetch another torch.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist demo-output *.egg-info dldr_ext/*.so dldr_ext/_build.json $(VENV)/.built
