# Commands for contributors. CONTRIBUTING.md explains them. Use the Python of the active environment.
PYTHON ?= python

.PHONY: help setup build quick test emulated sanitizer integration examples device-code all style docs release

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup:        ## install the package in editable mode, with everything for tests, style and docs
	$(PYTHON) -m pip install -r tools/requirements-dev.txt
	SGL_OPS_CUDA=0 SGL_OPS_BUILD=1 $(PYTHON) -m pip install --no-build-isolation -e ".[test,docs,device-code]"

build:        ## compile the extension again after a change in csrc/; unchanged files are not compiled
	SGL_OPS_CUDA=0 SGL_OPS_BUILD=1 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .

quick: build  ## kernels, values, losses: the tests for every change
	$(PYTHON) -m pytest -q -n 0 -m quick

test:         ## what the README runs: everything except the long tiers
	$(PYTHON) -m pytest

emulated:     ## the CUDA kernels on the CPU, thread by thread
	$(PYTHON) -m pytest -m emulated

sanitizer:    ## the same under AddressSanitizer and ThreadSanitizer, and with seeded faults
	$(PYTHON) -m pytest -m sanitizer

integration:  ## compiled, exported and traced losses, several processes, benchmarks
	$(PYTHON) -m pytest -m integration

examples:     ## the long tests of the examples
	$(PYTHON) -m pytest -m examples

device-code:  ## the machine code of the CUDA kernels, interpreted; needs nvcc
	$(PYTHON) -m pytest -m device_code

all: test emulated sanitizer integration examples device-code  ## every tier

style:        ## formatting, lint, types
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu*' 'tests/cuda_on_cpu/*.h' 'tests/cuda_on_cpu/*.cpp' 'tests/device_code/*.h' 'tests/device_code/*.cpp')
	mypy

docs:         ## the documentation site, in docs/_build/html
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html

release:      ## build and check a wheel and a source distribution
	$(PYTHON) tools/release.py --quick
