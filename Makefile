# Everything a newcomer needs, from a bare clone. `make help` lists the targets.
#
#   VENV     where the virtual environment is made (default .venv)
#   PYTHON   the interpreter to make it from, 3.11 or newer (default python3)
#   PIP_ARGS more arguments for pip, such as an index with CPU-only torch
#   OUT      where `make demo` writes (default out)

VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
OUT ?= out

BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies-installed
INSTALLED := $(VENV)/.project-installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.map)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo serve test test-long lint bench bench-kernels bench-engine bench-codec bench-start bench-serving simulate \
    soak cancellation chaos overload fuzz autoscaling demo-model clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv, install everything into it, build the C++ kernels (the others do it when needed)

demo: $(INSTALLED) ## start the service, stream four pieces of the embedded model from it into out/, with pictures and a table, stop it
	$(BIN)/python -m musicgen_serving.demo --out $(OUT)

serve: $(INSTALLED) ## the same service, left running: HTTP on port 8000, gRPC on port 9000, until Ctrl-C
	$(BIN)/musicgen serve

test: lint ## everything that must hold: lint, then all quick tests
	$(BIN)/python -m pytest -m "not slow"

test-long: $(INSTALLED) ## the slow tests too: every kernel for every GPU, CPU kernels under sanitizers, kills on a cluster, a long state machine
	$(BIN)/python -m pytest -m slow
	ENGINE_TRANSITIONS=160000 $(BIN)/python -m pytest -s tests/engine/test_state_machine.py

lint: $(INSTALLED) ## ruff, mypy (strict) and the import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## time the embedded model on this machine: 3 x 30 s from text; the last line is JSON
	$(BIN)/musicgen generate "happy rock" --num-samples 3 --duration 30 --seed 7 --overwrite -o build/bench --json

bench-kernels: $(INSTALLED) ## time each kernel beside this machine's bandwidth and arithmetic peaks; options: `python -m benchmarks.bench_kernels --help`
	$(BIN)/python -m benchmarks.bench_kernels

bench-engine: $(INSTALLED) ## time the engine beside transformers, with random weights of the true sizes
	$(BIN)/python -m benchmarks.bench_engine

bench-codec: $(INSTALLED) ## time the codec beside transformers, whole and in chunks
	$(BIN)/python -m benchmarks.bench_codec

simulate: $(INSTALLED) ## simulate 4 H100 replicas of melody at 80 % load with the real scheduler
	$(BIN)/python -m benchmarks.simulate --replicas 4 --load 0.8 --requests 600

soak: $(INSTALLED) ## ten minutes of requests and cancels: memory flat, ledger balanced
	$(BIN)/python -m benchmarks.soak_engine --minutes 10

bench-start: $(INSTALLED) ## what the service takes to start, at rest and to stop: time, processor, memory
	$(BIN)/python -m benchmarks.bench_start

bench-serving: $(INSTALLED) ## time the service under open-loop load beside the bare engine, with a plot
	$(BIN)/python -m benchmarks.bench_serving

cancellation: $(INSTALLED) ## every way to cancel, at every moment, over both protocols: none may be lost
	$(BIN)/python -m benchmarks.cancellation --per-cell 32

chaos: $(INSTALLED) ## kill replicas of every kind under streams, and a node: every stream must end as if nothing had been
	$(BIN)/python -m benchmarks.chaos --kills 10
	$(BIN)/python -m benchmarks.multi_node

overload: $(INSTALLED) ## three times what the service can do, a flooding tenant, and readers that stop reading
	$(BIN)/python -m benchmarks.overload

fuzz: $(INSTALLED) ## 20,000 broken requests over both protocols: no crash, no leak, books balanced
	$(BIN)/python -m benchmarks.fuzz_serving --requests 20000

autoscaling: $(INSTALLED) ## load up, replicas up, load off, replicas down; and a redeployment under load
	$(BIN)/python -m benchmarks.autoscaling

demo-model: $(INSTALLED) ## make the embedded model again, from nothing, in some 75 minutes on two cores; needs fluidsynth and fluid-soundfont-gm
	$(BIN)/python -m musicgen.demo --out build/demo

clean: ## remove what was built here (not .venv, and not the music in out/)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f kernels/musicgen_kernels/*.so $(VENV)/.project-installed
	find musicgen kernels serving tests -name __pycache__ -prune -exec rm -rf {} +

# An existing environment is used as it is.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: expected Python 3.11 or newer, got `$(PYTHON) --version 2>&1`; run make PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# First what the build needs, so that the project is built against the pinned set and without a second download.
$(DEPENDENCIES): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the dependencies into $(VENV); torch is large, so the first time takes some minutes"
	$(PIP) setuptools pybind11 numpy
	@touch $@

$(INSTALLED): $(DEPENDENCIES) setup.py $(NATIVE)
	$(PIP) --no-build-isolation -e '.[serve,tracing,redis,dev]'
	@touch $@
