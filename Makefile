# Two targets matter: `make demo` (the main job, small, on a CPU) and `make test` (everything CI runs).

PYTHON ?= python3.11
VENV ?= .venv
DEMO ?= demo
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CPP = $(foreach suffix,c cpp h cu cuh,$(wildcard plugins/*/*.$(suffix) tests/*/*.$(suffix) tests/*/*/*.$(suffix)))
SOURCES = pyproject.toml CMakeLists.txt constraints.txt $(wildcard exporter/* exporter/*/* runtime/* plugins/* plugins/*/* recipes/*)

.PHONY: demo test test-gpu check format kernels cuda sanitize faults fuzz clean

demo: $(VENV)/.cpu
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/glm-export make-checkpoint --recipe tiny -o $(DEMO)/checkpoint
	$(BIN)/glm-export build $(DEMO)/checkpoint --recipe tiny --precision fp8 -o $(DEMO)/bundle
	$(BIN)/glm-export validate $(DEMO)/bundle
	$(BIN)/glm-export run $(DEMO)/bundle --prompt "Hello" --max-new-tokens 16

test: check
	$(BIN)/python -m pytest -n auto --dist loadfile

# On the GPU of this machine: CUDA kernels, then the sessions with the TensorRT libraries that are installed.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/plugins -k cuda_gpu
	$(BIN)/python -m pytest tests/runtime tests/exporter/test_against.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# For work in the source tree; installing builds them by itself.
kernels:
	cmake -S . -B build/kernels -DCMAKE_BUILD_TYPE=Release
	cmake --build build/kernels --parallel

# The same with a record of what every CUDA kernel takes on every architecture.
cuda:
	rm -rf build/cuda
	cmake -S . -B build/cuda -DCMAKE_BUILD_TYPE=Release -DGLM_CUDA=ON -DGLM_CUDA_REPORT=ON
	cmake --build build/cuda --target glm_cuda >build/cuda/ptxas.txt 2>&1 || { cat build/cuda/ptxas.txt; false; }
	$(PYTHON) bench/cuda_resources.py build/cuda/ptxas.txt >bench/CUDA_RESOURCES.md

# The tests of the CPU kernels, with sanitizers that see every wrong address; a few minutes.
sanitize: $(VENV)/.dev
	$(BIN)/python tests/sanitize.py

# Breaks builds in every way and writes docs/faults.md; a few minutes.
faults: $(VENV)/.dev
	$(BIN)/python tests/faults/run.py --write docs/faults.md

# A million executions take some minutes; an input that fails is kept where Python keeps temporary files.
fuzz: $(VENV)/.fuzz
	$(BIN)/python tests/fuzz/fuzz_checkpoint.py -runs=1000000
	$(BIN)/python tests/fuzz/fuzz_manifest.py -runs=200000

clean:
	rm -rf $(VENV) $(DEMO) build dist plugins/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cpu: $(BIN)/python $(SOURCES)
	$(PIP) ".[cpu]"
	touch $@

$(VENV)/.fuzz: $(BIN)/python $(SOURCES)
	$(PIP) ".[cpu,fuzz]"
	touch $@ $(VENV)/.cpu

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	$(PIP) ".[cpu,dev]"
	touch $@ $(VENV)/.cpu
