# `make demo` and `make test` set up everything themselves: .venv, PyTorch, the build. The second run is quick.
#
#   TORCH=torch==2.13.0   which PyTorch, as pip takes it, options too: TORCH='torch --index-url <an index of CPU wheels>'.
#                         By default the newest, which on PyPI brings CUDA along (gigabytes), GPU or not.
#   PY=python3            an environment of your own, used as it is: nothing is installed, only built
#   PYTHON=python3.12     the Python that .venv is made of
#   ARGS=...              passed on to what runs (demo, pytest, bench, ...)
#   MNNVL_AR_ARCHS=90a    and the other variables at the top of setup.py

PYTHON ?= python3
TORCH ?= torch>=2.10
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
GPU := $(wildcard /dev/nvidiactl /dev/nvidia0 /dev/nvgpu)

ifeq ($(origin PY),undefined)
PY := .venv/bin/python
READY := .venv/.installed
READY_DEV := .venv/.dev
READY_BENCH := .venv/.bench
READY_RELEASE := .venv/.release
READY_SITE := .venv/.site
endif
PIP := $(PY) -m pip --disable-pip-version-check --quiet

.PHONY: demo test gpu-test record-check model lint format build test-build bare-build bench bench-report tune faults contracts servers site wheel nightly dsl clean

demo: build
	$(PY) -m mnnvl_ar demo $(ARGS)

test: build test-build
	$(PY) -m pytest $(ARGS)

gpu-test: build test-build bare-build
	$(PY) -m tools.gpu_campaign $(ARGS)

record-check:
	@$(PYTHON) -m tools.gpu_record --check

model: model/check.py
	$(PYTHON) model/check.py $(ARGS)

faults: build test-build
	$(PY) -m tools.faults.run $(ARGS)

# Over the network, some 150 MB. ARGS=--accept writes what moved to the committed JSON.
contracts: $(READY)
	$(PY) -m tools.contracts renew $(ARGS)

# Of an environment that has vLLM or SGLang, and this library installed: PY=python3 (docs/servers.md).
servers: $(READY)
	PYTHONPATH="$${PYTHONPATH:+$$PYTHONPATH:}tests" $(PY) -m servers $(ARGS)

bench: build
	$(PY) bench/run.py $(ARGS)

bench-report: $(READY_BENCH)
	$(PY) bench/report.py $(ARGS)

tune: build
	$(PY) bench/tune.py $(ARGS)

# build/site, to be opened in a browser. A warning is an error: a broken link, a name without an API page.
site: $(READY_SITE) build
	$(PY) -m sphinx -W --keep-going -n -q -c docs . build/site $(ARGS)

# dist: the sdist, a wheel for x86-64 and one for aarch64, cross-built. ARGS='x86_64 --twice' and others: tools/wheels.py
wheel: $(READY_RELEASE)
	$(PY) -m tools.wheels $(ARGS)

# Hours, and gigabytes over the network: what is too long for each commit.
nightly: $(READY_RELEASE) build test-build
	$(PY) -m tools.wheels --twice
	@failed=0; \
	tests/versions.sh || failed=1; \
	PY=$(PY) tests/qemu.sh || failed=1; \
	$(PY) -m pytest -m exhaustive || failed=1; \
	$(PY) -m tools.faults.run --deadline 2 --faults 1100 --seed "$$(date +%Y%m%d)" || failed=1; \
	exit $$failed

# ---- building: ninja decides what is out of date

build: $(READY)
	$(PY) setup.py --quiet build_ext --inplace

# A test build's CUDA half is of use only where there is a GPU.
test-build: $(READY)
	$(PY) setup.py --quiet build_protocol
	MNNVL_AR_TEST_BUILD=1 MNNVL_AR_CUDA=$(if $(GPU),"$${MNNVL_AR_CUDA-}",0) $(PY) setup.py --quiet build_ext --inplace

# For tools/safety_cost.py.
bare-build: $(READY)
	MNNVL_AR_BARE=1 $(PY) setup.py --quiet build_ext --inplace

