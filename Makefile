# Everything runs in .venv, which the first target that needs it makes. PYTHON=... chooses the interpreter.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := ssod_edge export bench scripts tests examples setup.py
TYPED := build/typed
# Test files that run at a time, each with one OpenMP thread: two processes that want all cores wait for each other.
JOBS := 2
# Where scripts/venv.sh found a Python 3.10, the tests of what goes onto a device run on it too. Read when it is used.
PYTHON310 = $(shell ls $(abspath $(VENV))/python310/bin/python 2>/dev/null)

.PHONY: help venv demo test test-slow test-gpu docs docs-test faults plans cuda wheel dist arm64 container lint typed format \
	coverage clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## make .venv with every extra (a second run reuses it)

$(STAMP): pyproject.toml setup.py scripts/venv.sh $(wildcard kernels/*)
	@scripts/venv.sh $(VENV)
	@touch $@

demo: $(STAMP) ## train, evaluate, export, bench, predict and teach on the embedded data set
	@PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh

test: $(STAMP) ## run the tests that need no GPU
	OMP_NUM_THREADS=1 SSOD_EDGE_PYTHON310="$(PYTHON310)" $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu and not slow"

test-slow: $(STAMP) ## run the tests that take long and guard little more than others do
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu"

test-gpu: $(STAMP) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

docs: $(VENV)/.docs typed ## build the manual with its reference: build/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-test: $(STAMP) ## run the commands of every page of the manual on small data; minutes
	OMP_NUM_THREADS=1 SSOD_EDGE_MANUAL=all $(BIN)/python -m pytest -q tests/test_manual.py

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet "ssod-edge[docs]"
	@touch $@

# SEED=2 tries other things; MINUTES is for all parts together; PART=images and ONLY=100017 replay what was found.
SEED := 1
MINUTES := 15
faults: $(STAMP) ## damage files, kill, fill the disk and race, from a seed (SEED=1 MINUTES=15 PART=images ONLY=100017)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python -m faults --seed $(SEED) --minutes $(MINUTES) \
		$(addprefix --part ,$(PART)) $(addprefix --only ,$(ONLY))

plans: $(STAMP) ## build real plans of every backbone with TensorRT for RTX, no GPU needed
	$(BIN)/python -m ssod_edge.bench.tools.plans

cuda: $(STAMP) ## compile and link the CUDA code for every architecture of a release, no GPU needed (ARCHS="87 90a")
	$(BIN)/python scripts/cuda.py $(ARCHS)

wheel: ## a wheel without compiled code, for devices: dist/ssod_edge-VERSION-py3-none-any.whl; installs nothing
	SSOD_EDGE_EXT=none $(or $(wildcard $(BIN)/python),python3) -m pip wheel -q --no-deps -w dist .

dist: $(VENV)/.release ## what a release is made of, checked: the sdist, and wheels with the kernel and without
	rm -rf dist
	SSOD_EDGE_EXT=none $(BIN)/python -m build --no-isolation --outdir dist .
	SSOD_EDGE_EXT=cpu $(BIN)/pip wheel -q --no-deps --no-build-isolation -w build/wheel dist/ssod_edge-*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'lib*torch*.so*' --exclude 'libc10*.so*' -w dist build/wheel/*.whl
	rm -r build/wheel
	$(BIN)/twine check --strict dist/*
	@du -b dist/*

$(VENV)/.release: $(STAMP)
	$(BIN)/python -m pip install --quiet "ssod-edge[release]"
	@touch $@

# Beside these words: EXPORT=DIR PHOTOS=DIR LESSON=DIR, and SUITE=trixie or BOARD=pi4 in the environment.
arm64: $(STAMP) ## tests, predict and teach on an emulated 64-bit Arm Debian; needs root, debootstrap, qemu-user-static
	@OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python scripts/devices/arm64.py \
		$(addprefix --export ,$(EXPORT)) $(addprefix --photos ,$(PHOTOS)) $(addprefix --lesson ,$(LESSON))

container: $(STAMP) ## the Dockerfile's steps in a bare Debian, without Docker; needs root and debootstrap
	@OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python scripts/devices/container.py

lint: $(STAMP) typed ## formatter, linter and type checker
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	cd $(TYPED) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p ssod_edge

# mypy and the manual's reference do not follow the mapping of export/ and bench/: here they lie where they are installed.
typed:
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/ssod_edge
	@ln -s $(addprefix $(CURDIR)/,$(wildcard ssod_edge/*) export bench) $(TYPED)/ssod_edge/

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

coverage: $(STAMP) ## coverage of the part that runs without torch; fails under 95%
	SSOD_EDGE_PYTHON310="$(PYTHON310)" $(BIN)/python -m pytest -q -m "not gpu" --cov --cov-report=term --cov-fail-under=95

clean: ## remove what was built (.venv and runs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
