# `make demo` and `make test` do all the set-up: an environment in .venv, and the package in it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo compare-demo compare compare-at-weight compare-ablation compare-cifar10 compare-cifar10-50k compare-cifar10-why compare-cifar10-layers compare-cifar10-two test test-slow test-all test-avx2 fuzz lint types contracts settings docs check clean

demo: .venv/installed  ## one student trained in five ways, few images and a good teacher, in about three minutes
	$(BIN)/factor-transfer demo

compare-demo: .venv/installed  ## the demo on ten other seeds; about a quarter of an hour; leaves results/demo-fashion
	$(BIN)/factor-transfer compare --config recipe:demo --methods baseline,baseline-matched,kd,ft,ft+kd --seed 100 --seeds 10 \
		--jobs 2 --threads 1 --log-with none --out runs/demo-fashion
	$(call keep,demo-fashion)

DIGITS = $(BIN)/factor-transfer compare --config recipe:digits --no-baseline --jobs 2 --threads 1 \
	--log-with none
keep = mkdir -p results/$(1) && cd runs/$(1) && tar cf - compare.json compare.md */summary.json */metrics.jsonl | tar xf - -C ../../results/$(1)

compare: .venv/installed  ## all methods on the built-in digits, ten seeds each, in minutes; leaves results/compare-digits
	$(DIGITS) --methods baseline,kd,at,fitnet,ft,ft+kd,at+kd --at-weight 3 --seed 200 --seeds 10 --out runs/compare-digits
	$(call keep,compare-digits)

compare-at-weight: .venv/installed  ## how the weight of attention above was chosen, on a share of the training images
	$(DIGITS) --methods baseline,at --sweep at_weight=3,30,300 --validation-share 0.25 --seeds 3 --out runs/compare-digits-at-weight
	$(call keep,compare-digits-at-weight)

ABLATIONS = $(DIGITS) --methods baseline,ft --sweep-on validation --seed 200 --seeds 6
compare-ablation: .venv/installed  ## the paper's ablations on the same; leaves results/compare-digits-{ablation,translator}
	$(ABLATIONS) --sweep k=0.5,0.75,1,2 --sweep p=2 --sweep paraphraser_epochs=0 --sweep paraphraser=none \
		--out runs/compare-digits-ablation
	$(ABLATIONS) --k 0.25 --sweep translator=conv,none --out runs/compare-digits-translator
	$(call keep,compare-digits-ablation)
	$(call keep,compare-digits-translator)

CIFAR10 ?= ../shared
REAL = $(BIN)/factor-transfer compare --data $(CIFAR10)/cifar10-jpeg --teacher cifar_resnet56 --student cifar_resnet20 \
	--teacher-weights $(CIFAR10)/checkpoints/resnet56-cifar10-jpeg.safetensors --beta 500 --paraphraser-epochs 6 --views 8 \
	--jobs 2 --threads 1 --log-with none
compare-cifar10: .venv/installed  ## the rivals on 10,000 real images, three seeds; about an hour; leaves results/compare-cifar10-10k
	$(REAL) --train-images 10000 --methods baseline,kd,at,fitnet,ft,ft+kd --epochs 20 --seeds 3 --out runs/compare-cifar10-10k
	$(call keep,compare-cifar10-10k)

compare-cifar10-50k: .venv/installed  ## baseline and ft on all of them, two seeds; 40 minutes; leaves results/compare-cifar10-50k
	$(REAL) --methods baseline,ft --epochs 12 --seeds 2 --out runs/compare-cifar10-50k
	$(call keep,compare-cifar10-50k)

TWO = --teacher-layer layer2,layer3 --student-layer layer2,layer3
WHY = $(REAL) --train-images 10000 --epochs 12 --seeds 2
compare-cifar10-why: .venv/installed  ## what would raise ft there, on held-out training images; about 40 minutes; leaves results/cifar10-why{,-layers}
	$(WHY) --methods baseline,ft --sweep beta=125,500,2000,8000 --sweep k=1 --out runs/cifar10-why
	$(WHY) --methods ft --sweep beta=500 $(TWO) --out runs/cifar10-why-layers
	$(call keep,cifar10-why)
	$(call keep,cifar10-why-layers)

LAYERS = $(REAL) --train-images 10000 --epochs 12 --seed 3 --seeds 3
compare-cifar10-layers: .venv/installed  ## factors of two layers against those of one, on the validation images and other seeds than above; 20 minutes; leaves results/cifar10-layers-{one,two}
	$(LAYERS) --methods baseline,ft --out runs/cifar10-layers-one
	$(LAYERS) --methods ft $(TWO) --out runs/cifar10-layers-two
	$(call keep,cifar10-layers-one)
	$(call keep,cifar10-layers-two)

compare-cifar10-two: .venv/installed  ## ft of compare-cifar10, with factors of two layers; 20 minutes; leaves results/cifar10-10k-two
	$(REAL) --train-images 10000 --methods ft --epochs 20 --seeds 3 $(TWO) --out runs/cifar10-10k-two
	$(call keep,cifar10-10k-two)

# A module's tests stay in one process, which shares what they made once, and the longest modules begin
# (tests/conftest.py); tests compute with one thread each. No worker that died is replaced: tests/conftest.py ends the
# suite. Tests are compiled once, and not by every process anew.
SPREAD = --numprocesses auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder --max-worker-restart 0
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(SPREAD)
test: .venv/installed-dev  ## the tests that take seconds each
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev  ## the others
	$(PYTEST) -m slow

test-all: .venv/installed-dev  ## both, in less time than one after the other
	$(PYTEST)

test-avx2: .venv/installed-dev  ## `make test` with the kernels that CPUs without AVX-512 get
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "not slow"

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

settings: .venv/installed-dev  ## docs/settings.md anew, after a setting has changed
	$(BIN)/python docs/settings.py

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
