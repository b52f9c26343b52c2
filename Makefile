PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
# Pinned here, and not in the extras, so that two machines build the same environment.
TORCH := torch==2.13.0
# One process a core; a file stays in one of them, because its tests share what they compiled.
PYTEST := -q -n 2 --dist loadfile

.PHONY: run test test-full test-jax-oldest lint format bench clean
.DEFAULT_GOAL := run

run: $(VENV)/.ready  ## convert, verify and use the embedded MiniLM
	$(BIN)/python -m converters.hf --demo

test: $(VENV)/.ready  ## the whole suite, long proofs with small counts
	$(BIN)/python -m pytest $(PYTEST)

test-full: $(VENV)/.ready  ## the whole suite, long proofs with the stated counts
	EQX_TRANSFORMERS_FULL=1 $(BIN)/python -m pytest $(PYTEST)

# What takes jaxprs apart, on the oldest JAX that is promised; `make test` has the newest.
test-jax-oldest: $(OLDEST)/.ready  ## expressions and surgery on jax 0.7.2
	$(OLDEST)/bin/python -m pytest $(PYTEST) tests/expression tests/surgery

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
	$(BIN)/python -m benchmarks.trace
	$(BIN)/python -m benchmarks.lora
	$(BIN)/python -m benchmarks.finetune --data tests/data/movie_snippets

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(OLDEST)/.ready: pyproject.toml Makefile
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[test]' jax==0.7.2
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) *.eqx .pytest_cache .ruff_cache
