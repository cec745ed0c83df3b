# Needs make and Python 3.11 or newer with venv; everything else is installed into .venv*.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PIP = -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
SECONDS = 60

.PHONY: cluster consumers coverage fuzz mutants help setup test test-fast track types lint format demo docs pictures golden bench parity clean python

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: .venv/.done ## install regraft and its tools into .venv

# Runs one stage after another, every one of them, and fails at the end if any did.
STAGES = failed=; \
	stage() { echo; echo "==> $$*"; .venv/bin/"$$@" || failed="$$failed [$$*]"; }; \
	verdict() { test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }; }

# Percent of lines and branches; what the whole suite reaches, less a point.
FLOOR = 90

# One worker for each core, each with one thread of torch. A worker takes about a gigabyte: WORKERS=1 where that is much.
WORKERS ?= auto
PYTEST = pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

test: .venv/.done .venv/.browser ## lint, types and tests
	@$(STAGES); \
	stage ruff check .; \
	stage ruff format --check .; \
	stage mypy; \
	stage lint-imports; \
	stage $(PYTEST); \
	verdict

test-fast: .venv/.done ## the tests that take no longer than a moment
	@.venv/bin/$(PYTEST) -m "not slow"

lint: .venv/.done ## lint and types alone
	@$(STAGES); \
	stage ruff check .; \
	stage ruff format --check .; \
	stage mypy; \
	stage lint-imports; \
	verdict

types: .venv/.done ## what editors say to users of the public names, by pyright
	@.venv/bin/python $(PIP) 'pyright[nodejs]==1.1.414'
	@.venv/bin/pyright --pythonpath .venv/bin/python

coverage: .venv/.done ## how much of the code the tests run, and fail below the floor
	@.venv/bin/$(PYTEST) --cov --cov-report=term --cov-fail-under=$(FLOOR)

format: .venv/.done ## format the code and mend what ruff can mend
	@.venv/bin/ruff check --fix-only .
	@.venv/bin/ruff format .

demo: .venv-demo/.done ## install the core alone, without torch, and run the demo
	@.venv-demo/bin/python -m regraft.demo

docs: .venv/.done ## make the documentation's site, in build/docs/
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "see build/docs/index.html; for its search: python3 -m http.server -d build/docs"

pictures: .venv/.done .venv/.browser ## make the pictures and the generated pages of docs/ anew
	@.venv/bin/python scripts/make_docs.py

golden: .venv-golden/.done ## write tests/golden anew
	@.venv-golden/bin/python scripts/make_golden.py tests/golden --set small

bench: .venv/.done ## run every benchmark
	@set -e; for file in benchmarks/bench_*.py; do \
		test -e "$$file" || { echo "there are no benchmarks" >&2; exit 1; }; \
		echo; echo "==> $$file"; .venv/bin/python "$$file"; \
	done

track: .venv/.done ## has something become slower than benchmarks/ratios.json says?
	@.venv/bin/python benchmarks/track.py

RELEASES = 5.4.0,5.12.0,5.16.0,5.20.0,5.23.0,5.24.0

parity: .venv/.done ## compare with transformers, for every class that it converts, in several releases; a stopped run goes on
	@.venv/bin/python scripts/parity.py --releases $(RELEASES) --out docs/parity.md

fuzz: .venv/.done ## change sound inputs at random and look for crashes, hangs and wrong results (SECONDS=600)
	@.venv/bin/python scripts/fuzz.py --seconds $(SECONDS)

# A tool that is not there is skipped by name; with STRICT=1 that is a failure. CONSUMERS_CACHE=FOLDER keeps archives.
consumers: .venv-consumers/.done ## compare with the tools that read what regraft writes (STRICT=1: all of them)
	@failed=; for file in scripts/consumers/*.py; do \
		echo; echo "==> $$file"; \
		.venv-consumers/bin/python "$$file" $(if $(STRICT),--strict) || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

cluster: .venv-cluster/.done ## convert on a cluster of Ray's whose workers and nodes die
	@.venv-cluster/bin/python scripts/cluster.py

mutants: .venv/.done ## change the code in small ways that the tests must notice
	@.venv/bin/python scripts/mutants.py

clean: ## remove the environments, caches and builds
	@rm -rf .venv .venv-demo .venv-golden .venv-consumers .venv-cluster .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find src tests scripts benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The environments. A .done file says that everything named in its prerequisites is installed.

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "regraft needs Python 3.11 or newer, and '$(PYTHON)' is not." >&2; \
		echo "Install one and name it: make PYTHON=/path/to/python3.12 ..." >&2; \
		exit 1; \
	}

.venv/.created .venv-demo/.created .venv-golden/.created .venv-consumers/.created .venv-cluster/.created: | python
	@echo "==> creating $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@touch $@

.venv/.torch .venv-golden/.torch .venv-consumers/.torch: %/.torch: requirements/torch.txt %/.created
	@echo "==> installing torch into $(@D)"
	@$(@D)/bin/python $(PIP) -r requirements/torch.txt
	@touch $@

.venv/.done: pyproject.toml requirements/test.txt .venv/.torch
	@echo "==> installing regraft and its tools into .venv"
	@.venv/bin/python $(PIP) -r requirements/test.txt -e '.[dev,docs]'
	@touch $@

# The tests of the HTML page need a Chromium; they are skipped where none can be had.
.venv/.browser: scripts/browser.py .venv/.done
	@if .venv/bin/python scripts/browser.py; then touch $@; fi

.venv-demo/.done: pyproject.toml .venv-demo/.created
	@echo "==> installing regraft into .venv-demo"
	@.venv-demo/bin/python $(PIP) -e .
	@touch $@

.venv-golden/.done: requirements/golden.txt .venv-golden/.torch
	@echo "==> installing the older libraries into .venv-golden"
	@.venv-golden/bin/python $(PIP) -r requirements/golden.txt
	@touch $@

.venv-consumers/.done: pyproject.toml requirements/consumers.txt requirements/consumers-alone.txt .venv-consumers/.torch
	@echo "==> installing the consumers into .venv-consumers"
	@.venv-consumers/bin/python $(PIP) -r requirements/consumers.txt -e .
	@# What one of them cannot be had of is skipped by name when they run.
	@grep -v '^#' requirements/consumers-alone.txt | while read -r each; do \
		.venv-consumers/bin/python $(PIP) --no-deps "$$each" || echo "could not install $$each"; \
	done
	@touch $@

.venv-cluster/.done: pyproject.toml .venv-cluster/.created
	@echo "==> installing Ray into .venv-cluster"
	@.venv-cluster/bin/python $(PIP) -e '.[ray]'
	@touch $@
