# make demo · make test · make test-all · make lint · make format · make doctor · make clean
#
# Everything is installed into VENV on first use. A torch that is there already is kept:
#   make test VENV=~/envs/cuda            an existing environment, completed with what is missing
#   make test PYTHON=/opt/python VENV=    that interpreter as it is: nothing is installed

PYTHON ?= python3
VENV ?= .venv
# The version that is tested; on Linux the plain name would pull gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
ARGS ?=

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  READY :=
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.fused_adaptive-ready
endif

.PHONY: demo test test-all lint format doctor clean

demo: $(READY)
	$(PY) -m bench.demo $(ARGS)

test: $(READY)
	$(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && echo '-n auto') $(ARGS)

# Heavy integrations join here; so far there are none.
test-all: test

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $$($(PY) -c 'import sys; print(sys.executable)')

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

doctor: $(READY)
	$(PY) -m fused_adaptive

$(VENV)/.fused_adaptive-ready: pyproject.toml setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install '$(TORCH)'
	$(PY) -m pip install -c constraints.txt setuptools wheel ninja numpy hypothesis pytest pytest-xdist ruff pyright matplotlib mlxtend rich
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
