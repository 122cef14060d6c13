# make demo   train a dense network and its sparse versions, compare them (minutes)
# make test   all tests
# make lint   ruff, mypy, import-linter
# Needs Python 3.11 or later and, the first time, a network; test also needs a C++ compiler. PYTHON=… and VENV=… choose others.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for each in python3 python3.11 python3.12 python3.13; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)
# The CPU build of torch; without it pip takes the build with the CUDA libraries, gigabytes that nothing here uses. torch comes
# first and alone, so that nothing else is looked for there.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt

.PHONY: help demo test lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.installed-demo
	@$(BIN)/sift doctor
	$(BIN)/sift demo $(DEMO)

test: $(VENV)/.installed-dev
	@$(BIN)/sift doctor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist *.egg-info sift-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.installed-demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[demo,dev]'
	@touch $@

$(VENV)/.torch: $(VENV)/.made requirements/constraints.txt
	@echo "Installing into $(VENV); the first time this takes minutes."
	$(INSTALL) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) torch
	@touch $@

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11."; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "No environment could be made. Debian, Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@
