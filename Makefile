# Set-up needs nothing but Python 3.11 or newer; everything lives in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests that the default run leaves out; `ci` brings some of the slow ones back.
FAST := not slow and not gpu and not network
CI := (not slow or ci) and not gpu and not network
ALL := not gpu and not network

# A process a processor; a file's tests stay together, as they share models.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: setup demo test test-fast test-all lint format bench bench-search bench-methods \
	bench-memory bench-export bench-schedules clean help
.DEFAULT_GOAL := setup

setup: $(STAMP)  ## Make .venv and install AutoPrune there (the default)

# The version check comes first: an old Python fails at once and says why.
# The stamp is written last: an interrupted set-up is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f"AutoPrune needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}. " \
	  "Name another: make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,report]"
	@touch $@

demo: $(STAMP)  ## Compress SmolLM2-135M, verify the export, print the table
	$(BIN)/autoprune demo

test: lint  ## What CI runs: lint, the fast tests, the slow ones marked `ci`
	$(PYTEST) -m "$(CI)"

test-fast: $(STAMP)  ## The fast tests alone
	$(PYTEST) -m "$(FAST)"

test-all: lint  ## Lint and every test that needs no accelerator and no network
	$(PYTEST) -m "$(ALL)"

lint: $(STAMP)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Measure again what results/ claims of speed
	$(BIN)/python results/overhead/bench.py
	$(BIN)/python results/sparsegpt/bench.py

bench-search: $(STAMP)  ## The search beside EvoPress; resumes, CELLS='ours-*' for some
	$(BIN)/python results/search/bench.py $(CELLS)

bench-methods: $(STAMP)  ## Every method on the demo; resumes, CELLS='gptq-*' for some
	$(BIN)/python results/methods/bench.py $(CELLS)

bench-memory: $(STAMP)  ## Peak memory of a calibration pass, by width and by depth
	$(BIN)/python results/memory/bench.py $(CELLS)

bench-export: $(STAMP)  ## Every export target with every kind of policy; resumes
	$(BIN)/python results/export/bench.py $(CELLS)
	$(BIN)/python results/export/memory.py

bench-schedules: $(STAMP)  ## Recoveries, and when to prune; resumes
	$(BIN)/python results/schedules/recovery.py $(CELLS)
	$(BIN)/python results/schedules/from_scratch.py $(CELLS)

clean:  ## Remove caches and what was built; .venv and results stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find autoprune plugins tests -name __pycache__ -prune -exec rm -rf {} +

help:  ## Tell every target
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12
