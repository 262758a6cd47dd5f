# `make` lists what there is. Everything lives in .venvs/ and .models/; nothing outside this folder is changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11
DEV := .venvs/dev
SGLANG := .venvs/sglang
MODEL := .models/smollm2-135m
WHEEL := dist/.built
SOURCES := $(shell find kvd/ sidecar router planner storage -name '*.py' 2>/dev/null) pyproject.toml README.md

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

$(DEV)/.stamp: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "needs $(PYTHON): install it, or say PYTHON=..."; exit 1; }
	@echo "setting up $(DEV) ..."
	@test -x $(DEV)/bin/python || $(PYTHON) -m venv $(DEV)
	@$(DEV)/bin/python -m pip install -q torch==2.13.0 -e '.[node,shared,router,dev]' 2> >(grep -v -e WARNING -e notice >&2)
	@touch $@

$(WHEEL): $(DEV)/.stamp $(SOURCES)
	@echo "building the wheel ..."
	@rm -rf dist && $(DEV)/bin/python -m build -q --no-isolation --wheel && touch $@

sglang: $(WHEEL)  ## a real SGLang for the CPU with our wheel in it, and a small real model
	@$(DEV)/bin/python tools/sglang_cpu/setup_env.py --venv $(SGLANG) --model $(MODEL) --wheel dist/*.whl

setup: $(DEV)/.stamp sglang  ## everything that the other targets need

demo: setup  ## the main job on real input: two SGLang workers and kvd, in about three minutes  [ARGS="--nodes --keep"]
	@$(DEV)/bin/python -m tools.demo $(ARGS)

test: $(DEV)/.stamp  ## all tests but the slow ones; needs no root  [ARGS="-m slow"]
	@$(MAKE) -s sglang || echo "no SGLang for the CPU here (see above): tests that need it are skipped"
	@$(DEV)/bin/python -m pytest $(ARGS)

check: $(DEV)/.stamp  ## format, lint, types, layers
	@$(DEV)/bin/ruff format --check -q . && $(DEV)/bin/ruff check -q . && $(DEV)/bin/mypy && \
	 $(DEV)/bin/python -m pytest -q --no-header -p no:cacheprovider tests/test_layers.py

bench: setup  ## one benchmark: NAME=host_path|lookup|ttft|gate|import_cost|nvme|reopen|shared|policy|router_quality  [ARGS="--quick --json"]
	@test -n "$(NAME)" || { echo "which? make bench NAME=... (tools/bench/README.md)"; exit 2; }
	@$(DEV)/bin/python -m tools.bench.$(NAME) $(ARGS)

bench-all: setup  ## all benchmarks into docs/benchmarks.md
	@$(DEV)/bin/python -m tools.bench.all $(ARGS)

clean:  ## remove what make made
	rm -rf .venvs .models dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup sglang demo test check bench bench-all clean
