# Shorthand for people with make; start.py does the work and its own set-up on every system.
PYTHON ?= python3

.PHONY: help demo test lint size

help:
	@echo "make demo   a small training run (sets .venv up first)"
	@echo "make test   the fast tests (sets .venv up first)"
	@echo "make lint   ruff, mypy, and the direction of imports"
	@echo "make size   code lines, longest function and module, options"

demo:
	$(PYTHON) start.py demo

test:
	$(PYTHON) start.py test

lint:
	@test -x .venv/bin/ruff || { echo "the tools are not installed yet; type: make test"; exit 1; }
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

size:
	$(PYTHON) benchmarks/size.py
