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

gpu-test:  ## conformance, kernels and a benchmark smoke on CUDA, with the python that holds torch (PYTHON=...)
	$(PYTHON) benchmarks/gpu_test.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist
