# `make test` and `make demo` set up .venv first, whatever the machine; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPARE := $(VENV)/.compare

.DEFAULT_GOAL := help
.PHONY: help setup setup-compare gl demo test test-fast lint format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1#\2/p' Makefile | awk -F'#' '{printf "  %-19s %s\n", $$1, $$2}'
	@echo "  PYTHON=python3.12 make setup chooses the interpreter; PIP_INDEX_URL and pip's other variables are obeyed."
	@echo "  Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup spares 5 GB of CUDA."

setup: $(READY) ## .venv with the tested versions, all extras and the LIBERO simulator

$(READY): pyproject.toml constraints.txt
	@bash scripts/setup.sh "$(PYTHON)" $(VENV) && touch $(READY)

setup-compare: $(COMPARE) ## TensorFlow, too, for the tests that compare with it (1.6 GB more)

$(COMPARE): $(READY)
	@bash scripts/setup.sh "$(PYTHON)" $(VENV) compare && touch $(COMPARE)

gl: setup ## something that draws without a screen (EGL or OSMesa): installs it, or says what to type
	@bash scripts/install_gl.sh $(BIN)/python

demo: gl ## the whole chain at a small size: demonstrations, dataset, training, merge, roll-outs (no GPU, no downloads)
	$(BIN)/prismo demo --output demo --overwrite

# Two processes, a file at a time: module fixtures are shared, and the slowest part does not wait for the others.
test: setup ## the suite
	@bash scripts/install_gl.sh $(BIN)/python both || echo "Tests that draw are skipped."
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup ## the part of the suite that needs no other process: for every save
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not processes and not slow"

lint: setup ## what continuous integration checks of style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

format: setup ## mends what lint complains about
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## removes .venv and what builds leave
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
