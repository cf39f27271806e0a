# Everything on a fresh machine: `make demo`, `make test`. Both set up .venv first, with plain pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev

.PHONY: demo test lint gpu-audit bench reliability docs clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]" $(shell $(PYTHON) scripts/torch_pair.py)
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/vislm demo --out out/demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff format --check vislm tests scripts
	$(BIN)/ruff check vislm tests scripts
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

gpu-audit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/vislm bench gpu-audit --match "D=64"

bench: $(VENV)/.installed
	$(BIN)/vislm bench startup
	$(BIN)/vislm bench statistics
	$(BIN)/vislm bench kernels --out out/kernels

reliability: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python scripts/reliability.py

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist out site *.egg-info
