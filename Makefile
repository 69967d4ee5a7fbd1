# Everything is installed into .venv and called from there; nothing needs to be activated.
#
#   make setup            once, and again after requirements.txt changed; PYTHON=python3.12 chooses the interpreter
#   make demo             set up and run the main job on embedded data
#   make test             set up and run the tests, in PROCESSES=2 at once; ARGS="-k schedules" chooses some, in one process
#   make lint             ruff, mypy and import-linter
#   make format           rewrite the files as ruff likes them
#   make lock             pin requirements.txt again from pyproject.toml; ARGS=--upgrade takes newer versions
#   make clean            remove .venv and all caches; ./runs and ./mlruns stay

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
ARGS ?=
PROCESSES ?= 2

.PHONY: setup demo test lint ruff mypy imports format lock clean again
.DELETE_ON_ERROR:

setup: $(STAMP)

# A named interpreter is compared with the one in .venv; one that has gone takes .venv with it.
ifneq ($(PYTHON)$(shell test -x $(BIN)/python || echo gone),)
$(STAMP): again
again:
endif

$(STAMP): requirements.txt pyproject.toml .ci/setup
	@VENV="$(VENV)" PYTHON="$(PYTHON)" sh .ci/setup
	@touch $@

demo: setup
	$(BIN)/python -m orchestrator sweep quickstart

# The whole suite starts two processes, which take file after file; a few tests are done before a second one is there.
test: setup
	$(BIN)/python -m pytest $(or $(ARGS),-n $(PROCESSES) --dist=loadfile)

lint: ruff mypy imports

ruff: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup
	@VENV="$(VENV)" PYTHON="$(PYTHON)" sh .ci/setup --lock $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
