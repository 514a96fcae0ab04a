# Every target makes the virtual environment first, if it is missing or out of date.
#
#   make train [RECIPE=recipes/chronos_moe_cpu.yaml]   train, then print a table per data set
#   make test                                          everything that has to hold before a merge
#   make test-quick | lint | docs | clean
#
# WORKERS=2             processes that tests are shared among, each of which starts up to four ranks; 0 runs them in one
# PYTHON=python3.12     the interpreter to build the environment with; by default the first one that is new enough
# CONSTRAINTS=          keep the torch that PYTHON already has (GPU machines) instead of the CPU build;
#                       `make clean` first where an environment with the other kind exists

PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
RECIPE ?= recipes/chronos_moe_cpu.yaml
CONSTRAINTS ?= constraints/cpu.txt
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# One stamp per state of the files that decide what is installed.
STAMP := $(VENV)/.stamp-$(shell { cat pyproject.toml $(CONSTRAINTS); echo "$(CONSTRAINTS)"; } | cksum | cut -d' ' -f1)

ifeq ($(strip $(CONSTRAINTS)),)
VENV_OPTIONS := --system-site-packages
# Without a torch to keep, pip would fetch gigabytes of the newest CUDA build.
HAS_TORCH = $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || \
	{ echo "CONSTRAINTS= keeps the torch that $(PYTHON) has, but it has none"; exit 1; }
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install
else
VENV_OPTIONS :=
HAS_TORCH := true
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -c $(CONSTRAINTS)
endif

# Idle workers take tests from busy ones.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: train test test-quick lint docs clean
.DEFAULT_GOAL := test

train: $(STAMP)
	$(BIN)/lightning-moe fit --config $(RECIPE)

test: lint
	$(PYTEST)

test-quick: $(STAMP)
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(INSTALL) -q -e '.[docs]'
	$(BIN)/mkdocs build --strict

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)
	@$(HAS_TORCH)
	$(INSTALL) -e '.[chronos,docs,test]'
	rm -f $(VENV)/.stamp-*
	touch $@

clean:
	rm -rf $(VENV) dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
