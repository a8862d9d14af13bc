# make train      environment, installation, and the main job on the built-in synthetic flowers
# make test       the fast tier of tests; make test-all adds the slow one
# make lint       ruff, mypy and import-linter (each folder uses only those below it), as CI runs them
# make proof      BASE=REVISION: that and this checkout train a short run to the same weights, bit for bit
# make gpu-check  on a machine with a GPU: what works there and how fast, in at most ten minutes; PYTHON=... is any
#                 Python that has torch and NumPy, CHECK="--only STAGE" are options of bench/gpu_check.py
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
IN_PARALLEL := -n 2 --dist worksteal

.PHONY: train test test-all lint proof gpu-check

train: $(READY)
	$(BIN)/fastflower train --amp

test: $(TEST_READY)
	$(BIN)/pytest $(IN_PARALLEL) -m "not slow and not gpu"

test-all: $(TEST_READY)
	$(BIN)/pytest $(IN_PARALLEL) -m "not gpu"

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

proof: $(READY)
	$(BIN)/python bench/proof.py $(BASE)

gpu-check:
	$(PYTHON) bench/gpu_check.py $(CHECK)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(TEST_READY): setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(READY) $@
