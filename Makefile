# Everything here works in a fresh clone with Python 3.10 or newer and pip; the lock is of Python 3.11.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Built with the torch that is there, so not in the lock; no kernel is compiled.
DEEPSPEED := 0.19.8

.PHONY: env quickstart test sweep lint format clean

env: $(READY)

$(READY): requirements/lock.txt setup.py Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements/lock.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation deepspeed==$(DEEPSPEED)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

test: $(READY)
	$(BIN)/python -m pytest -n 2

sweep: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict finetuner
	$(BIN)/codespell

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info work_dirs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
