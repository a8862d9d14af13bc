# make train      environment, installation, and the main job on the built-in synthetic flowers
# make test       the fast tier of tests; make test-all adds the slow one
# make lint       ruff and mypy, as CI runs them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready

.PHONY: train test test-all lint

train: $(READY)
	$(BIN)/fastflower train --amp

test: $(TEST_READY)
	$(BIN)/pytest -m "not slow"

test-all: $(TEST_READY)
	$(BIN)/pytest

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(TEST_READY): setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(READY) $@
