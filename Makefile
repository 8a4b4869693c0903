# `make demo` and `make test` are all that a newcomer needs; everything stays inside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export SOAK
export STILLHOUSE_HOME ?= $(CURDIR)/.stillhouse
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Unit tests start no process that the others could meet, so they run on two cores: each begins with half of the files
# and takes over tests of the other once it is through. The other folders hold none, and their imports would take longer
# than some of the tests.
UNIT := $(BIN)/pytest -q -m unit -n 2 --dist worksteal --ignore tests/integration --ignore tests/chaos

.PHONY: demo test unit integration plan nightly chaos release-check up down status backup restore lint check clean

demo: $(VENV)/demo.stamp  ## a real teacher, two students, one endpoint: the whole line in minutes
	$(BIN)/python infra/local/fetch_demo.py .stillhouse/demo
	$(BIN)/stillhouse run examples/demo.yaml

test: unit integration  ## every part once

unit: $(VENV)/dev.stamp  ## the tests that start nothing
	$(UNIT)

integration: $(VENV)/dev.stamp  ## starts real Ray, DeepSpeed, MLflow, Serve and S3 on loopback
	$(BIN)/pytest -m "not unit and not chaos and not nightly"

plan: $(VENV)/dev.stamp  ## every test of every mark is collected and planned; nothing runs
	$(BIN)/pytest -q --setup-plan >$(VENV)/plan.txt || { tail -n 40 $(VENV)/plan.txt; exit 1; }

nightly: $(VENV)/dev.stamp  ## the tests that train whole families for minutes; properties on a thousand examples
	$(BIN)/pytest -m nightly
	$(UNIT) -m "unit and hypothesis" --hypothesis-profile nightly

chaos: $(VENV)/dev.stamp  ## kills and cuts off the parts of running families; CHAOS_SEED=n repeats a run, SOAK=30m goes on
	$(BIN)/pytest -m chaos $(if $(SOAK),tests/chaos/test_soak.py)

release-check: lint plan test nightly chaos demo  ## all that there is, some hours; before a release is tagged

up: $(VENV)/local.stamp  ## Ray, MLflow on PostgreSQL, S3 and Prometheus on this machine; down ends them and keeps their data
	$(BIN)/python -m infra.local.stack up $(UP)

down: $(VENV)/local.stamp
	$(BIN)/python -m infra.local.stack down

backup restore: $(VENV)/local.stamp  ## its database and buckets, to and from FOLDER
	$(BIN)/python -m infra.local.stack $@ $(FOLDER)

status: $(VENV)/local.stamp  ## what of it is healthy
	$(BIN)/python -m infra.local.stack status

lint: $(VENV)/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: $(VENV)/dev.stamp  ## lint, types and unit tests, beside each other
	@$(MAKE) --no-print-directory --jobs 2 lint unit

clean:  ## remove the environment and everything that was fetched or made
	rm -rf $(VENV) .stillhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# torch comes first and by its pin: left to the others' ranges, pip may take another build of it.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "Stillhouse needs Python 3.11 or 3.12, this is %d.%d; try make PYTHON=python3.11" % v)'
	@echo "installing into $(VENV), about two minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 setuptools wheel
	@touch $@

# Each extra holds the one before it, so one installation makes all stamps up to its own.
$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/local.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt
	$(PIP) -e '.[local]'
	@touch $(VENV)/demo.stamp $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $(VENV)/demo.stamp $(VENV)/local.stamp $@
