# Every target sets up what it needs, in this folder only. Needs Python >= 3.11 with pip and venv, and make.
# uv is used where it is installed; else it goes into .uv/. `make` alone lists the targets.

PYTHON ?= python3
UV := $(or $(shell command -v uv),.uv/bin/uv)
BIN := .venv/bin
SYNCED := .venv/.synced
WORKERS = $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: quickstart
quickstart: $(SYNCED) ## Train, convert and evaluate a small model on text from this machine (3 minutes on 2 cores)
	$(BIN)/python examples/quickstart/quickstart.py quickstart-run

# Tests' modules and the packages' are compiled once, also where the variable is set, as in images of containers.
PYTEST = env -u PYTHONDONTWRITEBYTECODE PATH="$(dir $(abspath $(UV))):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: test
test: $(SYNCED) ## Run all tests
	$(PYTEST)

.PHONY: test-fast
test-fast: $(SYNCED) ## Run the tests that are neither slow nor of the documentation
	$(PYTEST) -m "not slow and not docs"

.PHONY: test-slow
test-slow: $(SYNCED) ## Run the tests that test-fast leaves out
	$(PYTEST) -m "slow or docs"

.PHONY: lint
lint: $(SYNCED) ## Check format and style
	$(BIN)/ruff format --check
	$(BIN)/ruff check

.PHONY: types
types: $(SYNCED) ## Check types
	$(BIN)/pyright

.PHONY: lock
lock: $(UV) ## Resolve all dependencies again into uv.lock, which carries versions only
	$(UV) lock --upgrade
	$(PYTHON) tools/strip_lock.py uv.lock

.PHONY: docs
docs: $(SYNCED) ## Build the documentation into site/
	$(call sync,--group docs)
	$(BIN)/mkdocs build --strict

.PHONY: wheels
wheels: $(SYNCED) ## Build a wheel of each package into dist/
	rm -rf dist
	$(UV) build --quiet --all-packages --wheel --out-dir dist

.PHONY: try-wheels
try-wheels: wheels ## Install each wheel alone into an empty environment and start it
	PATH="$(dir $(abspath $(UV))):$$PATH" $(BIN)/python tools/try_wheels.py dist

.PHONY: bench
bench: $(SYNCED) ## Measure what docs/benchmarks.md records and this machine can run
	$(BIN)/python bench/command_line.py
	$(BIN)/python bench/training.py bench/nanogpt_cpu.toml --steps 200

# uv resolves from the pins in uv.lock and writes addresses into it; the pinned file is put back whatever happens.
sync = cp -p uv.lock .uv.lock.pinned && { $(UV) sync --all-packages $(1); s=$$?; mv .uv.lock.pinned uv.lock; exit $$s; }

$(SYNCED): pyproject.toml uv.lock $(wildcard packages/*/pyproject.toml) | $(UV)
	$(call sync,--python "$$($(PYTHON) -c 'import sys; print(sys.executable)')")
	@touch $@

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv
