# Everything happens in .venv; PYTHON picks the interpreter it is made with: make PYTHON=python3.12 test
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
LOG := .venv/install.log

# Without bytecode each start of a rank compiles torch anew, which takes six seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test slurm check clean

help:
	@echo "make quickstart   raw text -> tokenizer, shards, BERT, Hugging Face folder, classifier"
	@echo "make test         run the tests"
	@echo "make slurm        install Slurm for the tests on a virtual cluster; make test does it, where it may"
	@echo "make check        ruff, mypy, shellcheck, and the width of the documentation"
	@echo "make clean        remove .venv and what the tools left; runs/ stays"

quickstart: $(INSTALLED)
	@$(BIN)/bertscale quickstart

# Three workers for two cores: two of them mostly wait for clusters, the third computes (tests/conftest.py).
test: $(INSTALLED) slurm
	@$(BIN)/python -m pytest --numprocesses 3

# Debian and Ubuntu, as root or with a sudo that asks nothing; elsewhere those tests are skipped.
SLURM := apt-get install -y --no-install-recommends slurm-wlm munge
slurm:
	@export PATH="$$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive; \
	missing() { for program in slurmctld slurmd munged srun ip; do command -v $$program >/dev/null || return 0; done; return 1; }; \
	missing || exit 0; \
	sudo=; test "$$(id -u)" = 0 || sudo="sudo -n -E"; \
	if command -v apt-get >/dev/null && $$sudo true 2>/dev/null; then \
	    echo "installing Slurm for the tests on a virtual cluster: $(SLURM) iproute2"; \
	    if said=$$($$sudo apt-get update 2>&1 && $$sudo $(SLURM) iproute2 2>&1); then exit 0; fi; \
	    echo "$$said" | tail -n 3 >&2; \
	fi; \
	echo "the tests on a virtual Slurm cluster will be skipped; they need: $(SLURM) iproute2" >&2

# Tables may be wider; all other text is as wide as the code.
PROSE := $(wildcard *.md docs/*.md slurm/*.md)
check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@if LC_ALL=C.UTF-8 grep -nE '^[^|].{110,}' $(PROSE); then echo "longer than 110 characters" >&2; exit 1; fi
	@$(BIN)/shellcheck .ci/run tests/golden/*.sbatch slurm/*.sbatch slurm/cluster/*.sh slurm/cluster/vc

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./runs/*" -prune -exec rm -rf {} +

# Compiling every module of every package takes longer than the rest: Python compiles those that are imported.
# The log keeps all that pip says; the screen gets the large downloads and the steps that take long.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "bertscale needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1 || true):" \
	         "name another one, such as make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing into .venv (a few minutes, once; everything pip says is in $(LOG))"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile \
	    -c constraints.txt -e ".[dev,chinese]" 2>&1 | tee $(LOG) | awk ' \
	    /Downloading .*([0-9][0-9]\.[0-9] MB|GB)\)|Building wheel for .*started/ { sub(/^ +/, ""); print "  " $$0; fflush() } \
	    /^Installing collected packages/ { print "  Installing " NF - 3 " packages"; fflush() } \
	    /^(ERROR|error)/ { print; fflush() }' \
	    || { echo "the installation failed; the last lines of $(LOG):" >&2; tail -n 20 $(LOG) >&2; exit 1; }
	@touch $@
