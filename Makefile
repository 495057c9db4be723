# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell $(name) --version >/dev/null 2>&1 && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test lint released-contract unit contract scenario format clean

# The main job on real images and real servers. DATA: class folders or an .npz; by default 5,000 handwritten digits.
demo: $(INSTALLED)
	$(BIN)/python -m services.demo $(DATA) --report demo-report

# Everything that needs nothing but pip: all parts run to the end, whatever fails, and a summary names their results.
test: $(INSTALLED)
	$(BIN)/python -m tests.suites

LINTERS := lint-format lint-style lint-types lint-imports lint-dockerfile lint-protos lint-released
.PHONY: $(LINTERS)
lint: $(LINTERS)
lint-format: $(INSTALLED)
	$(BIN)/ruff format --check .
lint-style: $(INSTALLED)
	$(BIN)/ruff check .
lint-types: $(INSTALLED)
	$(BIN)/mypy
lint-imports: $(INSTALLED)
	$(BIN)/lint-imports
lint-dockerfile: $(INSTALLED)
	$(BIN)/hadolint deploy/Dockerfile
lint-protos: $(INSTALLED)
	cd protos && ../$(BIN)/buf lint
lint-released: $(INSTALLED)
	cd protos && ../$(BIN)/buf breaking --against released.binpb

# With each release: the contract that the next one may only add to, until the package is `defuse.v2`.
released-contract: $(INSTALLED)
	cd protos && ../$(BIN)/buf build --exclude-source-info --output released.binpb

# Two processes, each with servers of its own: one waits for a server or a file as often as it computes.
# Scenarios are dealt out in the order of tests/scenario/conftest.py, other files by how many tests they have.
scenario: IN_ORDER := --no-loadscope-reorder
unit contract scenario: $(INSTALLED)
	$(BIN)/python -m pytest tests/$@ -n 2 --dist loadfile $(IN_ORDER) $(PYTEST)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml constraints.txt $(wildcard protos/*.py protos/defuse/v1/*.proto)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[stack,demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-report clients/python/defuse/v1
