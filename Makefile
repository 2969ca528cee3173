# Each target builds .venv first if it is missing; nothing else needs to be set up.
PYTHON ?= python3
WORKDIR ?= runs/$(RUN)-$(shell date +%Y%m%d-%H%M%S)
BIN := .venv/bin

.PHONY: train lm storm test test-tools test-all lint format docs .venv

.venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "setting up .venv: about 1.5 GB of packages, a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[experiments,test,dev]'
	@touch $@

# Eight virtual devices, so that eight workers exchange real messages on a CPU; ignored where there is an accelerator.
train: RUN := fashion_mnist
train: .venv
	JAX_NUM_CPU_DEVICES=8 $(BIN)/python experiments/train.py --config=experiments/configs/fashion_mnist.py --workdir=$(WORKDIR)

# A small language model of bytes, some minutes; WORKDIR/curves.png has bits per byte, consensus and bytes per token.
lm: RUN := lm
lm: .venv
	JAX_NUM_CPU_DEVICES=8 $(BIN)/python experiments/train.py --config=experiments/configs/lm.py --workdir=$(WORKDIR)

# Islands under every fault, about 8 minutes; WORKDIR/storm.png shows it. As root faults of links too.
storm: RUN := storm
storm: .venv
	$(BIN)/python -m experiments.islands.storm --workdir=$(WORKDIR)

# A file's tests run in one process, which makes their fixtures and compiles their programs once.
test: .venv
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist loadfile -m "not slow and not tools"

# What measures and what launches: needed where benchmarks/ or experiments/launch/ change.
test-tools: .venv
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist loadfile -m "tools and not slow"

# All tests, each compiled with all of XLA's optimization.
test-all: .venv
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist loadfile

# The site in build/site; a link that leads nowhere is an error.
docs: .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/build_site.py build/site

lint: .venv
	$(BIN)/ruff format --check --diff
	$(BIN)/ruff check
	$(BIN)/pyrefly check

format: .venv
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
