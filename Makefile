# Every target needs Python >= 3.11 and a package index; nothing else, and nothing twice. `make types` also fetches
# pyright, through npm.
PYTHON ?= python3
# The tested version; any build of it, CPU or CUDA. Only `make` installs it: pip leaves the torch that is there alone.
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: demo lint types test clean

demo: $(STAMP)
	$(BIN)/reapkit apply recipes/demo.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python --project pyright-strict.json

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not long"

$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH) --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs
