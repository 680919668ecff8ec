# `make demo` and `make test` work on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint schemas clean

demo: $(STAMP)
	$(RUN)/minter demo

test: $(STAMP)
	$(RUN)/pytest -m "not slow and not rabbitmq"

test-all: $(STAMP)
	$(RUN)/pytest

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

schemas: $(STAMP)
	$(RUN)/python -m schemas

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
