# Every target makes or completes .venv by itself; nothing has to be installed or activated by hand.
#
# To add a target: give its extras a name in pyproject.toml, pin what they bring in constraints.txt, and let the target
# depend on their stamp. `make paper`, which needs the extras `test` and `docs`:
#
#     paper: $(VENV)/test.stamp $(VENV)/docs.stamp  ## Draw the figures
#     	$(BIN)/python -m something
#
# Variables, for `make help`:
## PYTHON: the interpreter that .venv is made with: make check PYTHON=python3.12
## ARGS: handed on to the tool of demo, test, test-fast, test-trainers, bench, gpu and fuzz: make test ARGS="-k kl_k3"
## EXAMPLES: how many examples of make fuzz, 100000 unless said: make fuzz EXAMPLES=5000
## TRAINERS: which trainers of make test-trainers, all unless said: make test-trainers TRAINERS="trl verl"

PYTHON ?= python3
ARGS ?=
EXAMPLES ?= 100000
TRAINERS ?= $(sort $(patsubst tests/trainers/%/requirements.txt,%,$(wildcard tests/trainers/*/requirements.txt)))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help bench check demo format fuzz gpu test test-fast test-trainers

help:  ## List the targets, and the variables that they take
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@awk '/^## [A-Z]+: / { name = $$2; sub(/:/, "", name); sub(/^## [A-Z]+: /, ""); printf "  %-18s %s\n", name, $$0 }' $(MAKEFILE_LIST)

check: $(VENV)/test.stamp  ## Lint, formatting and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/examples.stamp  ## Train a tiny student three ways and draw the reward curve (4 minutes)
	$(BIN)/python docs/examples/demo.py $(ARGS)

format: $(VENV)/test.stamp  ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A file stays in one process: the code blocks of a document share their names.
test: $(VENV)/test.stamp $(VENV)/examples.stamp  ## The tests, and the code blocks of README.md and docs/
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --durations 5 $(ARGS)

test-fast: $(VENV)/test.stamp  ## The tests that take less than a minute together: for the loop while you write
	$(BIN)/pytest tests --fast --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

# Every trainer has an environment of its own, .venv-<name>: their requirements do not go together.
test-trainers: $(TRAINERS:%=.venv-%/trainer.stamp)  ## The adapters inside the trainers themselves; TRAINERS=trl for one
	@set -e; for trainer in $(TRAINERS); do echo "test-trainers: $$trainer"; \
	    .venv-$$trainer/bin/python -m pytest -c tests/trainers/pytest.ini --rootdir . \
	        tests/trainers/test_*.py tests/trainers/$$trainer $(ARGS); \
	done

bench: $(VENV)/bench.stamp  ## Speed and memory beside peers, to benchmarks/results/; ARGS="--quick" takes a minute
	$(BIN)/python -m benchmarks $(ARGS)

# Kernels run on the GPU here; in `make test`, where there is none, they are interpreted.
gpu: $(VENV)/test.stamp $(VENV)/bench.stamp $(VENV)/peers.stamp  ## On a GPU: the kernels' tests, then figures and peers
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'"
	$(BIN)/pytest tests/_triton tests/_losses/test_compiled_tail.py
	$(BIN)/python -m benchmarks --core $(ARGS)

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

$(VENV)/peers.stamp: benchmarks/peers.txt $(VENV)/torch.stamp
	@echo "$(VENV): peers"
	@$(PIP) install --constraint constraints.txt --requirement benchmarks/peers.txt
	@touch $@

# The file lists all that the environment holds, so nothing is resolved; but torch, alone and first, brings what its build
# needs. Made anew when the list changes; a changed pyproject.toml installs kdloss anew, and nothing else.
.PRECIOUS: .venv-%/listed.stamp
.venv-%/listed.stamp: tests/trainers/%/requirements.txt
	@echo ".venv-$*"
	@$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --constraint $< torch
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement $<
	@touch $@

.venv-%/trainer.stamp: .venv-%/listed.stamp pyproject.toml
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --editable .
	@touch $@
