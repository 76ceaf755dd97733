# Two commands do everything on a fresh machine with Python 3.10+ and a C++ compiler:
#   make demo    quantise the example model, run it in our llama.cpp, measure it
#   make test    lint, types, unit, property, round-trip and end-to-end tests
# Variables: PYTHON=python3.11  JOBS=2  PT2_CACHE=DIR (where llama.cpp is built and kept)

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint llama setup clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -5
	@echo
	@echo "make setup   the Python environment ($(VENV)) with all packages"
	@echo "make llama   our llama.cpp (about 8 minutes on 2 cores, once)"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove the environment and out/ (the llama.cpp cache stays: pt2-llama clean)"

$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.10 or newer, or set PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10: set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed

llama: setup
	$(BIN)/pt2-llama build --jobs $(JOBS)
	$(BIN)/pt2-llama bindings

demo: llama
	$(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint llama
	$(BIN)/python -m pytest -q -rs --durations=15

clean:
	rm -rf $(VENV) out build *.egg-info
