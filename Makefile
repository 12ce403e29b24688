# Two commands matter: `make demo` (nothing -> a clip with sound) and `make test` (the whole CPU suite).
#
# Variables: PYTHON (interpreter that makes the environment), VENV (where it lives), PIP_ARGS (added to each pip call,
# for example an index with CPU builds of torch), PYTEST_ARGS, AOT_ARGS, CUDA_ARCHS, PROMPT, SEED; for `make gpu` SECTION
# (one or more of env build tests sanitizer kernels model feeding train report), DRY=1 and GPU_ARGS.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
AOT_ARGS ?=
PROMPT ?= a red ball bounces on the left
SEED ?= 1
SECTION ?=
DRY ?=
GPU_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/attributes.h)
CUDA_ARCHS ?= 80;90a
# One thread per test worker: two workers on two cores run side by side instead of fighting over them.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test check lint install install-dev aot native-cuda bench gpu docs clean

help:
	@echo "make demo   an mp4 with sound from nothing: .venv, install, out/demo.{mp4,png,json}"
	@echo "make test   the whole CPU test suite"
	@echo "make check  ruff, mypy and the quick tests"
	@echo "make bench  microbenchmarks of the ops on this machine, rows in benchmarks/results/"
	@echo "make clean  remove what the other commands made"
	@echo "make docs   docs/benchmarks.md from the measured rows"
	@echo "make native-cuda  compile the CUDA ops with nvcc: registers, stack, spills, shared memory; needs no GPU"
	@echo "make aot    compile the Triton kernels for three GPU generations: registers, spills, shared memory"
	@echo "make gpu    builds, tests and measures on the GPU of this machine; DRY=1 tries it without one (docs/gpu.md)"

# --- environment -----------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "javis needs Python >= 3.10, but $(PYTHON) is "\
	+ sys.version.split()[0] + "; set PYTHON=python3.11 or the like")'
	@echo "making $(VENV) and installing into it: once, a few minutes"
	$(PYTHON) -m venv $(VENV)

# torch comes first: the native ops are compiled against its headers.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch numpy setuptools wheel ninja pybind11
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py $(NATIVE) $(VENV)/.torch
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# --- commands --------------------------------------------------------------------------------------------------------

demo: $(VENV)/.installed
	@mkdir -p out
	$(BIN)/javis sample "$(PROMPT)" --seed $(SEED) --out out/demo.mp4
	@for file in out/demo.mp4 out/demo.png out/demo.json; do test -s $$file || { echo "demo: $$file is missing" >&2; exit 1; }; done
	@echo "wrote out/demo.mp4, out/demo.png and out/demo.json"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy javis

check: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu" $(PYTEST_ARGS)

test: $(VENV)/.installed-dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m javis.bench

# Every Triton kernel compiled for sm_80, sm_90 and sm_100, with gates; needs no GPU.
aot: $(VENV)/.installed-dev
	env -u TRITON_INTERPRET $(BIN)/python -m javis.kernels.aot $(AOT_ARGS)

# The CUDA ops, for $(CUDA_ARCHS), into javis/lib, with gates on what ptxas says; needs nvcc but no GPU.
native-cuda: $(VENV)/.installed-dev
	JAVIS_NATIVE=1 JAVIS_CUDA_ARCHS="$(CUDA_ARCHS)" $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m javis.kernels.ptxas --folder build

# docs/benchmarks.md, docs/experiments.md, the tables of docs/sync.md and docs/roofline.png from the rows in benchmarks/results
docs: $(VENV)/.installed
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python -m benchmarks.experiments_page
	$(BIN)/python -m benchmarks.sync_page
	$(BIN)/python -m benchmarks.roofline

# Everything that needs a GPU, in sections of less than eight minutes that can be stopped and taken up again
# (docs/gpu.md). It uses $(PYTHON) as it is and installs nothing. DRY=1: every section at toy size without a GPU.
gpu:
	@$(PYTHON) -m benchmarks.gpu $(if $(SECTION),--section $(SECTION)) $(if $(filter-out 0,$(DRY)),--dry) $(GPU_ARGS)

clean:
	rm -rf $(VENV) .ci/venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf javis/lib javis/_host*.so javis/_build.json
	find javis tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
