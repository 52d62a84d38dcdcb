# make demo · make playground · make test · make test-all · make docs · make bench · make build · make wheel · make lint ·
# make format · make doctor · make clean
#
# Everything is installed into VENV on first use. A torch that is there already is kept:
#   make test VENV=~/envs/cuda            an existing environment, completed with what is missing
#   make test PYTHON=/opt/python VENV=    that interpreter as it is: nothing is installed
#
# The native library is built in place, and again after a change in csrc; setup.py says what is built where.

PYTHON ?= python3
VENV ?= .venv
# The version that is tested; on Linux the plain name would pull gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
ARGS ?=
# For its interpreter and its compiler; a torch with CUDA has brought its own, which is kept. There are wheels for Linux.
TRITON := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),triton)

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  READY :=
  TRAINERS :=
  RIVALS :=
  PLAYGROUND :=
  BROWSER :=
  PACKAGING :=
  EXPERIMENTS :=
  DOCS :=
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.fused_adaptive-ready
  TRAINERS := $(VENV)/.fused_adaptive-trainers
  RIVALS := $(VENV)/.fused_adaptive-rivals
  PLAYGROUND := $(VENV)/.fused_adaptive-playground
  BROWSER := $(VENV)/.fused_adaptive-browser
  PACKAGING := $(VENV)/.fused_adaptive-packaging
  EXPERIMENTS := $(VENV)/.fused_adaptive-experiments
  DOCS := $(VENV)/.fused_adaptive-docs
endif

# CUDA kernels take minutes to compile and run nowhere without a GPU: there, FUSED_ADAPTIVE_BUILD=auto asks for them.
FUSED_ADAPTIVE_BUILD ?= $(if $(wildcard /dev/nvidia0),auto,cpu)
CSRC := $(sort $(wildcard csrc/*.* csrc/*/*.*))
BUILT := build/.extension-built

.PHONY: demo playground test test-all docs bench build wheel lint format doctor clean

demo: $(BUILT)
	$(PY) -m bench.demo $(ARGS)

playground: $(BUILT) $(PLAYGROUND)
	$(PY) -m fused_adaptive.playground $(ARGS)

$(VENV)/.fused_adaptive-playground: $(READY)
	$(PY) -m pip install -c constraints.txt gradio plotly
	touch $@

# The playground's tests drive a system's Chromium; without one they are skipped.
$(VENV)/.fused_adaptive-browser: $(PLAYGROUND)
	$(PY) -m pip install -c constraints.txt playwright
	touch $@

# Steps against those of other packages, which are installed without what they need: torch and numpy are here.
bench: $(BUILT) $(RIVALS)
	$(PY) -m bench.step.run $(ARGS)

$(VENV)/.fused_adaptive-rivals: $(READY)
	$(PY) -m pip install --no-deps -c constraints.txt torch-optimi pytorch_optimizer
	$(if $(wildcard /dev/nvidia0),-$(PY) -m pip install --no-deps bitsandbytes flashoptim)
	touch $@

PYTEST = $(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && echo '-n auto')

test: $(BUILT)
	$(PYTEST) -m 'not heavy' $(ARGS)

test-all: $(BUILT) $(TRAINERS) $(RIVALS) $(EXPERIMENTS) $(PLAYGROUND) $(BROWSER) $(PACKAGING) $(DOCS)
	$(PYTEST) $(ARGS)

# The site, in build/site: without a network, and with warnings as errors.
docs: $(READY) $(DOCS)
	$(PY) -m mkdocs build --strict $(ARGS)

$(VENV)/.fused_adaptive-docs: $(READY)
	$(PY) -m pip install -c constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	touch $@

build: $(READY)
	rm -f $(BUILT)
	$(MAKE) $(BUILT)

$(BUILT): setup.py $(CSRC) $(READY)
	FUSED_ADAPTIVE_BUILD=$(FUSED_ADAPTIVE_BUILD) $(PY) setup.py build_ext --inplace
	mkdir -p $(@D) && touch $@

# An sdist, and a wheel for every Linux with this machine's glibc or a newer one; with CUDA kernels where nvcc is. torch's
# libraries are left to the torch that is installed where the wheel is. auditwheel looks for patchelf in PATH.
wheel: FUSED_ADAPTIVE_BUILD = auto
wheel: $(READY) $(PACKAGING)
	rm -rf dist build/wheel
	FUSED_ADAPTIVE_BUILD=$(FUSED_ADAPTIVE_BUILD) FUSED_ADAPTIVE_REQUIRE_EXT=cpu \
	  $(PY) -m build --no-isolation --outdir build/wheel
	PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" \
	  $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(PY) -m twine check --strict dist/*

$(VENV)/.fused_adaptive-packaging: $(READY)
	$(PY) -m pip install -c constraints.txt auditwheel build patchelf twine
	touch $@

CLANG_FORMAT = $(PY) -c 'from clang_format import clang_format; clang_format()'

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CSRC),$(CLANG_FORMAT) --dry-run -Werror $(CSRC))
	$(PY) -m pyright --pythonpath $$($(PY) -c 'import sys; print(sys.executable)')

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CSRC),$(CLANG_FORMAT) -i $(CSRC))

doctor: $(BUILT)
	$(PY) -m fused_adaptive

$(VENV)/.fused_adaptive-ready: pyproject.toml setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install '$(TORCH)'
	$(PY) -m pip install -c constraints.txt setuptools wheel ninja numpy hypothesis pytest pytest-xdist ruff pyright clang-format matplotlib mlxtend rich
	$(if $(TRITON),$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install -c constraints.txt $(TRITON))
	FUSED_ADAPTIVE_BUILD=none $(PY) -m pip install --no-deps --no-build-isolation -e .
	touch $@

# Hugging Face's Trainer, Accelerate and Lightning, which only some tests need: half a minute. torch stays as it is.
$(VENV)/.fused_adaptive-trainers: $(READY)
	$(PY) -m pip install -c constraints.txt accelerate lightning scikit-learn transformers
	touch $@

# The experiments' data, and the optimizers that they compare with, which are installed without what they need: torch.
$(VENV)/.fused_adaptive-experiments: $(READY)
	$(PY) -m pip install -c constraints.txt gensim scikit-learn tokenizers
	$(PY) -m pip install --no-deps -c constraints.txt dadaptation prodigyopt schedulefree
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis fused_adaptive/*.so fused_adaptive/_build.json
