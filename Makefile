PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned here, and not in the extras, so that two machines build the same environment.
TORCH := torch==2.13.0
# One process a core; a file stays in one of them, because its tests share what they compiled.
PYTEST := -q -n 2 --dist loadfile

.PHONY: run test test-full lint format bench clean
.DEFAULT_GOAL := run

run: $(VENV)/.ready  ## convert, verify and use the embedded MiniLM
	$(BIN)/python -m converters.hf --demo

test: $(VENV)/.ready  ## the whole suite, long proofs with small counts
	$(BIN)/python -m pytest $(PYTEST)

test-full: $(VENV)/.ready  ## the whole suite, long proofs with the stated counts
	EQX_TRANSFORMERS_FULL=1 $(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.forward
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.functional

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) *.eqx .pytest_cache .ruff_cache
