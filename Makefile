# `make help` lists everything. Options: PYTHON, STAGE, EXPERIMENT, ARGS.
PYTHON ?= python3
EXPERIMENT ?= imagenet
CDM := .venv/bin/cdm
# Threads that wait without spinning: many times faster where two processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint train-stage

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## Make .venv with everything that is needed

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

train-stage: setup ## Train one stage: make train-stage STAGE=sr64 [EXPERIMENT=imagenet] [ARGS="--trainer.devices 8"]
	$(CDM) fit --config experiments/defaults.yaml --config experiments/$(EXPERIMENT)/defaults.yaml --config experiments/$(EXPERIMENT)/$(STAGE).yaml $(ARGS)

test: setup ## Run every test
	.venv/bin/pytest

lint: setup ## Check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
