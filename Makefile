# Two commands for a newcomer: `make demo` and `make test`. The rest is for people who work on the project.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install dev demo test soak check bench-train bench-serve format clean

help:           ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

install: $(VENV)/.installed   ## Create .venv and install the product

dev: $(VENV)/.dev             ## The same with what tests and checks need

demo: $(VENV)/.installed      ## Run the main job end to end and leave the server running
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev            ## All tests but the soaks, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(VENV)/.dev            ## The long tests
	$(BIN)/python -m pytest -m soak

bench-train: $(VENV)/.installed  ## Our trainer beside its peers; ARGS="--quick" for less
	$(BIN)/python benchmarks/bench_train.py $(ARGS)

bench-serve: $(VENV)/.installed  ## Our engine beside its peers; ARGS="--quick" for less
	$(BIN)/python benchmarks/bench_serve.py $(ARGS)

check: $(VENV)/.dev           ## Lint, format, types and import rules; under a minute
	@$(BIN)/pyright & types=$$!; \
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports; others=$$?; \
	wait $$types && exit $$others

format: $(VENV)/.dev          ## Let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:          ## Remove the environments
	rm -rf $(VENV) .venvs
