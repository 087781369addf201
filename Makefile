# Every target is one visible command, or a few. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
ARCH   ?= 80-real;90-real;100
BIN    := $(VENV)/bin

.PHONY: help build
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

build:  ## compile into the source tree (fast rebuilds); then PYTHONPATH=python sees it
	cmake -S . -B build/dev -G Ninja -DCMAKE_CUDA_ARCHITECTURES="$(ARCH)" -DPython_EXECUTABLE=$$(which python)
	cmake --build build/dev
	cmake --install build/dev --prefix python/kvcompress --component python
