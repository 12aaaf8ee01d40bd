# Everything a new user types: `make demo`, `make test`. Each makes .venv first; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo study test test-all bench lint format clean

demo: $(VENV)/run.stamp  ## render clips, pre-train on them, draw what was learned
	$(BIN)/python -m train.pretrain

study: $(VENV)/run.stamp  ## does it learn? pre-trained against from scratch, three seeds, a table and a plot
	$(BIN)/python -m train.study learns

test: $(VENV)/dev.stamp  ## the quick tier, under 3 minutes
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 -m "not long"

test-all: $(VENV)/dev.stamp  ## everything
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8

bench: $(VENV)/dev.stamp
	$(BIN)/python -m pytest bench/ --benchmark-only

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins torch to a release, not a build: without a GPU pip takes the CPU build where it is offered one (X+cpu is
# newer than X to pip), and with a GPU === asks for the plain one
TORCH := $(if $(shell command -v nvidia-smi),$(subst ==,===,$(shell grep '^torch==' constraints.txt)))
$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) ..."
	$(PIP) $(TORCH) --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
