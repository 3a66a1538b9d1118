# make demo, make test, make lint: each makes .venv when it is missing and installs what it needs into it,
# again only when pyproject.toml has changed. pip's own settings hold, so that an index with PyTorch's smaller
# CPU build can be named by PIP_EXTRA_INDEX_URL.
.POSIX:

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
ARGS =

# $$want: what to install, such as .[test]. pip is quiet, a dot every two seconds shows that it works.
INSTALL = \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo 'guerdon needs Python 3.11 or newer: name one, as in make PYTHON=python3.12 demo' >&2; exit 1; }; \
		$(PYTHON) -m venv $(VENV) || exit 1; }; \
	printf 'Installing %s into $(VENV) (the first time takes some minutes) ' "$$want"; \
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --editable "$$want" & pid=$$!; \
	trap 'kill $$pid; exit 130' INT TERM; \
	while kill -0 $$pid 2>/dev/null; do printf .; sleep 2; done; \
	wait $$pid || exit 1; echo ' done'; touch $@

help:
	@echo 'make demo   fine-tunes a tiny text-to-image model for a reward, keeping its prompts (about two minutes)'
	@echo 'make test   runs the tests (make test ARGS="-k catalog" for some of them)'
	@echo 'make lint   checks style, imports and types'

demo: $(VENV)/.demo
	@$(BIN)/guerdon train rlcm --name demo-$$(date +%m%d-%H%M%S) --kl 0.2 $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

$(VENV)/.demo: pyproject.toml
	@want=.; $(INSTALL)

$(VENV)/.test: pyproject.toml
	@want='.[test]'; $(INSTALL)

$(VENV)/.lint: pyproject.toml
	@want='.[lint]'; $(INSTALL)

# the tables of the docs, from results/
tables:
	$(BIN)/python -m guerdon.reproductions.tables docs/results.md docs/language.md docs/matrix.md docs/planner.md

.PHONY: help demo test lint tables
