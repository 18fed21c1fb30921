# `make demo` and `make test` do all the set-up: an environment in .venv, and the package in it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-all fuzz lint types contracts check clean

demo: .venv/installed  ## the whole job on the built-in digits, in about half a minute
	$(BIN)/factor-transfer demo

test: .venv/installed-dev  ## the tests that take seconds each
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/installed-dev  ## the others
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

FUZZ ?= 3600
fuzz: .venv/installed-dev  ## thousands of odd inputs for each test of test_fuzz.py; leaves results/fuzz.json
	FACTOR_TRANSFER_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

contracts: .venv/installed-dev
	$(BIN)/lint-imports

check: lint types contracts test  ## what a change must pass

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "factor-transfer needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
