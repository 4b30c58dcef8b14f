# Every target makes what it needs in .venv by itself; a second run is fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test check claims docs bench table clean

# torch first and pinned: a looser pin would bring the multi-gigabyte CUDA build
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) -e ".[bench]"
	touch $@

## train a small model, prune it, repair it, measure everything: what each method bought (under 4 minutes)
demo: $(VENV)/.base
	$(BIN)/gnomon run quickstart

## the whole test suite, two workers
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

## ruff, mypy, import-linter
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/readme_table.py --check

## measure every claim of every paper and write claims/ledger.json and its pages
claims: $(VENV)/.base
	$(BIN)/gnomon claims run --all

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.bench
	@status=0; for file in benchmarks/*.py; do \
	  case $$file in benchmarks/timing.py) continue;; esac; \
	  echo "== $$file"; $(BIN)/python $$file || status=1; done; exit $$status

## write the method table of README.md again, from the cards
table: $(VENV)/.base
	$(BIN)/python docs/readme_table.py

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