# The twin's kernels, for GPUs elsewhere (docs/twin.md). Over the network, 260 MB, once.
DSL := build/dsl-venv/bin/python
DSL_VERSION = $(shell sed -n 's/^DSL = "\([^"]*\)".*/\1/p' mnnvl_ar/dsl/constants.py)

dsl: build/dsl-venv/.installed
	$(DSL) mnnvl_ar/dsl/build.py $(ARGS)
	PYTHONPATH=tests $(DSL) mnnvl_ar/dsl/build.py --epilogue common.relu_squared:relu_squared --ranks 2 $(ARGS)
	$(DSL) tests/common/wrong_twins.py > /dev/null

build/dsl-venv/.installed: mnnvl_ar/dsl/constants.py
	@mkdir -p build
	@flock build/dsl-venv.lock sh -ec '$(PYTHON) -m venv --clear build/dsl-venv; \
	  $(DSL) -m pip --disable-pip-version-check --quiet install "nvidia-cutlass-dsl==$(DSL_VERSION)"; touch $@'

# ---- style

CPP = $$(find csrc tests tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
TOOLS = $(PY) -m
CLANG_FORMAT = $(if $(READY_DEV),.venv/bin/)clang-format

lint: $(READY_DEV)
	@failed=0; \
	$(TOOLS) ruff check || failed=1; \
	$(TOOLS) ruff format --check || failed=1; \
	$(TOOLS) mypy || failed=1; \
	$(CLANG_FORMAT) --dry-run -Werror $(CPP) || failed=1; \
	exit $$failed

format: $(READY_DEV)
	$(TOOLS) ruff check --fix
	$(TOOLS) ruff format
	$(CLANG_FORMAT) -i $(CPP)

# ---- setting up .venv; each stamp stands for one step

.venv/bin/python:
	@command -v $(PYTHON) > /dev/null || { echo "mnnvl_ar: no $(PYTHON): install Python 3.10 or later, or say PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "mnnvl_ar: $$($(PYTHON) --version) is too old: 3.10 or later is needed; say PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null \
	  || { echo "mnnvl_ar: this Python cannot make a venv: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

# Holds the value of TORCH; newer than what depends on it only when that has changed.
.venv/.torch-wanted: .venv/bin/python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

.venv/.torch: .venv/.torch-wanted
	$(PIP) install $(foreach word,$(TORCH),'$(word)')
	@touch $@

# What is installed after PyTorch must go with it: a package that wants another one is pip's error, not a silent change.
PIP_INSTALL = $(PIP) install -c .venv/.constraint

.venv/.constraint: .venv/.torch
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

.venv/.installed: .venv/.constraint pyproject.toml
	$(PIP_INSTALL) 'setuptools>=77' ninja
ifneq ($(GPU),)
	$(PY) setup.py --quiet find_nvcc > /dev/null 2>&1 || $(PIP_INSTALL) 'cuda-toolkit[nvcc,cccl,cudart]==13.*'
endif
	@$(PY) -c 'import torch' || { echo "mnnvl_ar: this PyTorch cannot be imported; choose another by TORCH="; exit 1; }
	$(PY) setup.py --quiet build_ext --inplace
	$(PIP_INSTALL) --no-build-isolation -e '.[test]'
	@touch $@

.venv/.dev: .venv/.installed
	$(PIP_INSTALL) --no-build-isolation -e '.[test,dev]'
	@touch $@

.venv/.bench: .venv/.installed
	$(PIP_INSTALL) --no-build-isolation -e '.[test,bench]'
	@touch $@

.venv/.release: .venv/.installed
	$(PIP_INSTALL) --no-build-isolation -e '.[test,release]'
	@touch $@

.venv/.site: .venv/.installed
	$(PIP_INSTALL) --no-build-isolation -e '.[test,docs]'
	@touch $@

.PHONY: FORCE
FORCE:

clean:
	rm -rf build dist *.egg-info mnnvl_ar/_C.so tests/_C_*.so tests/_protocol*.so
	rm -f .venv/.torch .venv/.torch-wanted .venv/.constraint .venv/.installed .venv/.dev .venv/.bench .venv/.release .venv/.site
