# Two commands: `make` runs the pipeline to the end, `make test` passes all checks and tests.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: all plan docs marked test check paper report rerender reference clean

# Where `rerender` takes results from.
RESULTS ?= docs/reference

all: plan
	snakemake --cores all --resources gpu=1

# The tables although some configurations fail: their rows are marked as missing, with the reason.
marked: .venv/run
	-snakemake --cores all --resources gpu=1 --keep-going
	snakemake --cores all --resources gpu=1 --config missing=mark

# What is stale, why, and for how long it will run.
plan: .venv/run
	dynatree plan

# Everything that a change must pass, quickest first.
# A file's tests stay in one process, because they share what is costly to make.
test: check
	pytest -n logical --maxprocesses 4 --dist loadfile

check: .venv/test
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile rules
	snakemake --lint

paper: .venv/run
	snakemake --cores all --resources gpu=1 -- rendered paper/main.pdf

# A page with the figures, tables, rules and run times of what `make paper` made.
report: paper
	snakemake --cores all --report results/report.html -- rendered paper/main.pdf

# Pages about the modules, from their docstrings.
docs: .venv/test
	python scripts/build_docs.py --out docs/api

# Tables, figures, report and PDF from results that were measured elsewhere; measures nothing.
rerender: .venv/run
	scripts/rerender.sh $(RESULTS)

# Keeps the present results as the ones that the README shows.
reference: paper
	scripts/keep_reference.sh docs/reference

clean:
	rm -rf .snakemake results

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
