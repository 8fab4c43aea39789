# `make demo` needs nothing but Python 3.11 and make; `make demo PYTHON=python3.12` takes another one
PYTHON ?= python3
BIN := .venv/bin
SRC := nbs tests demo.py recipes/_nbdev.py
export MPLBACKEND = Agg
export NO_ALBUMENTATIONS_UPDATE = 1

.NOTPARALLEL:
.PHONY: demo test test-all bench docs clean notebooks style pytest pytest-all

demo: .venv/.demo
	PYTHONWARNINGS=ignore $(BIN)/python demo.py

test: notebooks style pytest

test-all: notebooks style pytest-all

bench: .venv/.dev
	$(BIN)/python tests/benchmarks/run.py $(DATA)

docs: .venv/.docs
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONWARNINGS=ignore $(BIN)/python nbs/_docs.py

# `.venv/` and `runs/` stay
clean:
	rm -rf .cache _proc _docs build demo *.egg-info bench.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What `test` is made of; nothing is written into the home folder, nothing stays in the temporary one
SHELL := bash
cache := $(CURDIR)/.cache
alone := tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && TMPDIR="$$tmp" PYTHONWARNINGS=ignore XDG_CACHE_HOME="$(cache)" MPLCONFIGDIR="$(cache)" FASTAI_HOME="$(cache)/fastai" IPYTHONDIR="$(cache)/ipython"

notebooks: .venv/.dev
	$(alone) OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2

style: .venv/.dev
	$(BIN)/chkstyle $(SRC)

pytest: .venv/.dev
	$(alone) $(BIN)/python -m pytest -q tests

pytest-all: .venv/.dev
	$(alone) $(BIN)/python -m pytest -q -m '' tests

# One virtual environment; installed again only when what is required has changed
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: extra =
.venv/.dev: extra = [dev]
.venv/.docs: extra = [dev,docs]
.venv/.demo .venv/.dev .venv/.docs: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".$(extra)"
	touch $@
