# Every target sets up .venv by itself the first time, and again after a change to what is built.
#   TORCH_INDEX=URL   where pip gets torch from (say, a CPU or a CUDA build); none: pip's own
#   PYTHON=python3.x  the Python to make .venv with, 3.11 or later
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := CMakeLists.txt $(shell find csrc -type f)
# A file a process, a thread each: tests of threads say how many they want.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: help demo test test-full bench lint pretrain report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## post-train the small Doom world model: the whole method in minutes
	$(BIN)/rlir post-train doom-tiny --out runs/demo

pretrain: $(READY) ## train the small models from recorded play again
	$(BIN)/rlir pretrain all --preset doom-tiny --out runs/pretrain

report: $(READY) ## post-train with live controls and write the report
	$(BIN)/rlir post-train doom-tiny --out runs/report --control live

test: $(READY) ## run all tests
	$(PYTEST)

test-full: $(READY) ## run everything, however long it takes: ten times the examples, sanitizers
	RLIR_FULL_TESTS=1 $(PYTEST)
	$(BIN)/python tools/sanitize.py

bench: $(VENV)/.peers ## run all benchmarks; results go to benchmarks/results/
	@mkdir -p benchmarks/results
	@for file in benchmarks/bench_*.py; do \
	  name=$$(basename $$file .py); \
	  $(BIN)/python $$file | tee benchmarks/results/$$name.txt; \
	done

lint: $(READY) ## check style, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# What benchmarks compare with.
$(VENV)/.peers: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation -c constraints.txt -e '.[bench]'
	@touch $@

clean: ## remove .venv and what was built (not runs/)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch first and by itself: it may come from another index, which need not have its dependencies
# (the last line brings them). The build is not isolated: that would download a second torch.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rlir: Python 3.11 or later is needed, got $$($(PYTHON) --version 2>&1 | head -1):" \
	    "install it, or make PYTHON=python3.11" >&2; exit 1; }
	@for cxx in $${CXX:-c++ g++ clang++}; do \
	  if echo 'int main() {}' | $$cxx -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then \
	    found=$$cxx; break; fi; done; \
	  [ -n "$${found:-}" ] || { \
	  echo "rlir: a C++20 compiler is needed and none was found (CXX is '$${CXX:-}'):" \
	    "install g++ 11 or clang 14, or later" >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install -c constraints.txt cmake ninja pybind11 scikit-build-core
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@
