# Everything a newcomer needs:  make test  (sets up .venv, runs the suite)  and  make demo.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# CUDA hardware needs nothing else: torch's wheel brings its own libraries.
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
SIMULATOR := hf-libero robosuite bddl

.PHONY: setup gl demo test test-fast lint format clean

setup: $(READY)

# torch goes first and alone, the simulator without its dependency lists: see constraints.txt.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps $(SIMULATOR)
	touch $(READY)

# Software rendering for machines without a GPU; says what to type where it may not install it.
gl:
	@bash scripts/install_gl.sh

demo: setup gl
	$(BIN)/python scripts/demo.py --output demo --overwrite

# Two processes, a file at a time: module fixtures are shared, and the slowest part does not wait for the others.
test: setup gl
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
