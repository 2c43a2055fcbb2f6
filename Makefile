# `make demo` and `make test` set up all they need, in .venv; nothing outside the checkout changes but pip's cache and
# the compiled kernels' (~/.cache/quantlib). `make PYTHON=... test` chooses the interpreter.
export PYTHON
BIN := .venv/bin
RUN := $(BIN)/python
ENVIRONMENT := $(if $(PYTHON),$(PYTHON),python3) scripts/environment.py
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# One worker a core, each with one thread.
WORKERS = $(shell $(RUN) -c 'import xdist' 2>/dev/null && echo -n auto --maxprocesses 8)

.PHONY: help demo test setup lint format bench verify gpu sanitize clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 16

demo: .venv/ready-demo kernels  ## quantize a real model to every format, check it, draw the table
	$(RUN) -m quantlib.examples.demo

test: .venv/ready-test kernels  ## every test
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(WORKERS) $(TESTS)

setup: .venv/ready-test kernels  ## the environment and the compiled kernels, as the tests need them

lint: .venv/ready-dev  ## formatters, ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: .venv/ready-dev  ## put Python and C++ in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: .venv/ready-bench kernels  ## time every op beside its peers
	$(RUN) -m benchmarks

verify: .venv/ready-test kernels  ## all 2^32 inputs of every cast, and of int8 at the scales of the contract
	$(RUN) -m quantlib verify

gpu: .venv/ready-test  ## on a machine with a GPU, offline too: build for it, every test and every sweep on it
	$(RUN) scripts/gpu_acceptance.py

sanitize: .venv/ready-test  ## the tests over C++ built with ASan and UBSan
	sh scripts/sanitize.sh $(TESTS)

clean:  ## remove the environment and whatever was built in the checkout
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: kernels
kernels:
	@$(RUN) quantlib/_build.py cpu

.venv/ready-%: pyproject.toml scripts/environment.py
	$(ENVIRONMENT) $*
	@touch $@
