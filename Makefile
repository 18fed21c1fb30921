# `make demo` and `make test` do all the set-up: an environment in .venv, and the package in it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo compare compare-at-weight compare-ablation compare-cifar10 test test-slow test-all fuzz lint types contracts docs check clean

demo: .venv/installed  ## the whole job on the built-in digits, in about half a minute
	$(BIN)/factor-transfer demo

DIGITS = $(BIN)/factor-transfer compare --config recipe:demo --no-baseline --jobs 2 --threads 1 \
	--log-with none
keep = mkdir -p results/$(1) && cd runs/$(1) && tar cf - compare.json compare.md */summary.json */metrics.jsonl | tar xf - -C ../../results/$(1)

compare: .venv/installed  ## all methods on the built-in digits, ten seeds each, in minutes; leaves results/compare-digits
	$(DIGITS) --methods alone,kd,at,fitnet,ft,ft+kd,at+kd --at-weight 3 --seed 200 --seeds 10 --out runs/compare-digits
	$(call keep,compare-digits)

compare-at-weight: .venv/installed  ## how the weight of attention above was chosen, on a share of the training images
	$(DIGITS) --methods alone,at --sweep at_weight=3,30,300 --validation-share 0.25 --seeds 3 --out runs/compare-digits-at-weight
	$(call keep,compare-digits-at-weight)

ABLATIONS = $(DIGITS) --methods alone,ft --sweep-on validation --seed 200 --seeds 6
compare-ablation: .venv/installed  ## the paper's ablations on the same; leaves results/compare-digits-{ablation,translator}
	$(ABLATIONS) --sweep k=0.5,0.75,1,2 --sweep p=2 --sweep paraphraser_epochs=0 --sweep paraphraser=none \
		--out runs/compare-digits-ablation
	$(ABLATIONS) --k 0.25 --sweep translator=conv,none --out runs/compare-digits-translator
	$(call keep,compare-digits-ablation)
	$(call keep,compare-digits-translator)

CIFAR10 ?= ../shared
compare-cifar10: .venv/installed  ## the rivals on 10,000 real images, three seeds; about an hour; leaves results/compare-cifar10-10k
	$(BIN)/factor-transfer compare --data $(CIFAR10)/cifar10-jpeg --train-images 10000 --teacher cifar_resnet56 \
		--teacher-weights $(CIFAR10)/checkpoints/resnet56-cifar10-jpeg.safetensors --student cifar_resnet20 \
		--methods alone,kd,at,fitnet,ft,ft+kd --beta 500 --views 8 --epochs 20 --seeds 3 --jobs 2 --threads 1 \
		--log-with none --out runs/compare-cifar10-10k
	$(call keep,compare-cifar10-10k)

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

docs: .venv/installed-dev  ## the pages of docs/ as a site in docs/_build; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build

check: lint types contracts docs test  ## what a change must pass

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
