# Four verbs for every day: setup, check, test, bench. They are what CI runs, too.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ROOMS := records images vision trainers tuning serving labeling cluster
INSTALLED := $(VENV)/.relook-installed
LABEL_STUDIO := $(VENV)/label-studio/relook-ready.json
AUDIT_TOOLS := build/audit-tools
# Four processes of tests, with the servers that they start, take 9 GB; three take 7.
TEST_PROCESSES ?= $(shell awk '/^MemTotal/ {print $$2 < 12000000 ? 3 : 4}' /proc/meminfo 2>/dev/null || echo 3)
# A test beyond its timeout (900 s, pyproject.toml) gets an exception. One that still waits a minute later, for a thread
# of its own that never ends, is ended with its process: its threads are printed, and another process takes over. That
# one runs the test again, so no more than one is started.
HUNG_TESTS := -o faulthandler_timeout=960 -o faulthandler_exit_on_timeout=true --max-worker-restart 1
IN_PROCESSES := -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder $(HUNG_TESTS)
PIP := $(BIN)/pip install --disable-pip-version-check

.PHONY: help setup demo check format test test-long test-fast coverage mutants bench soak audit clean
.DEFAULT_GOAL := help

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(LABEL_STUDIO)  ## install everything into .venv; does nothing the second time

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Relook needs Python 3.11 or newer; install it, or name it: make setup PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Relook needs Python 3.11 or newer and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make setup PYTHON=/path/to/python")'
	@echo "installing Relook's packages into $(VENV) (the first time: several minutes, 8 GB on disk)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(LABEL_STUDIO): $(INSTALLED) labeling/label_studio_requirements.lock
	$(BIN)/relook label install
	@touch $@

demo: setup  ## the whole loop, one command; make demo DATA=folder takes your images
	$(BIN)/relook demo $(if $(DATA),--data "$(DATA)")

check: $(INSTALLED)  ## style, types, import directions, docstrings, deploy files, changelog
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pydoclint $(ROOMS)
	$(BIN)/pytest -q tests/cluster/test_deploy.py
	@grep -q "^## \[$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)\]" CHANGELOG.md \
		|| { echo "CHANGELOG.md has no section for the version in pyproject.toml" >&2; exit 1; }

format: $(INSTALLED)  ## sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup  ## real Ray, real Label Studio, a browser where there is one
	@# Once, and not by each of the processes below: on a new checkout they would all compile the same files.
	@$(BIN)/python -m compileall -q -j 0 $(ROOMS) bench relook.py
	$(BIN)/pytest $(IN_PROCESSES) -m "not long and not soak"

test-long: setup  ## the costly tests that `make test` leaves out
	$(BIN)/pytest $(IN_PROCESSES) -m "long and not soak"

test-fast: $(INSTALLED)  ## what needs no server and no browser
	$(BIN)/pytest -m "not slow and not browser and not long and not soak"

coverage: setup  ## lines and branches that both run, subprocesses and Ray's workers included
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest $(IN_PROCESSES)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --sort=cover

mutants: setup  ## do the tests notice a change of the modules that decide about patients? (an hour)
	$(BIN)/mutmut run --max-children $(TEST_PROCESSES)
	$(BIN)/mutmut export-cicd-stats
	$(BIN)/python .ci/mutation_score mutants/mutmut-cicd-stats.json

bench: setup  ## time and memory of the demo; make bench-KIND measures train, tune, serve, explain or label
	$(BIN)/python -m bench.drills.demo $(if $(DATA),--data "$(DATA)")

bench-%: setup
	$(BIN)/python -m bench $* --json

soak: setup  ## the long forms in one go, hours: tests and drills; demo after demo for MINUTES (10); logs in build/soak
	$(BIN)/python -m bench.drills.soak --minutes $(or $(MINUTES),10) --points $(or $(POINTS),30) $(PARTS)

audit: setup $(AUDIT_TOOLS)/.installed  ## bills of materials, and known vulnerabilities of what is pinned (asks OSV)
	.ci/audit $(AUDIT_TOOLS) $(VENV) build/audit

$(AUDIT_TOOLS)/.installed: .ci/audit.lock
	@test -n "$(PYTHON)" || { echo "make audit needs Python 3.11 or newer; install it, or name it: make audit PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(AUDIT_TOOLS)/bin/python || $(PYTHON) -m venv $(AUDIT_TOOLS)
	$(AUDIT_TOOLS)/bin/pip install --disable-pip-version-check -q --require-hashes -r .ci/audit.lock
	@touch $@

clean:  ## remove caches and the environment; .relook (your data) stays
	rm -rf $(VENV) build mutants .coverage .coverage.* *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(ROOMS) tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
