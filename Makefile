# Everything happens in .venv; PYTHON picks the interpreter it is made with: make PYTHON=python3.12 test
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
LOG := .venv/install.log

.PHONY: help quickstart test check clean

help:
	@echo "make quickstart   raw text -> tokenizer, shards, BERT, Hugging Face folder, classifier"
	@echo "make test         run the tests"
	@echo "make check        ruff and mypy"
	@echo "make clean        remove .venv and what the tools left; runs/ stays"

quickstart: $(INSTALLED)
	@$(BIN)/bertscale quickstart

test: $(INSTALLED)
	@$(BIN)/python -m pytest

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./runs/*" -prune -exec rm -rf {} +

# The log keeps all that pip says; the screen gets the large downloads and the steps that take long.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "bertscale needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1 || true):" \
	         "name another one, such as make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing into .venv (a few minutes, once; everything pip says is in $(LOG))"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -c constraints.txt -e ".[dev]" 2>&1 | tee $(LOG) | awk ' \
	    /Downloading .*([0-9][0-9]\.[0-9] MB|GB)\)|Building wheel for .*started/ { sub(/^ +/, ""); print "  " $$0; fflush() } \
	    /^Installing collected packages/ { print "  Installing " NF - 3 " packages"; fflush() } \
	    /^(ERROR|error)/ { print; fflush() }' \
	    || { echo "the installation failed; the last lines of $(LOG):" >&2; tail -n 20 $(LOG) >&2; exit 1; }
	@touch $@
