# `make demo` works from a bare checkout. PYTHON names the Python to build .venv with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FRAMES ?= 200
EXAMPLES ?= 300

.PHONY: demo test check lint types layers drift format bench schema chaos constraints clean help

help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

demo: $(STAMP) ## start a farm, render 30 images for two accounts, show them and the bills, stop
	@$(BIN)/farm demo

test: $(STAMP) ## every test that needs no GPU and takes no minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

check: lint types layers drift ## style, types, layers, and that migrations say what tables.py says

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

drift: $(STAMP)
	$(BIN)/python .ci/drift.py

format: $(STAMP) ## let ruff write it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the figures of the README
	@for file in benchmarks/[a-z]*.py; do \
		name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

schema: $(STAMP) ## send every operation of the OpenAPI whatever its schema allows and what not: make schema EXAMPLES=300
	FARM_SCHEMA_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -s -m slow --timeout 36000 tests/test_schema.py

chaos: $(STAMP) ## kill everything while it renders, and check that nothing is lost or billed twice: make chaos FRAMES=2000
	FRAMES=$(FRAMES) $(BIN)/python -m pytest -m slow -k chaos --timeout 3600 tests

constraints: $(STAMP) ## pin what is installed now
	$(BIN)/python .ci/pin.py > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info

# Once, and again when what is needed changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) .ci/venv.py $(VENV)
	@echo "installing into $(VENV): about 2 GB the first time, a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[worker,embedded,dev]'
	@touch $(STAMP)
