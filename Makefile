# Every target is one visible command, or a few. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
# A torch that VENV already has is kept. On machines with a GPU, name the build that fits the driver.
TORCH  ?= torch==2.13.0
# Here the architecture of this machine's GPU, or one where there is none; `pip install .` takes all of them.
ARCH   ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . | sed 's/$$/-real/'),90-real)
JOBS   ?= 2

export PATH := $(abspath $(VENV))/bin:$(PATH)
SOURCES  := CMakeLists.txt $(shell find csrc third_party -type f)
CXX_FILES = $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: help setup build fmt lint readme test test-gpu bench board bench-cpp sanitize demo clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## a virtual environment with torch, the package (editable) and all tools

$(VENV)/.ready: pyproject.toml $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -c 'import torch' 2>/dev/null || pip install "$(TORCH)"
	pip install "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.25" ninja
	pip install --no-build-isolation --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$(ARCH)" -e '.[dev]'
	touch $@

build:  ## compile into the source tree (fast rebuilds); then PYTHONPATH=python sees it
	cmake -S . -B build/dev -G Ninja -DCMAKE_CUDA_ARCHITECTURES="$(ARCH)" -DPython_EXECUTABLE=$$(which python)
	cmake --build build/dev
	cmake --install build/dev --prefix python/kvcompress --component python

fmt:  ## rewrite all files in the one format
	ruff check --fix --quiet .
	ruff format .
	clang-format -i $(CXX_FILES)

lint:  ## formats, rules and types, changing nothing
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)
	mypy

readme: setup  ## write the registry's methods and the measured figures into the README's tables
	python -m kvcompress methods --markdown > build/methods.md
	sed -i -e '/<!-- methods:/,/<!-- \/methods/{//!d}' -e '/<!-- methods:/r build/methods.md' README.md
	python -m bench.report --readme README.md

test: setup  ## everything that needs no GPU
	OMP_WAIT_POLICY=passive python -m pytest -n $(JOBS)  # workers share the cores: idle threads must not spin

test-gpu: setup  ## everything; fails where there is no GPU
	KVCOMPRESS_REQUIRE_CUDA=1 OMP_NUM_THREADS=2 python -m pytest -n $(JOBS) -k "not 64_bit and not long"
	KVCOMPRESS_REQUIRE_CUDA=1 python -m pytest -k "64_bit or long"  # tens of GiB each: one after the other

bench: setup  ## the core ops against torch and the floor, into bench/results/<device>_core.json
	python bench/run.py --core --save

board: setup  ## every method's quality on kvc-mini, into bench/results/quality_kvc_mini.json
	python bench/quality.py

bench-cpp: setup  ## C++ microbenchmarks of the torch-free core (needs Google Benchmark)
	cmake -S . -B build/bench -G Ninja -DKVC_BENCH=ON -DKVC_PYTHON=OFF -DCMAKE_CUDA_ARCHITECTURES="$(ARCH)" -DPython_EXECUTABLE=$$(which python)
	cmake --build build/bench --target kvcompress_bench
	build/bench/bench/cpp/kvcompress_bench

sanitize: setup  ## compute-sanitizer, all four tools, over the GPU tests of the ops
	python -m tests.sanitize

demo: setup  ## a 4k-token document, answered with the full cache and with a tenth of it
	kvcompress demo

clean:  ## remove builds, caches and the virtual environment
	rm -rf build dist .venv .cache .pytest_cache .hypothesis .mypy_cache .ruff_cache python/kvcompress/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
