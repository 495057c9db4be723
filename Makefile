# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell $(name) --version >/dev/null 2>&1 && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-more lint released-contract unit contract scenario format clean

# The main job on real images and real servers. DATA: class folders or an .npz; by default 5,000 handwritten digits.
demo: $(INSTALLED)
	$(BIN)/python -m services.demo $(DATA) --report demo-report

# All tests that need nothing but pip. Every part runs to the end, and a summary names the results.
test: $(INSTALLED)
	$(BIN)/python -m tests.suites

# Tests that need Debian packages or Node, and those that `make test` skips where openssl is missing. Missing tools are
# installed first; Prometheus is only unpacked, so that no server starts.
MORE := $(VENV)/more
APT := $(if $(filter-out 0,$(shell id -u)),sudo )apt-get
test-more: $(MORE)/installed
	@failed=0; \
	$(BIN)/python -m pytest tests/more -n 2 --dist loadfile $(PYTEST) || failed=1; \
	$(BIN)/python -m pytest tests/contract -m openssl -n 2 --dist loadfile $(PYTEST) || failed=1; \
	echo "Not run: what needs a CUDA device (make test, on a machine with one); images and Compose on a Docker engine" \
	  "(docker compose up --detach --wait && docker compose run --rm demo)."; \
	exit $$failed

$(MORE)/installed: $(INSTALLED) tests/more/package.json tests/more/package-lock.json
	which openssl node npm || { $(APT) update && $(APT) install --yes --no-install-recommends openssl nodejs npm; }
	rm -rf $(MORE) && mkdir -p $(MORE)/node $(MORE)/debian
	cd $(MORE)/debian && { apt-get download prometheus || { $(APT) update && apt-get download prometheus; }; }
	dpkg-deb --extract $(MORE)/debian/prometheus_*.deb $(MORE)
	cp tests/more/package.json tests/more/package-lock.json $(MORE)/node
	cd $(MORE)/node && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

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
