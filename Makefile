# Every target sets itself up in .venv from a fresh clone; Python 3.11+ and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: bench test check gpu-test setup clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

bench: setup  ## compare all registered mixers on this machine: table, picture, JSON
	$(BIN)/zoo bench

test: setup  ## the whole test suite; Triton kernels run in its interpreter, in a process of their own
	$(PYTEST) -n $(WORKERS) --ignore=tests/kernels
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) tests/kernels

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test:  ## conformance, kernels and a benchmark smoke on CUDA; by PYTHON if it has torch, else by .venv, set up first
	@if $(PYTHON) -c 'import pytest, torch, xdist' 2>/dev/null; then $(PYTHON) benchmarks/gpu_test.py; \
	else $(MAKE) setup && $(BIN)/python benchmarks/gpu_test.py; fi

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist
