# make sweep   the full toy matrix: 360 cells, about ten minutes on two cores
# make test    what CI runs: lint, format, types, tests
# make ui      MLflow on the results, published numbers beside them

PYTHON ?= python3.11
VENV ?= .venv
# Options for pip where torch is installed, such as the index of a CPU or a CUDA build (see the README).
TORCH_OPTIONS ?=
# Options for every benchmark.
BENCH_OPTIONS ?=
# Processes that share the tests; one of them starts clusters, servers and browsers.
TEST_WORKERS ?= 2
CEREBRAS_ENV ?= .venv-cerebras
# cerebras_pytorch, what Model Zoo's Trainer imports, and what its checkpoint converter imports.
CEREBRAS_PACKAGES := cerebras_pytorch transformers tokenizers pydantic requests Pillow torchvision slack-sdk \
	safetensors h5py psutil pandas packaging pyyaml rich argcomplete datasets more-itertools
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: sweep smoke test test-slow test-cerebras cerebras-env lint types bench bench-gpu ui clean

sweep: $(READY)
	$(BIN)/tune-sparse prepare toy
	$(BIN)/tune-sparse sweep toy

smoke: $(READY)
	$(BIN)/tune-sparse sweep smoke

test: lint types
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder --max-worker-restart 0

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow"

test-cerebras: $(READY)
	$(BIN)/python -m pytest -m "cerebras or modelzoo"

# The Cerebras environment, about 6 GB. Model Zoo is a checkout of your own: set MODELZOO to its src.
cerebras-env: cluster/constraints-cerebras.txt
	$(PYTHON) -m venv $(CEREBRAS_ENV)
	$(CEREBRAS_ENV)/bin/pip install --quiet -c $< $(CEREBRAS_PACKAGES)
	@echo "export CEREBRAS_VENV=$(abspath $(CEREBRAS_ENV))"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# BENCH_OPTIONS=--smoke: each with its smallest setting, in a few minutes.
bench: $(READY)
	for bench in $(filter-out tests/bench_gpu.py,$(wildcard tests/bench_*.py)); do \
		$(BIN)/python $$bench $(BENCH_OPTIONS) || exit 1; done

# On a machine with a GPU, at most nine minutes; plain `python tests/bench_gpu.py` needs no installation.
bench-gpu: $(READY)
	$(BIN)/python tests/bench_gpu.py $(BENCH_OPTIONS)

ui: $(READY)
	$(BIN)/tune-sparse track --baselines
	$(BIN)/tune-sparse ui

$(READY): pyproject.toml cluster/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c cluster/constraints.txt $(TORCH_OPTIONS)
	$(BIN)/pip install --quiet --editable ".[dev]" -c cluster/constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
