# Sightline: everything runs from .venv, made on first use. A torch that is already in .venv is kept.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# The oldest releases that are supported; see "Versions" in the README.
OLDEST_TORCH ?= torch==2.11.0
OLDEST_TRANSFORMERS ?= transformers==5.17.0
DEEPSPEED := deepspeed==0.19.8
SEED ?= 0
# `make quickstart` starts over; RESUME=auto goes on where an interrupted one stood.
RESUME ?= never
ARGS ?=
JOBS ?= 3
SLOW_JOBS ?= 3
# Compiled modules are kept where the environment says not to: each process of pytest would rewrite every test anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-test quickstart gpu-smoke gpu-bench check test test-oldest test-browser lint clean

setup: $(VENV)/.installed

setup-test: $(VENV)/.installed-dev

# DeepSpeed builds without its optional kernels and needs torch to be there first.
$(VENV)/.installed: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c "import deepspeed" 2>/dev/null || \
		(DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation "$(DEEPSPEED)")
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

quickstart: setup
	$(BIN)/python launch.py experiment=quickstart seed=$(SEED) resume=$(RESUME) $(ARGS)

# The RL loop at the size of a 3B model, on one GPU; ARGS="model=tiny cluster.placement=auto" tries it on a CPU.
gpu-smoke: setup
	$(BIN)/python launch.py experiment=gpu_smoke cluster.placement=colocated resume=never $(ARGS)

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Before every commit: what a linter sees, and a claim or two of every package.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "smoke and not cuda" -n $(JOBS) --dist loadfile $(ARGS)

# Quick tests first, in JOBS processes of one thread each, then those with real processes and long streams, which wait for
# processes to start most of the time: SLOW_JOBS of them side by side, each with a Ray of its own (0 = one after the other).
# The files that may take longest come first (tests/conftest.py), so that none of them is left over at the end.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow" -n $(SLOW_JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The quick tests with the oldest supported releases, in a virtual environment of their own.
test-oldest:
	$(MAKE) setup-test VENV=.venv-oldest TORCH="$(OLDEST_TORCH)"
	.venv-oldest/bin/python -m pip install -q "$(OLDEST_TRANSFORMERS)"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile $(ARGS)

# The transcript page in a real Chromium (Debian: apt-get install chromium chromium-driver); skips without one.
test-browser: setup-test
	$(BIN)/python -m pip install -q -e ".[browser]"
	$(BIN)/python -m pytest tests/browser -m browser $(ARGS)

# Needs a GPU: its tests and benchmarks, recorded in benchmarks/results/gpu_*.json.
gpu-bench: setup-test
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) .venv-oldest outputs
