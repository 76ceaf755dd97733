# Two commands do everything on a fresh machine with Python 3.10+ and a C++ compiler:
#   make demo    quantise the example model, run it in our llama.cpp, measure it
#   make test    lint, types, unit, property, round-trip and end-to-end tests
# Variables: PYTHON=python3.11  JOBS=2  WORKERS=2  PT2_CACHE=DIR (where llama.cpp is built and kept)

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Processes that run tests: one a core, but no more than four, for each loads PyTorch.
WORKERS ?= $(shell [ $(JOBS) -lt 4 ] && echo $(JOBS) || echo 4)
VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay in one process, so that what they share is made once.
PYTEST = $(BIN)/python -m pytest -q -rs -n $(WORKERS) --dist loadfile
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test quick lint llama stock setup clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4
	@echo
	@echo "make setup   the Python environment ($(VENV)) with all packages"
	@echo "make quick   lint, types and the tests of less than two minutes, for while you work"
	@echo "make llama   our llama.cpp (about 8 minutes on 2 cores, once)"
	@echo "make stock   the unmodified one beside it, which make test runs our Q2_K files on"
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

stock: setup
	$(BIN)/pt2-llama build --stock --jobs $(JOBS)

demo: llama
	$(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without a build of llama.cpp its tests are left out here, and the command line says so.
quick: lint
	$(PYTEST) -m quick $$($(BIN)/python -c \
		"from pt2_llama import api; print('' if api.find_build() else '--no-llama')")

# Every class of the zoo is run there, and so the dozen of make quick too.
test: lint llama stock
	$(PYTEST) --durations=15 --deselect tests/test_zoo.py::test_a_dozen_classes_go_through_the_whole_path

clean:
	rm -rf $(VENV) out build *.egg-info
