# Every target installs what it needs into .venv first; a second time there is nothing to do.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint bench
.DEFAULT_GOAL := help

help:  ## Say what there is
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/'

demo: $(INSTALLED)  ## Find flipped labels among real digits; writes demo-output/report.html
	$(VENV)/bin/tracin demo

test: $(INSTALLED)  ## Run the whole test suite
	$(VENV)/bin/pytest -n 2 --dist loadfile

lint: $(INSTALLED)  ## Check lint, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(INSTALLED)  ## Compare scoring with bare limits: make bench DATA=dir WORK=dir
	$(VENV)/bin/python benchmarks/influence.py $(DATA) $(WORK)

$(INSTALLED): pyproject.toml setup.py
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python '>=3.11,<3.13' $(VENV) && \
	  uv pip install --quiet --python $(VENV)/bin/python -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install --quiet -e '.[dev]'; \
	fi
	@touch $@
