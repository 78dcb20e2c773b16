PYTHON ?= python3.11
export PYTHON EXTRA

BIN := .venv/bin

.PHONY: help install demo test fast long check format clean
.NOTPARALLEL:

help:
	@echo "make demo     set-up, then the three stages on film reviews (configs/movies/tiny.yaml)"
	@echo "make test     set-up, then lint, types, import rule and the tests"
	@echo "make fast     the same without the slow tests"
	@echo "make long     proofs of minutes that make test leaves out: nodes and drivers lost, many faults in one run"
	@echo "make check    lint, types and import rule only"
	@echo "make format   format the code and sort imports"
	@echo "make install  set-up only: .venv (PYTHON=python3.11, EXTRA=cpu or gpu)"
	@echo "make clean    remove .venv and caches; runs and data stay"

install:
	@bash .ci/setup

demo: install
	@$(BIN)/python -m examples.movies prepare
	@$(BIN)/troupe pipeline configs/movies/tiny.yaml

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: check
	@$(BIN)/python -m tests

fast: check
	@$(BIN)/pytest -m "not slow"

long: install
	@$(BIN)/pytest -m long

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@rm -rf .venv *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
