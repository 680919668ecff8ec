# `make demo` and `make test` work on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes, each with a Postgres of its own; the tests of one file share servers and stay together.
FAST := -m "not slow and not rabbitmq" -n 2 --dist loadfile

.PHONY: demo test test-all test-lowest fuzz kills image cluster mutants coverage lint schemas dist book clean

demo: $(STAMP)
	$(RUN)/minter demo

test: $(STAMP)
	$(RUN)/pytest $(FAST)

test-all: $(STAMP)
	$(RUN)/pytest

# The tests of `make test` with the lowest versions that pyproject.toml allows.
test-lowest: $(STAMP)
	$(PYTHON) -m venv --clear $(VENV)/lowest
	$(RUN)/python -m tests.lowest > $(VENV)/lowest/constraints.txt
	$(VENV)/lowest/bin/pip install --quiet --disable-pip-version-check --constraint $(VENV)/lowest/constraints.txt --editable '.[dev]'
	$(VENV)/lowest/bin/pytest $(FAST)

# 100 000 odd inputs at every entrance; prints its seed.
fuzz: $(STAMP)
	$(RUN)/pytest -m fuzz tests/fuzz -s

# A worker killed 20 times at each of its stages, on RabbitMQ; the acceptance suite does it 10 times.
kills: $(STAMP)
	MINTER_KILLS=20 $(RUN)/pytest -m rabbitmq tests/acceptance/test_faults.py -k at_each_stage

# Build the container image on a base made here and let it issue a token; needs root, debootstrap and buildah.
image: dist
	$(RUN)/pytest tests/image

# Each fault 20 times on a real cluster (docs/cluster.md), more than two hours; needs root, Debian's packages of .ci/run and libfaketime.
# CLUSTER="--each 5 --only broker" does less of it.
cluster: $(STAMP)
	$(RUN)/python -m tests.cluster --old d6d3c8e --report benchmarks/results-cluster.json $(CLUSTER)

# Mutation tests of MUTANTS, all of policy, storages and tokens if unset, with the tests that need no Postgres.
# Half an hour on two cores; `mutmut show NAME` shows a survivor, and a kill in the database's tests is not seen.
mutants: $(STAMP)
	$(RUN)/pip install --quiet --disable-pip-version-check 'mutmut>=3.8,<4'
	rm -f mutants/mutmut-stats.json
	$(RUN)/mutmut run --max-children 2 $(MUTANTS)
	$(RUN)/mutmut results

# Lines that the tests run in every process that they start, RabbitMQ's tests included; the figure is in CONTRIBUTING.md.
# A process that is killed tells nothing.
coverage: $(STAMP)
	$(RUN)/pip install --quiet --disable-pip-version-check 'coverage>=7.10,<8'
	rm -f .coverage .coverage.*
	$(RUN)/coverage run -m pytest -m "not slow"
	$(RUN)/coverage combine --quiet
	$(RUN)/coverage report

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

schemas: $(STAMP)
	$(RUN)/python -m schemas

# Build the wheel that docs/install.md installs, a list of what it installs (CycloneDX), and their hashes.
# The same commit gives the same wheel; the list has the versions of the day.
dist: $(STAMP)
	rm -rf build dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RUN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear $(VENV)/release
	$(VENV)/release/bin/pip install --quiet --disable-pip-version-check 'gridminter[console] @ file://$(CURDIR)/'$$(ls dist/*.whl)
	$(RUN)/pip install --quiet --disable-pip-version-check 'cyclonedx-bom>=7,<8'
	$(RUN)/cyclonedx-py environment --output-reproducible --of JSON -o dist/sbom.cdx.json $(VENV)/release/bin/python
	cd dist && sha256sum *.whl *.json | tee SHA256SUMS

# Build the book from docs/, into .venv/site; a broken link or page fails.
book:
	$(PYTHON) -m venv --clear $(VENV)/book
	$(VENV)/book/bin/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(VENV)/book/bin/mkdocs build --strict --quiet --site-dir $(VENV)/site

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) mutants
