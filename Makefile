# `make quickstart` takes a fresh clone to a distilled model; `make test-fast`, `make test` and `make lint` check a
# change.
#
#   PYTHON=python3.12 make quickstart    another interpreter
#   VENV=/tmp/venv make test             another virtual environment

PYTHON ?= python3
VENV ?= .venv
# Tests run side by side in this many processes of one thread each: the models are too small for more threads.
JOBS ?= 2
BIN := $(VENV)/bin
# Touched when the installation is complete: it is repeated only after pyproject.toml or constraints.txt has changed.
INSTALLED := $(VENV)/.installed

# Under two minutes: the language, the commands, the algebra of axes, the passes, the losses. CONTRIBUTING.md says what else.
FAST := tests/specs tests/cli tests/repository/test_arrows.py tests/repository/test_architecture.py \
  tests/compiler/test_dims.py tests/compiler/test_narrowing.py tests/compiler/test_select.py tests/compiler/test_scores.py \
  $(wildcard tests/compiler/test_rules_*.py) tests/runtime/test_distillation_loss.py tests/runtime/test_schedule_and_optimizer.py
NOT_FAST := --deselect tests/cli/test_interface.py::test_the_page_runs

.PHONY: help quickstart install test test-fast test-all lint clean smollm2
.DEFAULT_GOAL := help

help:
	@echo 'make quickstart   install into $(VENV), then compile, distil and evaluate examples/quickstart/spec.yaml'
	@echo 'make smollm2      a real instruct model of 135M parameters: examples/smollm2/README.md'
	@echo 'make test-fast    the tests of language, commands, axes, passes and losses: under two minutes'
	@echo 'make test         the tests'
	@echo 'make test-all     the tests and the sweeps that are marked slow'
	@echo 'make lint         ruff check, ruff format --check, mypy --strict'
	@echo 'make install      install into $(VENV) only'
	@echo 'make clean        remove $(VENV), caches and the builds of the examples'

quickstart: $(INSTALLED)
	$(BIN)/minitron run examples/quickstart/spec.yaml

smollm2: $(INSTALLED)
	$(BIN)/python examples/smollm2/fetch_teacher.py
	test -f examples/smollm2/text/train.jsonl || $(BIN)/python examples/smollm2/make_text.py
	$(BIN)/minitron run examples/smollm2/spec.yaml

install: $(INSTALLED)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not slow'

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m 'not slow' $(NOT_FAST) $(FAST)

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p minitron
	$(BIN)/mypy --strict .github/specs/report.py .github/specs/comment.py

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "minitron needs Python 3.11 or newer; there is no $(PYTHON) here." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "minitron needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard,datasets,eval,gguf]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis examples/*/builds
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
