# `make demo` and `make test` set up all they need, in .venv; nothing outside the checkout changes but pip's cache and
# the compiled kernels' (~/.cache/quantlib). `make PYTHON=... test` chooses the interpreter.
export PYTHON
BIN := .venv/bin
RUN := $(BIN)/python
ENVIRONMENT := $(if $(PYTHON),$(PYTHON),python3) scripts/environment.py
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# One worker a core, each with one thread.
WORKERS = $(shell $(RUN) -c 'import xdist' 2>/dev/null && echo --numprocesses=auto --maxprocesses=8 --dist=loadfile)

.PHONY: help demo accuracy qat test test-everywhere setup lint format bench verify prove fuzz test-interrupted sweep-models gpu gpu-static gpu-ptx sanitize clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 18

demo: kernels-demo  ## quantize a real model to every format, check it, draw the table
	$(RUN) -m quantlib.examples.demo $(ARGS)

accuracy: kernels-accuracy  ## what every spec costs a language model and an encoder, beside peers: docs/accuracy.md
	$(RUN) -m quantlib eval smollm2 --peers --markdown docs/accuracy.md --png docs/accuracy.png $(ARGS)
	$(RUN) -m quantlib eval minilm --peers --markdown docs/accuracy.md $(ARGS)

qat: kernels-qat  ## train two small models to be int8 and int4, beside quantizing them after training
	$(RUN) -m quantlib.examples.qat $(ARGS)

test: kernels-test  ## every test
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(WORKERS) $(ARGS)

test-everywhere: kernels-test  ## the tests as on other machines: BLAS, instructions, locale, home, order, load, Python
	$(RUN) scripts/everywhere.py $(WORKERS) $(ARGS)

setup: kernels-test  ## the environment and the compiled kernels, as the tests need them

lint: .venv/ready-dev  ## formatters, ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: .venv/ready-dev  ## put Python and C++ in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: kernels-bench  ## time every op beside its peers
	$(RUN) -m benchmarks $(ARGS)

verify: kernels-test  ## all 2^32 inputs of every cast, and of int8 at the scales of the contract
	$(RUN) -m quantlib verify $(ARGS)

prove: kernels-test  ## the numeric contract proven for every input by an SMT solver; ARGS=--all, ARGS=--write
	$(RUN) -m quantlib.proof $(ARGS)

fuzz: kernels-test  ## minutes of random calls of every op, right and wrong: crashes, wrong bytes, unclear messages
	OMP_NUM_THREADS=1 $(RUN) -m quantlib.testing.fuzz --calls 40000 $(ARGS)

test-interrupted: kernels-test  ## a conversion stopped by every fault at every step: nothing is lost
	QUANTLIB_EVERY_FAULT=1 $(RUN) -m pytest -q tests/checkpoint/test_checkpoint_interrupted.py

fuzz-headers: kernels-test  ## 10^5 safetensors files with damaged headers: one clear error each, or they are read
	QUANTLIB_FUZZED_HEADERS=100000 OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/checkpoint/test_header_fuzzer.py

sweep-models: kernels-test  ## every architecture of transformers with every spec, into the table of docs/models.md
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) -m architectures docs/models.md

gpu:  ## on a machine with a GPU, offline too: build for it, every proof on it, then the benchmarks
	$(if $(PYTHON),$(PYTHON),python3) scripts/gpu_acceptance.py $(ARGS)

gpu-static: .venv/ready-test  ## on any machine: compile the GPU kernels, hold their machine code to its contracts
	PYTHONPATH=tests $(RUN) -m gpu_static $(ARGS)

gpu-ptx: kernels-test  ## on any machine: execute what Triton's compiler makes of the kernels, compare bytes
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(RUN) -m ptx $(ARGS)

# Python is not built with them, so their libraries have to be there before it; it also leaks on purpose.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
sanitize: export CXXFLAGS = $(SANITIZE)
sanitize: kernels-test  ## the tests over C++ that is built with ASan and UBSan, each op at every instruction set
	LD_PRELOAD="$(foreach so,libasan.so libubsan.so libstdc++.so.6,$(shell c++ -print-file-name=$(so)))" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(RUN) -m pytest --capture=sys -m 'not slow and not network' $(WORKERS) $(ARGS)

clean:  ## remove the environment and whatever was built in the checkout
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# An import compiles the CUDA kernels only where Triton does not serve; the tests and benchmarks are of both.
kernels-%: .venv/ready-%
	@$(RUN) quantlib/_build.py cpu $(if $(wildcard /dev/nvidia0),cuda)

.venv/ready-%: pyproject.toml scripts/environment.py
	$(ENVIRONMENT) $*
	@touch $@

.SECONDARY:  # what the two rules above make is kept
