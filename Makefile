# Everything from a fresh clone on a machine that has only Python.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help test train bench scaling profile lint types check clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8
	@echo "PYTHON=python3.12 chooses the interpreter, WORKERS=4 how many processes test,"
	@echo "ARGS=... goes to the command"

test: $(INSTALLED)  ## the laws, the examples and the code in the README
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile ci \
		-n $(WORKERS) --dist loadfile --max-worker-restart 0 $(ARGS)

train: $(INSTALLED)  ## train a small language model on two processes
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/train.py $(ARGS)

bench: $(INSTALLED)  ## the same training by functional-ep and by its peers, side by side
	$(BIN)/python examples/benchmarks/side_by_side.py --results docs/benchmarks.jsonl --page docs/benchmarks.md $(ARGS)

scaling: $(INSTALLED)  ## how the cost of a step grows with ranks, experts and tokens
	$(BIN)/python examples/benchmarks/scaling.py --results docs/scaling.jsonl --plot docs/scaling.png $(ARGS)

profile: $(INSTALLED)  ## where the time of a step goes, on two processes
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/benchmarks/profile_step.py $(ARGS)

lint: $(INSTALLED)  ## formatting and style
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(INSTALLED)  ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test  ## all that a change has to pass

clean:  ## remove the virtual environment and everything generated
	rm -rf $(VENV) *.egg-info build dist runs .pytest_cache .hypothesis .ruff_cache
	find sharding functional_ep examples tests -name __pycache__ -exec rm -rf {} +

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[test,train]'
	touch $@
