# Every target makes or completes .venv by itself; nothing has to be installed or activated by hand.
#
# To add a target: give its extras a name in pyproject.toml, pin what they bring in constraints.txt, and let the target
# depend on their stamp. `make paper`, which needs the extras `test` and `docs`:
#
#     paper: $(VENV)/test.stamp $(VENV)/docs.stamp  ## Draw the figures
#     	$(BIN)/python -m something
#
# Variables: PYTHON, the interpreter that .venv is made with; ARGS, handed on to the tool, as in `make test ARGS="-k kl_k3"`;
# EXAMPLES, of `make fuzz`.

PYTHON ?= python3
ARGS ?=
EXAMPLES ?= 100000

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help bench check demo format fuzz test

help:  ## List the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check: $(VENV)/test.stamp  ## Lint, formatting and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/examples.stamp  ## Train a tiny student three ways and draw the reward curve (4 minutes)
	$(BIN)/python docs/examples/demo.py $(ARGS)

format: $(VENV)/test.stamp  ## Mend what the linter and the formatter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A file stays in one process: the code blocks of a document share their names.
test: $(VENV)/test.stamp $(VENV)/examples.stamp  ## The tests, and the code blocks of README.md and docs/
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --durations 5 $(ARGS)

bench: $(VENV)/bench.stamp  ## Speed and memory beside peers, to benchmarks/results/; ARGS="--quick" takes a minute
	$(BIN)/python -m benchmarks $(ARGS)

# 100,000 examples in all; the normal suite draws a hundred for each test.
fuzz: $(VENV)/test.stamp  ## The hypothesis tests, with many more examples: make fuzz EXAMPLES=100000
	$(BIN)/pytest tests --fuzz $(EXAMPLES) --numprocesses auto --maxprocesses 4 --durations 5 $(ARGS)

# torch comes first and alone, so that no other package's requirement chooses its build.
$(VENV)/torch.stamp: constraints.txt
	@echo "$(VENV): torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch
	@touch $@

# One stamp per set of extras: .venv/test.stamp stands for `pip install -e '.[test]'`.
$(VENV)/%.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	@echo "$(VENV): kdloss[$*]"
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@
