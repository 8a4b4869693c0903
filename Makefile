# `make demo` and `make test` are all that a newcomer needs; everything stays inside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export SOAK
export STILLHOUSE_HOME ?= $(CURDIR)/.stillhouse
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test nightly chaos up down status backup restore lint check clean

demo: $(VENV)/demo.stamp  ## a real teacher, two students, one endpoint: the whole line in minutes
	$(BIN)/python infra/local/fetch_demo.py .stillhouse/demo
	$(BIN)/stillhouse run examples/demo.yaml

test: $(VENV)/dev.stamp  ## every part once; starts real Ray, DeepSpeed, MLflow, Serve and S3 on loopback
	$(BIN)/pytest -m "not chaos and not nightly"

nightly: $(VENV)/dev.stamp  ## the tests that train whole families for minutes
	$(BIN)/pytest -m nightly

chaos: $(VENV)/dev.stamp  ## kills and cuts off the parts of running families; CHAOS_SEED=n repeats a run, SOAK=30m goes on
	$(BIN)/pytest -m chaos $(if $(SOAK),tests/chaos/test_soak.py)

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

check: lint  ## lint, types and unit tests
	$(BIN)/pytest -q -m unit

clean:  ## remove the environment and everything that was fetched or made
	rm -rf $(VENV) .stillhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# torch comes first and by its pin: left to the others' ranges, pip may take another build of it.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "Stillhouse needs Python 3.11 or 3.12, this is %d.%d; try make PYTHON=python3.11" % v)'
	@echo "installing into $(VENV), about two minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 setuptools wheel
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/local.stamp: $(VENV)/demo.stamp
	$(PIP) -e '.[local]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/local.stamp
	$(PIP) -e '.[dev]'
	@touch $@
