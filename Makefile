# Needs Python 3.11 or newer, pip, git and make; everything else goes into VENV.
PYTHON ?= python3
# Python puts no packages in a folder with a colon.
VENV := $(if $(findstring :,$(CURDIR)),$(HOME)/.cache/fedmoe_jax/venv-$(shell \
  pwd | cksum | cut -d' ' -f1),.venv)

# What VENV already holds stays in use; otherwise cuda12 where a GPU answers.
INSTALLED := $(patsubst $(VENV)/installed-%,%,$(wildcard $(VENV)/installed-*))
DEVICE ?= $(or $(INSTALLED),$(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda12 || echo cpu))

REQUIREMENTS_cpu := requirements-cpu.txt
REQUIREMENTS_cuda12 := requirements.txt
REQUIREMENTS_tpu := requirements-tpu.txt
REQUIREMENTS = $(or $(REQUIREMENTS_$(DEVICE)),$(error DEVICE=$(DEVICE): it is cpu, cuda12 or tpu))

RUN := $(VENV)/bin/python
STAMP = $(VENV)/installed-$(DEVICE)
RECENT = $(shell { $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))'; } 2>/dev/null)

PYTEST = JAX_PLATFORMS=cpu $(RUN) -m pytest -n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test check lint format clean

help: ## list the targets (the default)
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile
	@echo "DEVICE=cpu, cuda12 or tpu chooses the packages, PYTHON=... the interpreter."

setup: $(STAMP) ## install the packages; the other targets do this by themselves

demo: $(STAMP) ## compare strategies on the digits, offline; a second call resumes
	@$(if $(filter cpu,$(DEVICE)),JAX_PLATFORMS=cpu )$(RUN) launch.py \
	  --config=configs/compare.py:digits --workdir=runs/digits

test: $(STAMP) ## run all tests, on the CPU
	@$(PYTEST)

check: lint ## check style and types, then run the tests that are not slow
	@$(PYTEST) -m "not slow"

lint: $(STAMP) ## check style, formatting and types
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	@$(RUN) -m basedpyright --pythonpath $(RUN)

format: $(STAMP) ## mend style and formatting
	@$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

clean: ## remove the packages and the caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp comes last and --clear comes first, so a broken-off install starts anew.
# Where Debian leaves out ensurepip, the interpreter's own pip (22.3 or newer) installs
# pip into VENV.
$(STAMP): requirements.txt requirements-cpu.txt requirements-tpu.txt
	@$(if $(filter True,$(RECENT)),,$(error fedmoe_jax needs Python 3.11 or newer, and \
	  $(PYTHON) is not; name one, as in: make PYTHON=python3.12))
	@$(if $(shell test -L '$(VENV)' && echo link),$(error $(VENV) is a link, and \
	  installing would empty the folder behind it; delete the link, or touch $@ if the \
	  packages are there))
	@echo "Installing $(REQUIREMENTS) into $(VENV) (about a minute on a good line) ..."
	@$(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(RUN) install -q pip; }
	@$(RUN) -m pip install -q -r $(REQUIREMENTS) >$(VENV)/pip.log 2>&1 || \
	  { tail -n 20 $(VENV)/pip.log >&2; exit 1; }
	@touch $@
