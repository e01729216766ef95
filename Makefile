PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test lint format plugins clean

help:
	@echo "make setup   a virtual environment with everything the CPU side needs"
	@echo "make demo    export, verify, evaluate and benchmark the shipped digits model"
	@echo "make test    all tests"
	@echo "make lint    ruff and mypy"
	@echo "make plugins TensorRT plugin libraries, into build/plugins; needs nvcc, cmake and TensorRT's headers:"
	@echo "             TENSORRT8_ROOT=... TENSORRT10_ROOT=... make plugins (one of them is enough)"
	@echo "             PLUGIN_ARCHS=87-real for other GPUs than those of desktops (plugins/CMakePresets.json)"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/edgeprune demo -o out/demo --overwrite

# one process per core, each with one thread; PYTEST_ARGS='-n 0 -k name' for a single test
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# mypy sees export/ where an installed package has it: as edgeprune.export
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .stage && mkdir .stage && cp -r edgeprune .stage/edgeprune && cp -r export .stage/edgeprune/export
	cd .stage && $(abspath $(BIN))/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p edgeprune
	rm -rf .stage

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plugins:
	cmake -S plugins --preset desktop -B build/plugins $(if $(PLUGIN_ARCHS),-DCMAKE_CUDA_ARCHITECTURES="$(PLUGIN_ARCHS)")
	cmake --build build/plugins --parallel

clean:
	rm -rf $(VENV) .stage build dist out *.egg-info
